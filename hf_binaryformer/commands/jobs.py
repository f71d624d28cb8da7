"""The commands' work, without the command line: from files to files, with all of a job's results or none of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_binaryformer.commands.outputs import check_outputs, write_json
from hf_binaryformer.commands.start_up import without_collection
from hf_binaryformer.data.label_schemes import common_scheme, read_label_names
from hf_binaryformer.pipelines.provenance import NOTICE, versions
from hf_binaryformer.pipelines.whole_files import all_or_nothing

if TYPE_CHECKING:
    import numpy as np

    from hf_binaryformer.pipelines.segmentation import VolumeSegmentationPipeline
    from hf_binaryformer.pipelines.volumes import Volume

DEFAULT_MODEL = "binaryformer-brain"

Progress = Callable[[int, int], None]


def segment_file(
    source: Path,
    output: Path,
    *,
    overlay: Path | None = None,
    report: Path | None = None,
    probabilities: Path | None = None,
    model: str = DEFAULT_MODEL,
    backend: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    views: str | None = None,
    mirror: bool | None = None,
    keep_largest: bool | None = None,
    head_only: bool | None = None,
    title: str = "",
    progress: Progress | bool = False,
) -> dict[str, Any]:
    """Segment one volume on its own grid.

    Args:
        source: NIfTI, .mha, .mhd, .nrrd or .mgz file, or a DICOM folder.
        output: label volume to write (.nii, .nii.gz, .mha or .nrrd).
        overlay: PNG to write, see :func:`hf_binaryformer.pipelines.overlay.label_overlay`.
        report: JSON to write, with the same content as the return value.
        probabilities: NIfTI to write, 4D, one volume for each label from 0, values 0 to 1 in steps of 1/255.
        model: short name, folder or Hub id.
        backend: backend of Hamming attention; None leaves the choice to the operator.
        dtype: "float32", "bfloat16", "float16", or "auto": bfloat16 where the device has it in hardware, or else float32.
        device: torch device; None takes CUDA if it is available, otherwise the CPU.
        views, mirror, keep_largest, head_only: as for
            :meth:`~hf_binaryformer.pipelines.segmentation.VolumeSegmentationPipeline.__call__`.
        title: first line of the overlay; the source's name if empty.
        progress: called with (done, total), or whether to show the pipeline's own bar.

    Raises:
        ValueError, OSError: bad input (see :mod:`hf_binaryformer.pipelines.volumes`) or unusable output.
        BackendUnavailableError: the backend cannot run here.
    """
    from hf_binaryformer.pipelines.volumes import NIFTI_SUFFIXES, OUTPUT_SUFFIXES, check_output_path, read_volume

    wanted = ((output, OUTPUT_SUFFIXES), (probabilities, NIFTI_SUFFIXES), (overlay, (".png",)), (report, (".json",)))
    targets = check_outputs(wanted, [source])
    volume = read_volume(source)
    check_output_path(output, volume)

    from hf_binaryformer.pipelines.overlay import label_overlay

    pipeline = load_pipeline(model, backend=backend, dtype=dtype, device=device)
    result = pipeline(
        volume,
        return_probabilities=probabilities is not None,
        progress=progress,
        views=views,
        mirror=mirror,
        keep_largest=keep_largest,
        head_only=head_only,
    )
    with all_or_nothing(targets) as temporary:
        result.save(temporary[output])
        if probabilities is not None:
            assert result.probabilities is not None
            _write_probabilities(temporary[probabilities], result.probabilities, volume)
        if overlay is not None:
            picture = label_overlay(
                volume.array, result.labels, volume.spacing, result.label_names, title=title or source.name
            )
            picture.save(temporary[overlay], format="PNG", optimize=True)
        if report is not None:
            write_json(temporary[report], result.report)
    return result.report


@without_collection()
def load_pipeline(
    model: str, *, backend: str | None = None, dtype: str = "float32", device: str | None = None
) -> VolumeSegmentationPipeline:
    """The network that labels volumes, on a device that works; arguments as for :func:`segment_file`."""
    from transformers.utils import logging

    from hf_binaryformer.pipelines.segmentation import VolumeSegmentationPipeline

    # Progress bars for loading small files would disturb the main one.
    logging.disable_progress_bar()
    pipeline = VolumeSegmentationPipeline.from_pretrained(model, device=usable_device(device), dtype=dtype)
    pipeline.model.set_attention_backend(backend)
    return pipeline


def usable_device(name: str | None) -> str | None:
    """Return the device after creating a test tensor on it; None stays None.

    Raises:
        ValueError: torch does not know the device, or it is not available.
    """
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device '{name}' cannot be used here ({reason}): leave --device out to have one chosen"
        ) from error
    return name


def _write_probabilities(path: Path, probabilities: np.ndarray, like: Volume) -> None:
    """(C, I, J, K) in RAS order as 4D NIfTI (own axes, C) on the grid of the input; stored in steps of 1/255."""
    import nibabel as nib
    import numpy as np
    from nibabel.orientations import apply_orientation, axcodes2ornt, ornt_transform

    from hf_binaryformer.pipelines.volumes import write_image

    write_image(path, probabilities[0], like, description=NOTICE)
    grid: Any = nib.load(path)
    back = ornt_transform(axcodes2ornt("RAS"), like.source.orientation)
    # nibabel does not scale the array if a slope is set explicitly, so it is scaled here, one label at a time.
    own = np.empty((*grid.shape, len(probabilities)), dtype=np.uint8)
    for label, probability in enumerate(probabilities):
        own[..., label] = np.rint(255 * apply_orientation(probability, back).astype(np.float32))
    image = type(grid)(own, grid.affine, grid.header)
    image.header.set_data_dtype(np.uint8)
    image.header.set_slope_inter(1 / 255, 0)
    image.to_filename(path)


def evaluate_files(
    pred: Path,
    truth: Path,
    *,
    report: Path | None = None,
    labels: Path | None = None,
    tolerance: float = 1.0,
    merge_sides: bool = False,
    map_pred: Path | None = None,
    map_truth: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Dice, NSD and HD95 of one prediction, or of a folder of them against a folder of truths with such names.

    A label that neither volume has is not counted; one that only one of them has counts as Dice 0 and NSD 0.

    Args:
        pred: label volume or folder.
        truth: label volume or folder.
        report: JSON to write, with the same content as the return value.
        labels: JSON with label names, or the word "freesurfer"
            (:func:`~hf_binaryformer.data.label_schemes.read_label_names`); None scores the labels that occur.
        tolerance: tolerance of the NSD in mm.
        merge_sides: score "left hippocampus" and "right hippocampus" as one; needs names.
        map_pred, map_truth: new labels of the prediction and of the truth, see
            :func:`~hf_binaryformer.data.label_schemes.read_mapping`.
        progress: called with (done, total) after each case.

    Returns:
        "cases" (scores of each), "labels" (mean over cases for each label) and "mean" (over labels); null stands for
        NaN. "notes" has what was rounded, and which files of a folder are no volumes.

    Raises:
        ValueError, OSError: see :func:`~hf_binaryformer.commands.pairing.pair_volumes`; unreadable volumes or mappings, labels
            that a mapping does not name, or grids that differ.
    """
    from hf_binaryformer.commands.pairing import pair_volumes

    pairs, notes = pair_volumes(pred, truth)
    if report is not None:
        check_outputs([(report, (".json",))], [pred, truth])
    names = None if labels is None else read_label_names(labels)
    scheme = common_scheme(names, map_pred, map_truth, merge_sides=merge_sides)

    from hf_binaryformer.pipelines.metrics import ABSENT_LABELS, score_labels, summarize
    from hf_binaryformer.pipelines.volumes import check_same_grid, read_volume

    cases = []
    for done, (_, pred_path, truth_path) in enumerate(pairs, 1):
        ours, theirs = read_volume(pred_path, labels=True), read_volume(truth_path, labels=True)
        check_same_grid(ours, theirs)
        notes += [*ours.notes, *theirs.notes]
        try:
            found, true = scheme.pred(ours.array), scheme.truth(theirs.array)
            cases.append(score_labels(found, true, theirs.spacing, label_names=scheme.names, tolerance=tolerance))
        except ValueError as error:
            raise ValueError(f"'{pred_path}' against '{truth_path}': {error}") from error
        if progress is not None:
            progress(done, len(pairs))
    *rows, mean = summarize(cases)
    content = {
        "notice": NOTICE,
        "prediction": str(pred),
        "truth": str(truth),
        "tolerance_mm": tolerance,
        "merge_sides": merge_sides,
        "map_pred": None if map_pred is None else str(map_pred),
        "map_truth": None if map_truth is None else str(map_truth),
        "absent_labels": ABSENT_LABELS,
        "notes": notes,
        "mean": mean.as_json(),
        "labels": [row.as_json() for row in rows],
        "cases": [
            {"case": case, "truth": other.name, "labels": [score.as_json() for score in scores]}
            for (case, _, other), scores in zip(pairs, cases, strict=True)
        ],
        "versions": versions(),
    }
    if report is not None:
        with all_or_nothing([report]) as temporary:
            write_json(temporary[report], content)
    return content
