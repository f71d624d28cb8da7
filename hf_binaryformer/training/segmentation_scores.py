"""Dice, NSD and HD95 of whole volumes on a split of a prepared folder, with the prior atlas as the baseline."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.ndimage import zoom

from hf_binaryformer.data.label_schemes import Scheme, common_scheme
from hf_binaryformer.data.prepared_folder import Case, PreparedFolder, read_labels
from hf_binaryformer.pipelines.metrics import METRICS, LabelScore, sample_deviation, score_labels, summarize
from hf_binaryformer.pipelines.postprocessing import largest_pieces
from hf_binaryformer.pipelines.segmentation import VolumeSegmentationPipeline
from hf_binaryformer.pipelines.volumes import Volume


class PriorAtlas:
    """The majority label of each voxel over the training masks, all resized to their mean shape.

    It knows the usual positions of labels but does not use the image. A network that is not better has learned nothing.
    """

    def __init__(self, cases: list[Case], labels: list[int]) -> None:
        shapes = [read_labels(case).array.shape for case in cases]
        shape = np.mean(shapes, axis=0).round().astype(int)
        values = np.array([0, *labels])
        votes = np.zeros((len(values), *shape), dtype=np.uint16)
        for case in cases:
            resized = resize_nearest(read_labels(case).array, shape)
            for place, label in enumerate(values):
                votes[place] += resized == label
        self.majority = values[votes.argmax(0)]

    def predict(self, shape: tuple[int, ...]) -> np.ndarray:
        """The atlas resized to a volume's shape."""
        return resize_nearest(self.majority, np.array(shape))


def resize_nearest(labels: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Labels stretched to another shape without interpolation."""
    return zoom(labels, np.array(shape) / labels.shape, order=0, grid_mode=True, mode="nearest")


def evaluate_split(
    model: str | Path,
    folder: PreparedFolder,
    split: str,
    *,
    baseline: bool,
    dtype: str = "float32",
    mirror: bool | None = None,
    compare_pieces: bool = False,
) -> dict[str, Any]:
    """Segment every volume of a split, print tables, and return the figures.

    Args:
        model: short name, folder or Hub id.
        folder: prepared data.
        split: whose volumes are segmented.
        baseline: whether the prior atlas, made from the split ``train``, is scored too.
        dtype: number format of the network, see :class:`~hf_binaryformer.pipelines.segmentation.VolumeSegmentationPipeline`.
        mirror: average with the mirror image, as the pipeline does. None: as the checkpoint says.
        compare_pieces: score all pieces of each structure, whatever the checkpoint says, and beside them the largest only.

    Returns:
        ``split``, ``volumes``, ``dtype``, which is never "auto", ``mirror``, and the network's form of attention; the
        :func:`figures_of_split`; if labels have sides, ``merged`` has those of "left hippocampus" and "right hippocampus"
        scored as one.
    """
    pipeline = VolumeSegmentationPipeline.from_pretrained(str(model), dtype=dtype)
    atlas = PriorAtlas(folder.split("train"), sorted({*folder.label_names} - {0})) if baseline else None
    schemes = {"apart": common_scheme(folder.label_names, None, None)}
    together = common_scheme(folder.label_names, None, None, merge_sides=True)
    if any(number != of_both for number, of_both in together.merged.items()):
        schemes["merged"] = together
    cases = folder.split(split)
    rows: dict[str, dict[str, list[list[LabelScore]]]] = {name: {} for name in schemes}
    for case in cases:
        truth = read_labels(case)
        guesses = {"network": labels_of(pipeline, case, mirror=mirror, keep_largest=False if compare_pieces else None)}
        if compare_pieces:
            guesses["largest pieces"] = largest_pieces(guesses["network"], pipeline.label_names)
        if atlas is not None:
            guesses["prior atlas"] = atlas.predict(truth.array.shape)
        for name, scheme in schemes.items():
            for method, guess in guesses.items():
                rows[name].setdefault(method, []).append(scores(guess, truth, scheme))
    figures = {name: figures_of_split(found, cases) for name, found in rows.items()}
    for name, found in figures.items():
        sides = ", left and right as one" if name == "merged" else ""
        print_table(found["rows"], f"Dice, {len(cases)} volumes of split '{split}'{sides}")
        if "sets" in found:
            print_sets(found["sets"])
    return {
        "split": split,
        "volumes": len(cases),
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "mirror": pipeline.settings(mirror=mirror)["mirror"],
        "attention_type": pipeline.model.config.attention_type,
        "bit_gradient": pipeline.model.config.resolved_bit_gradient,
        **figures.pop("apart"),
        **figures,
    }


def figures_of_split(rows: dict[str, list[list[LabelScore]]], cases: list[Case]) -> dict[str, Any]:
    """What the scores of each method, a list for each volume, come to.

    Returns:
        ``rows`` has the :func:`figures_of` each method; ``sets`` has those of the network for each set of the data, if it
        has sets; ``cases`` has the network's Dice of each label of each volume.
    """
    by_set: dict[str, list[list[LabelScore]]] = {}
    for case, found in zip(cases, rows["network"], strict=True):
        if case.set is not None:
            by_set.setdefault(case.set, []).append(found)
    sets = {name: {"volumes": len(found), **figures_of(found)} for name, found in by_set.items()}
    return {
        "rows": {method: figures_of(found) for method, found in rows.items()},
        **({"sets": sets} if sets else {}),
        "cases": {
            case.name: list(rounded({score.name: score.dice for score in found}).values())
            for case, found in zip(cases, rows["network"], strict=True)
        },
    }


def validation_figures(
    pipeline: VolumeSegmentationPipeline, folder: PreparedFolder, volumes: int | None
) -> dict[str, float]:
    """Dice, NSD and HD95 (mm), means over labels and the first volumes of the validation split (None: all)."""
    cases = folder.split("validation")[:volumes]
    scheme = common_scheme(folder.label_names, None, None)
    mean = summarize([scores(labels_of(pipeline, case), read_labels(case), scheme) for case in cases])[-1]
    return {f"validation_{metric}": getattr(mean, metric) for metric in METRICS}


def labels_of(pipeline: VolumeSegmentationPipeline, case: Case, **options: Any) -> np.ndarray:
    """The network's labels of one volume, (I, J, K); ``options`` are those of the pipeline's call."""
    with torch.inference_mode():
        return pipeline(case.image, **options).labels


def scores(found: np.ndarray, truth: Volume, scheme: Scheme) -> list[LabelScore]:
    """Scores of each label of the scheme."""
    return score_labels(scheme.pred(found), scheme.truth(truth.array), truth.spacing, label_names=scheme.names)


def figures_of(cases: list[list[LabelScore]]) -> dict[str, Any]:
    """Figures of one method.

    ``labels`` has for each label the ``mean`` and ``sd`` (sample standard deviation) of Dice over volumes, the number of
    NaN values that are left out (``nan``), and the means ``nsd`` and ``hd95`` (mm). Beside it are their means over
    labels. None stands for a mean of no value, and for the deviation of fewer than two.
    """
    *rows, whole = summarize(cases)
    labels = {}
    for place, row in enumerate(rows):
        shown = {"mean": row.dice, "sd": sample_deviation(case[place].dice for case in cases)}
        labels[row.name] = rounded(shown | {"nsd": row.nsd, "hd95": row.hd95}) | {"nan": row.nan["dice"]}
    return rounded({"mean": whole.dice, "nsd": whole.nsd, "hd95": whole.hd95}) | {"labels": labels}


def rounded(figures: dict[str, float]) -> dict[str, float | None]:
    """Figures rounded to four places; None for NaN, which JSON does not have."""
    return {key: None if math.isnan(value) else round(value, 4) for key, value in figures.items()}


def print_table(summary: dict[str, Any], title: str) -> None:
    """Print a table with one row per label and one column per method."""
    table = Table("label", *summary, title=title)
    for name in summary["network"]["labels"]:
        cells = [row["labels"][name] for row in summary.values()]
        table.add_row(name, *(str(c["mean"]) + ("" if c["sd"] is None else f" ± {c['sd']}") for c in cells))
    table.add_row("mean", *(str(row["mean"]) for row in summary.values()), style="bold")
    Console().print(table)


def print_sets(sets: dict[str, Any]) -> None:
    """Print a table with one row per set."""
    table = Table("set", "volumes", "mean Dice")
    for name, figures in sets.items():
        table.add_row(name, str(figures["volumes"]), str(figures["mean"]))
    Console().print(table)
