"""What a quality score is worth: its relation to Dice on validation volumes, written into a checkpoint's configuration.

The program is ``scripts/calibrate_quality.py``; :mod:`hf_binaryformer.pipelines.quality` says what a score is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from scipy.optimize import isotonic_regression
from scipy.stats import pearsonr, spearmanr

from hf_binaryformer.data.prepared_folder import PreparedFolder, read_labels
from hf_binaryformer.modeling.pretrained import MODEL_CONFIG, read_json
from hf_binaryformer.pipelines.metrics import mask_dice
from hf_binaryformer.pipelines.quality import OTHERS
from hf_binaryformer.pipelines.segmentation import VolumeSegmentationPipeline
from hf_binaryformer.pipelines.whole_files import write_text

# Score and Dice of a group in one volume.
Pair = tuple[float, float]
# A group with fewer volumes uses the pairs of all groups; a table has at most so many pairs, each the mean of three or more.
MIN_VOLUMES, MAX_PAIRS, VOLUMES_OF_PAIR = 12, 6, 3


def observed(pipeline: VolumeSegmentationPipeline, folder: PreparedFolder, split: str) -> dict[str, list[Pair]]:
    """Score and Dice of every group that was found, in every volume of a split.

    A group that is found where the truth has none counts with Dice 0; one that is not found has no score and is left out.
    """
    pairs: dict[str, list[Pair]] = {}
    for case in folder.split(split):
        result, truth = pipeline(case.image), read_labels(case).array
        for row in result.report["quality"]["groups"]:
            dice = mask_dice(np.isin(result.labels, row["labels"]), np.isin(truth, row["labels"]))
            if row["score"] is not None and not math.isnan(dice):
                pairs.setdefault(row["name"], []).append((row["score"], dice))
    return pairs


def fitted(pairs: Sequence[Pair]) -> list[list[float]]:
    """A table of few pairs: means over volumes of similar score, made ascending in Dice (isotonic regression).

    Args:
        pairs: score and Dice of each volume, at least one, in any order.

    Returns:
        Pairs of score and Dice, 0 to 1, scores ascending; Dice never falls.
    """
    ordered = np.array(sorted(pairs))
    parts = np.array_split(ordered, min(MAX_PAIRS, max(1, len(ordered) // VOLUMES_OF_PAIR)))
    scores, dice = np.round([part.mean(axis=0) for part in parts], 4).T
    scores, place = np.unique(scores, return_inverse=True)
    sizes = np.bincount(place, weights=[len(part) for part in parts])
    dice = np.bincount(place, weights=dice * [len(part) for part in parts]) / sizes
    rising = isotonic_regression(dice, weights=sizes).x
    return [[float(score), round(float(value), 4)] for score, value in zip(scores, rising, strict=True)]


def quality_table(pairs: Mapping[str, Sequence[Pair]]) -> dict[str, list[list[float]]]:
    """Tables of the groups with volumes enough, and one of all groups together for the rest.

    Raises:
        ValueError: nothing was found in any volume.
    """
    together = [pair for group in pairs.values() for pair in group]
    if not together:
        raise ValueError(
            "no structure was found in any volume, expected scores to calibrate: is this the model's data?"
        )
    own = {name: fitted(group) for name, group in pairs.items() if len(group) >= MIN_VOLUMES}
    return {OTHERS: fitted(together), **own}


def correlations(pairs: Mapping[str, Sequence[Pair]]) -> dict[str, dict[str, Any]]:
    """Correlation of score and Dice over volumes, for each group and for all: Pearson's, Spearman's, number of pairs.

    None where fewer than three pairs, or equal numbers, have none.
    """
    together = [pair for group in pairs.values() for pair in group]
    rows = {}
    for name, group in {OTHERS: together, **pairs}.items():
        scores, dice = np.array(group).T if group else (np.empty(0), np.empty(0))
        known = len(group) > 2 and np.ptp(scores) > 0 and np.ptp(dice) > 0
        rows[name] = {
            "pairs": len(group),
            "pearson": round(float(pearsonr(scores, dice)[0]), 4) if known else None,
            "spearman": round(float(spearmanr(scores, dice)[0]), 4) if known else None,
        }
    return rows


def main(
    model: Annotated[Path, typer.Option(help="Folder of the checkpoint, whose config.json receives the table.")],
    data: Annotated[Path, typer.Option(help="Folder written by `binaryformer prepare`.")],
    split: Annotated[
        str, typer.Option(help="Its volumes; never the test split, which the card reports.")
    ] = "validation",
    report: Annotated[Path | None, typer.Option(help="Pairs, correlations and table to write: .json.")] = None,
) -> None:
    """Fill the field `quality` of a checkpoint from volumes that it was not trained on."""
    config = read_json(model / MODEL_CONFIG)
    folder = PreparedFolder(data)
    if split == "test":
        raise typer.BadParameter("the test split stays unseen until the end: give validation")
    if not folder.split(split):
        raise typer.BadParameter(f"{data} has no volumes in the split '{split}': give another --split")
    pipeline = VolumeSegmentationPipeline.from_pretrained(model, dtype="auto")
    pairs = observed(pipeline, folder, split)
    try:
        table = quality_table(pairs)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    found = correlations(pairs)
    write_text(model / MODEL_CONFIG, json.dumps({**config, "quality": table}, indent=2, sort_keys=True) + "\n")
    if report is not None:
        content = {
            "split": split,
            "volumes": len(folder.split(split)),
            **pipeline.settings(),
            "correlations": found,
            "quality": table,
            "pairs": pairs,
        }
        write_text(report, json.dumps(content, indent=2) + "\n")
    for name, row in found.items():
        typer.echo(f"{name}: {row['pairs']} pairs, correlation {row['pearson']} (ranks {row['spearman']})")
