"""python scripts/reliability/backgrounds.py: labels of images whose background tools have changed

Segments the MNI152 template as it is and with each change, and compares the labels: Dice, mean over labels. Coronal slices
are 4 mm apart, to be quick.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import nibabel as nib
import numpy as np
import typer
from scipy.ndimage import zoom

from hf_binaryformer.commands.demo import load_mni152
from hf_binaryformer.pipelines.segmentation import VolumeSegmentationPipeline
from hf_binaryformer.pipelines.volumes import Volume, volume_from_image
from records import write_record

MODEL = "binaryformer-tiny-brain"
THICKNESS = 4
SEED = 0


def template() -> tuple[np.ndarray, np.ndarray]:
    """Every fourth coronal slice of the template, 0 to 1 000, and the affine."""
    with tempfile.TemporaryDirectory() as folder:
        image: Any = nib.load(load_mni152(Path(folder))[0])
        array = np.asarray(image.dataobj, dtype=np.float32)[:, ::THICKNESS]
    affine = image.affine.copy()
    affine[:, 1] *= THICKNESS
    return 1000 * array / array.max(), affine


def changes(array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The image with what is known to happen to images."""
    rng = np.random.default_rng(SEED)
    inside = array > 0
    strays = array.copy()
    strays[5, 3, 5], strays[150, 20, 9] = -500, -400
    yield "two voxels of -500 and -400 in air", strays
    bright = array.copy()
    bright[2, 1, 2] = bright[190, 50, 180] = bright[1, 30, 100] = 1000
    yield "three bright voxels in air", bright
    yield "other units and offset", 0.01 * array - 7
    yield "z-scored over the volume", (array - array.mean()) / array.std()
    zscored = np.where(inside, (array - array[inside].mean()) / array[inside].std(), 0)
    yield "z-scored inside the brain, air left at 0", zscored
    yield "background of 1200", np.where(inside, array, 1200)
    half = zoom(array, (0.5, 1, 0.5), order=3)
    back = zoom(half, [n / m for n, m in zip(array.shape, half.shape, strict=True)], order=3)
    yield "ringing of a cubic spline, 2 mm to 1 mm", back
    for sigma in (10, 20):
        yield f"Gaussian noise of {sigma}", array + rng.normal(0, sigma, array.shape)
    real, imaginary = (rng.normal(0, 20, array.shape) for _ in range(2))
    yield "Rician noise of 20", np.hypot(array + real, imaginary)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Mean Dice over the labels of b."""
    labels = np.unique(b[b > 0])
    return float(np.mean([2 * ((a == n) & (b == n)).sum() / ((a == n).sum() + (b == n).sum()) for n in labels]))


def measure() -> dict[str, Any]:
    """Dice against the labels of the clean image, and what was taken as background, for each change."""
    pipeline = VolumeSegmentationPipeline.from_pretrained(MODEL)
    pipeline.processor.spacing = [1.0, float(THICKNESS), 1.0]
    array, affine = template()

    def volume(values: np.ndarray) -> Volume:
        return volume_from_image(nib.Nifti1Image(values.astype(np.float32), affine))

    clean = pipeline(volume(array)).labels
    rows = {}
    for name, changed in changes(array):
        found = pipeline(volume(changed))
        rows[name] = {"dice": dice(found.labels, clean), "intensities": found.report["intensities"]}
        print(f"{rows[name]['dice']:.4f}  {name}")
    return {"command": "python scripts/reliability/backgrounds.py", "model": MODEL, "changes": rows}


def main(record: Annotated[Path | None, typer.Option(help="Figures to write: .json.")] = None) -> None:
    """Measure."""
    write_record(record, SEED, measure())


if __name__ == "__main__":
    typer.run(main)
