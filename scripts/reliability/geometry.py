"""python scripts/reliability/geometry.py --record model_cards/evidence/reliability/geometry.json

Stores one volume in all 48 axis orders and directions, upright and oblique, with cubic and with flat voxels, in sizes from
one voxel to 512x512x200, and segments each file into another file. The labels are then compared in space with those of the
volume as it is: the share of voxels that have the label of the untouched volume's voxel at the same place in mm. The network
is a stand-in that labels bands of intensity, so that the right label of every voxel is known; the packaged brain network
segments the MNI152 template in some of the orientations as well.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import nibabel as nib
import numpy as np
import torch
import typer
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from scipy.spatial.transform import Rotation
from torch import Tensor, nn
from tqdm.auto import tqdm

from backgrounds import MODEL, THICKNESS, template
from hf_binaryformer.modeling.image_processing import BinaryFormerImageProcessor
from hf_binaryformer.pipelines.segmentation import VolumeSegmentationPipeline
from hf_binaryformer.pipelines.volumes import VolumeError
from records import write_record

ORIENTATIONS = [
    "".join(pair[direction] for pair, direction in zip(order, directions, strict=True))
    for order in itertools.permutations(("RL", "AP", "SI"))
    for directions in itertools.product((0, 1), repeat=3)
]
ANGLES = (0.0, 12.0, 40.0)
SPACINGS = ((1.0, 1.0, 1.0), (0.7, 1.1, 4.5))
# No whole multiple of a voxel, so that no voxel lies just between two labels of the network.
NETWORK_SPACING = (1.37, 1.37, 1.37)
SIZES = ((1, 1, 1), (2, 1, 1), (1, 40, 33), (9, 8, 7), (40, 31, 22))
# Of the packaged network, and of large volumes.
FEW = ORIENTATIONS[::11]
LARGE = (512, 512, 200)
LEVELS = (0.25, 0.5, 0.75)


class Bands(nn.Module):
    """Labels a pixel by the band that its intensity lies in; what a perfectly trained network would be for it."""

    def __init__(self) -> None:
        super().__init__()
        names = {number: f"band {number}" for number in range(len(LEVELS) + 1)}
        self.config = SimpleNamespace(id2label=names, num_channels=1, patch_size=8)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, pixel_values: Tensor) -> Any:
        """(B, 1, H, W), 0 to 1 → logits (B, C, H, W)."""
        band = torch.bucketize(pixel_values[:, 0], torch.tensor(LEVELS))
        return SimpleNamespace(logits=100.0 * nn.functional.one_hot(band, len(LEVELS) + 1).movedim(-1, 1).float())


def pipeline_of(spacing: tuple[float, float, float] | None) -> VolumeSegmentationPipeline:
    """The stand-in at this spacing in mm; None: at each volume's own."""
    processor = BinaryFormerImageProcessor(
        num_slices=1, image_size=(64, 64), spacing=spacing, percentiles=(0, 100), foreground_only=False
    )
    return VolumeSegmentationPipeline(Bands(), processor, batch_size=16)


def phantom(shape: Sequence[int]) -> np.ndarray:
    """Smooth blobs without any symmetry, 0 to 1, (I, J, K), float32."""
    i, j, k = np.meshgrid(*(np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape), indexing="ij", sparse=True)
    blobs = ((1.0, 0.2, -0.1, 0.1, 4.0), (0.6, -0.5, -0.3, -0.4, 9.0), (0.8, 0.6, 0.5, -0.5, 14.0))
    parts = [h * np.exp(-sharp * ((i - a) ** 2 + (j - b) ** 2 + (k - c) ** 2)) for h, a, b, c, sharp in blobs]
    return np.sum(parts, axis=0).astype(np.float32)


def stored(array: np.ndarray, affine: np.ndarray, orientation: str, angle: float) -> nib.Nifti1Image:
    """The volume with the world turned by an angle in degrees, stored in another axis order."""
    turned = np.eye(4)
    turned[:3, :3] = Rotation.from_euler("xyz", (angle, -angle / 2, angle / 3), degrees=True).as_matrix()
    turned = turned @ affine
    order = ornt_transform(io_orientation(turned), axcodes2ornt(orientation))
    return nib.Nifti1Image(apply_orientation(array, order), turned @ inv_ornt_aff(order, array.shape))


def agreement(path: Path, image: nib.Nifti1Image, angle: float, labels: np.ndarray, affine: np.ndarray) -> float:
    """Share of the voxels of a label file that have the label at the same place of the untouched volume.

    Args:
        path: the label file.
        image: the image that it was made of, whose grid the file must have.
        angle, affine: where :func:`stored` was told to put the volume.
        labels: of the untouched volume, on the grid of ``affine``.
    """
    written: Any = nib.load(path)
    if written.shape != image.shape or not np.allclose(written.affine, image.affine, atol=1e-4):
        return 0.0
    back = Rotation.from_euler("xyz", (angle, -angle / 2, angle / 3), degrees=True).inv().as_matrix()
    to_index = np.linalg.inv(affine)
    matrix = to_index[:3, :3] @ back @ written.affine[:3, :3]
    offset = to_index[:3, :3] @ back @ written.affine[:3, 3] + to_index[:3, 3]
    found, same = np.asarray(written.dataobj), 0
    # Slice by slice: indices of a whole large volume would take gigabytes.
    for k in range(found.shape[2]):
        index = np.stack(np.meshgrid(*map(np.arange, found.shape[:2]), [k], indexing="ij")).reshape(3, -1)
        place = np.rint(matrix @ index + offset[:, None]).astype(int)
        inside = np.all((place >= 0) & (place < np.array(labels.shape)[:, None]), axis=0)
        same += int((found[..., k].ravel()[inside] == labels[tuple(place[:, inside])]).sum())
    return same / found.size


def through_file(pipeline: VolumeSegmentationPipeline, image: nib.Nifti1Image, folder: Path) -> Path:
    """Segment a file into a file."""
    nib.save(image, folder / "in.nii")
    return pipeline(str(folder / "in.nii")).save(folder / "labels.nii")


def measure(
    pipeline: VolumeSegmentationPipeline, array: np.ndarray, affine: np.ndarray, ways: list[tuple[str, float]]
) -> list[float]:
    """Agreement for each orientation and angle; nothing if the volume is refused, which must then happen every time."""
    found: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            labels: Any = nib.load(through_file(pipeline, nib.Nifti1Image(array, affine), folder))
            truth = np.asarray(labels.dataobj)
        except (VolumeError, ValueError):
            truth = None
        for orientation, angle in ways:
            image = stored(array, affine, orientation, angle)
            try:
                path = through_file(pipeline, image, folder)
            except (VolumeError, ValueError):
                found += [] if truth is None else [0.0]
                continue
            found.append(0.0 if truth is None else agreement(path, image, angle, truth, affine))
    return found


def row(found: list[float], tried: int) -> dict[str, Any]:
    """Figures of one size."""
    return {"tried": tried, "refused": tried - len(found), "worst": min(found, default=None)}


def main(
    orientations: Annotated[int, typer.Option(min=1, max=48, help="How many, evenly spread.")] = 48,
    large: Annotated[bool, typer.Option(help=f"Also {'x'.join(map(str, LARGE))} voxels.")] = True,
    brain: Annotated[bool, typer.Option(help="Also the packaged network on the MNI152 template.")] = True,
    record: Annotated[Path | None, typer.Option(help="Figures to write: .json.")] = None,
) -> None:
    """Measure; exit code 1 if an agreement is below 0.999."""
    chosen = ORIENTATIONS[:: len(ORIENTATIONS) // orientations]
    rows: dict[str, dict[str, Any]] = {}
    grids = list(itertools.product(SIZES, SPACINGS))
    if large:
        grids.append((LARGE, SPACINGS[1]))
    for size, spacing in tqdm(grids, desc="sizes"):
        ways = list(itertools.product(chosen if size != LARGE else FEW[:2], ANGLES if size != LARGE else ANGLES[1:2]))
        affine = np.diag([*spacing, 1.0])
        affine[:3, 3] = -31.5, 12.25, 407.0
        for network_spacing in (None, NETWORK_SPACING) if size != LARGE else (None,):
            found = measure(pipeline_of(network_spacing), phantom(size), affine, ways)
            name = f"{'x'.join(map(str, size))}, voxels {'x'.join(map(str, spacing))} mm"
            name += f", network at {NETWORK_SPACING[0]} mm" if network_spacing else ""
            rows[name] = row(found, len(ways))
    if brain:
        network = VolumeSegmentationPipeline.from_pretrained(MODEL)
        network.processor.spacing = [1.0, float(THICKNESS), 1.0]
        array, affine = template()
        ways = list(itertools.product(FEW, ANGLES[:2]))
        rows[f"MNI152, {MODEL}"] = row(measure(network, array, affine, ways), len(ways))
    for name, figures in rows.items():
        typer.echo(f"{name}: {figures}")
    write_record(record, 0, {"command": "python scripts/reliability/geometry.py", "agreement": rows})
    if any(figures["worst"] is not None and figures["worst"] < 0.999 for figures in rows.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
