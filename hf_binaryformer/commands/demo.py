"""The demo: the package's two main jobs on the MNI152 template, with packaged checkpoints and without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hf_binaryformer.commands import generation_jobs, jobs, outputs
from hf_binaryformer.pipelines.provenance import NOTICE
from hf_binaryformer.pipelines.whole_files import whole_file

# Structures, of either side, that make up each tissue of the template's probability maps.
TISSUES: dict[str, tuple[str, ...]] = {
    "white matter": ("cerebral white matter", "cerebellum white matter"),
    "grey matter": (
        "cerebral cortex",
        "cerebellum cortex",
        "thalamus",
        "caudate",
        "putamen",
        "pallidum",
        "hippocampus",
        "amygdala",
    ),
}
# A ball in the middle of the brain: thalami, basal ganglia, ventricles. Its centre lies on the midline, so that the
# same structures are missing on both sides.
HOLE_MM = 45.0
SAMPLES, STEPS, TEMPERATURE, FEATHER, SELECTION = 4, 50, 0.2, 8, "confidence"


def load_mni152(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """The MNI152 2009a T1 template at 1 mm: an average of 152 people, skull-stripped.

    Args:
        folder: where `mni152.nii.gz` is written.

    Returns:
        The file, and for each tissue a boolean array (197, 233, 189), RAS: its probability map > 0.5.

    Raises:
        ModuleNotFoundError: nilearn, which carries the template, is missing.
    """
    try:
        from nilearn import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'the demo needs nilearn, which is missing: pip install "hf-binaryformer[demo]"'
        ) from error
    import nibabel as nib

    path = folder / "mni152.nii.gz"
    with whole_file(path) as temporary:
        nib.save(datasets.load_mni152_template(resolution=1), temporary)
    maps = {
        "white matter": datasets.load_mni152_wm_template(resolution=1),
        "grey matter": datasets.load_mni152_gm_template(resolution=1),
    }
    return path, {tissue: np.asarray(image.dataobj) > 0.5 for tissue, image in maps.items()}


def segmentation_job(
    folder: Path, brain: Path, tissues: dict[str, np.ndarray], model: str, progress: jobs.Progress | bool = False
) -> dict[str, Any]:
    """Segment the brain into `segmentation.nii.gz` and `.png`; return the report with a Dice for each tissue."""
    from hf_binaryformer.pipelines.metrics import mask_dice
    from hf_binaryformer.pipelines.structure_names import without_side
    from hf_binaryformer.pipelines.volumes import read_volume

    output, picture = folder / "segmentation.nii.gz", folder / "segmentation.png"
    content = jobs.segment_file(
        brain, output, overlay=picture, model=model, title="MNI152 T1 template", progress=progress
    )
    labels = read_volume(output, labels=True).array
    parts = {
        tissue: [one["label"] for one in content["labels"] if without_side(one["name"]) in TISSUES[tissue]]
        for tissue in tissues
    }
    dice = {tissue: mask_dice(np.isin(labels, parts[tissue]), mask) for tissue, mask in tissues.items()}
    return {**content, "dice": dice}


def inpainting_job(folder: Path, brain: Path, progress: jobs.Progress | bool = False) -> dict[str, Any]:
    """Fill a hole in the brain; writes `inpainting.nii.gz`, `.png`, and the mask `inpainting_hole.nii.gz`.

    `inpainting.nii.gz` has one volume per sample.

    Returns:
        The report with ``psnr_hole``: PSNR in dB for the samples, their mean, and the fills for comparison.
    """
    import torch

    from hf_binaryformer.modeling.intensities import IntensityScale
    from hf_binaryformer.pipelines import inpainting_scores
    from hf_binaryformer.pipelines.grids import foreground_box
    from hf_binaryformer.pipelines.volumes import read_volume, write_labels
    from hf_binaryformer.pipelines.vq_inpainting import BinaryVQInpaintPipeline

    volume = read_volume(brain)
    box = foreground_box(volume.array, volume.spacing)
    centre = [(part.start + part.stop - 1) / 2 for part in box]
    hole = inpainting_scores.make_hole(volume.array.shape, volume.spacing, HOLE_MM, centre=centre)
    mask, output = folder / "inpainting_hole.nii.gz", folder / "inpainting.nii.gz"
    write_labels(mask, hole.astype(np.uint8), volume, description=NOTICE)
    content = generation_jobs.inpaint_file(
        brain,
        mask,
        output,
        overlay=folder / "inpainting.png",
        truth=brain,
        samples=SAMPLES,
        steps=STEPS,
        temperature=TEMPERATURE,
        feather=FEATHER,
        selection=SELECTION,
        title=f"MNI152 T1 template, {HOLE_MM:.0f} mm of it unknown",
        progress=progress,
    )

    import nibabel as nib

    samples = np.moveaxis(np.asanyarray(nib.as_closest_canonical(nib.load(output)).dataobj), -1, 0)
    pipeline = BinaryVQInpaintPipeline.from_pretrained(generation_jobs.DEFAULT_MODEL)
    config = pipeline.vqmodel.config
    scale = IntensityScale.of(volume.array, config.percentiles, config.intensity_ceiling)
    fills = {name: fill(volume.array, hole, scale) for name, fill in inpainting_scores.SIMPLE_FILLS.items()}
    case = pipeline.prepare(volume.array, hole, volume.affine)
    fills |= inpainting_scores.token_fills(pipeline, case, torch.Generator().manual_seed(0))
    fills["mean of samples"] = samples.mean(0)
    psnr = {name: inpainting_scores.hole_psnr(fill, volume.array, hole, scale) for name, fill in fills.items()}
    each = [inpainting_scores.hole_psnr(sample, volume.array, hole, scale) for sample in samples]
    return {**content, "psnr_hole": {"samples": each, "model": float(np.mean(each)), **psnr}}


def run_demo(
    folder: Path, *, model: str = jobs.DEFAULT_MODEL, progress: jobs.Progress | bool = False
) -> dict[str, Any]:
    """All jobs of the demo, one after the other.

    Args:
        folder: created if it is missing; receives the results, the input, and `report.json`.
        model: what segments, see :func:`~hf_binaryformer.commands.jobs.segment_file`; structures are found by name.
        progress: called with (done, total), or whether to show a bar.

    Returns:
        What `report.json` holds: each job's report under its name, and "files".
    """
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "report.json"
    outputs.check_outputs([(report, (".json",))], [])
    brain, tissues = load_mni152(folder)
    content: dict[str, Any] = {
        "notice": NOTICE,
        "segmentation": segmentation_job(folder, brain, tissues, model, progress),
        "inpainting": inpainting_job(folder, brain, progress),
        "files": [
            "mni152.nii.gz",
            "segmentation.nii.gz",
            "segmentation.png",
            "inpainting_hole.nii.gz",
            "inpainting.nii.gz",
            "inpainting.png",
            "report.json",
        ],
    }
    with whole_file(report) as temporary:
        outputs.write_json(temporary, content)
    return content
