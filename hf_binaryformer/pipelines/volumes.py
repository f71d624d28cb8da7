"""Medical image files to arrays and back; the formats themselves are in ``nifti.py``, ``itk.py`` and ``dicom.py``.

Every volume is read into the closest canonical orientation, RAS: i grows to the patient's right, j to the front,
k upwards. Results are written on the grid that the file itself has: its own axis order, affine, qform and sform codes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hf_binaryformer.pipelines import dicom, itk, mgh, nifti
from hf_binaryformer.pipelines.grids import (
    SAME_GRID_TOLERANCE,
    VolumeError,
    affine_spacing,
    check_extent,
    check_shape,
    grid_distance,
    resample,
    resample_to,
)
from hf_binaryformer.pipelines.label_values import label_numbers
from hf_binaryformer.pipelines.whole_files import ChangedError, unchanged, whole_file

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Header, Nifti1Image

__all__ = [
    "Volume",
    "VolumeError",
    "VolumeSource",
    "check_output_path",
    "check_same_grid",
    "read_volume",
    "resample",
    "resample_to",
    "volume_from_image",
    "write_image",
    "write_labels",
]

NIFTI_SUFFIXES = (".nii", ".nii.gz")
ITK_SUFFIXES = (".mha", ".mhd", ".nrrd")
MGH_SUFFIXES = (".mgz", ".mgh")
DICOM_SUFFIXES = (".dcm", ".ima")
# Of files that hold one volume.
VOLUME_SUFFIXES = (*NIFTI_SUFFIXES, *ITK_SUFFIXES, *MGH_SUFFIXES)
OUTPUT_SUFFIXES = (*NIFTI_SUFFIXES, ".mha", ".nrrd")
# A voxel that fills less than this share of the box of the same edge lengths is flat.
MIN_VOXEL_FILL = 1e-3

Kind = Literal["nifti", "itk", "mgh", "dicom"]


@dataclass(frozen=True, eq=False)
class VolumeSource:
    """Where a volume came from, and what is needed to write on its own grid.

    Args:
        path: file or folder; None for an image made in memory.
        kind: "nifti", "itk", "mgh" or "dicom".
        shape: (I, J, K) in the file's own axis order.
        affine: (4, 4) of that order, voxel to mm, RAS+.
        orientation: (3, 2) nibabel orientation of that order: the RAS axis that each axis runs along, and its sign.
        header: NIfTI header, with its qform, sform, codes and units; None for the other kinds.
    """

    path: Path | None
    kind: Kind
    shape: tuple[int, ...]
    affine: np.ndarray
    orientation: np.ndarray
    header: Nifti1Header | None = None


@dataclass(frozen=True, eq=False)
class Volume:
    """A 3D image or label map in the closest canonical orientation.

    Args:
        array: (I, J, K), RAS order; float32 for images, int32 for labels.
        affine: (4, 4) of ``array``, voxel to mm, RAS+.
        source: where it came from.
        notes: what the reader had to choose or repair, in sentences to be told to whoever gave the file.
        exact: ``array`` in float64, for an image that was read with ``exact=True`` and that float32 would change.
    """

    array: np.ndarray
    affine: np.ndarray
    source: VolumeSource
    notes: tuple[str, ...] = ()
    exact: np.ndarray | None = None

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size along I, J, K in mm."""
        return affine_spacing(self.affine)

    @property
    def name(self) -> str:
        """Path of the file, for messages."""
        return str(self.source.path or "image in memory")


def read_volume(path: str | os.PathLike[str], *, labels: bool = False, exact: bool = False) -> Volume:
    """Read one 3D volume.

    Args:
        path: .nii, .nii.gz, .mha, .mhd, .nrrd, .mgz, .mgh, a folder that holds one DICOM series, or any file of a DICOM
            series; a multi-frame DICOM file (enhanced MR or CT) is a volume of its own. All but NIfTI and FreeSurfer's
            .mgz and .mgh need the extra ``dicom``.
        labels: the file holds label numbers, at least 0, which may be all equal; values within 0.01 of whole numbers are
            rounded, and the volume's notes say so.
        exact: for a result that repeats the file's own values outside a mask: NaN and infinite values are let through,
            and what float32 would change is in ``Volume.exact``, unless the file scales its numbers.

    Raises:
        VolumeError: the file is missing, of another kind, truncated, damaged or written to meanwhile; it holds no or more
            than one volume, colours, complex numbers, NaN or Inf, one intensity only, or labels that are no whole numbers;
            it has no usable geometry; DICOM slices are missing, doubled, turned against each other, of several sizes or
            tiled in one image.
        ImportError: SimpleITK or pydicom is needed and not installed.

    Example:
        >>> volume = read_volume("head.nii.gz")
        >>> volume.array.shape, volume.spacing
        ((176, 256, 256), (1.0, 1.0, 1.0))
    """
    path = Path(path)
    if not path.exists():
        raise VolumeError(f"{path} does not exist, expected a volume file or a DICOM folder: check the name")
    try:
        with unchanged(path):
            return _read(path, labels=labels, exact=exact)
    except ChangedError as error:
        raise VolumeError(str(error)) from error


def _read(path: Path, *, labels: bool, exact: bool) -> Volume:
    suffix = _suffix(path)
    if path.is_dir() or suffix in DICOM_SUFFIXES:
        array, affine = dicom.read_dicom(path)
        return _canonical(array, affine, labels=labels, exact=exact, path=path, kind="dicom")
    if suffix in NIFTI_SUFFIXES:
        return volume_from_image(nifti.read_file(path), path=path, labels=labels, exact=exact)
    if suffix in ITK_SUFFIXES:
        array, affine = itk.read_file(path)
        return _canonical(array, affine, labels=labels, exact=exact, path=path, kind="itk")
    if suffix in MGH_SUFFIXES:
        array, affine, notes = mgh.read_file(path)
        return _canonical(array, affine, labels=labels, exact=exact, path=path, kind="mgh", notes=notes)
    if dicom.is_dicom(path):
        array, affine = dicom.read_dicom(path)
        return _canonical(array, affine, labels=labels, exact=exact, path=path, kind="dicom")
    expected = ", ".join((*VOLUME_SUFFIXES, *DICOM_SUFFIXES))
    raise VolumeError(f"{path} ends in '{path.suffix}', expected {expected} or a DICOM folder: convert it first")


def volume_from_image(
    image: Nifti1Image, *, labels: bool = False, exact: bool = False, path: str | os.PathLike[str] | None = None
) -> Volume:
    """The same as :func:`read_volume` for a NIfTI image that nibabel holds.

    Raises:
        VolumeError: as for :func:`read_volume`.
    """
    path = None if path is None else Path(path)
    own_type = labels or (exact and not nifti.is_scaled(image))
    array, affine, notes = nifti.image_values(path or "image in memory", image, own_type=own_type)
    options = {"labels": labels, "exact": exact, "header": image.header.copy(), "notes": notes}
    return _canonical(array, affine, path=path, kind="nifti", **options)


def write_labels(
    path: str | os.PathLike[str],
    labels_ras: np.ndarray,
    like: Volume,
    *,
    label_names: Mapping[int, str] | None = None,
    description: str = "",
) -> Path:
    """Write labels on the grid of the file that ``like`` was read from; the file appears whole or not at all.

    Args:
        path: .nii, .nii.gz, .mha or .nrrd (the last two need the extra ``dicom``).
        labels_ras: whole numbers of at least 0 in the shape of ``like.array``; stored as uint8, uint16 or uint32, the
            smallest that holds them.
        like: the volume that was labelled.
        label_names: written into a NIfTI comment extension, as JSON; other formats do not keep them.
        description: NIfTI's description, cut to 79 bytes; other formats do not keep it.

    Returns:
        The path.

    Raises:
        VolumeError: shape, values, suffix or folder are wrong, or ``path`` is the input itself.
    """
    labels_ras = np.asarray(labels_ras)
    if labels_ras.dtype.kind not in "iub":
        raise VolumeError(f"labels have dtype {labels_ras.dtype}, expected whole numbers: round them first")
    if labels_ras.shape != like.array.shape:
        raise _wrong_shape(labels_ras, like)
    low, high = int(labels_ras.min()), int(labels_ras.max())
    if low < 0 or high > np.iinfo(np.uint32).max:
        raise VolumeError(f"labels range from {low} to {high}, expected 0 to {np.iinfo(np.uint32).max}: renumber them")
    options = {"label_names": label_names, "description": description, "intent": "label"}
    return _write(path, labels_ras, like, np.min_scalar_type(high), options)


def write_image(path: str | os.PathLike[str], array_ras: np.ndarray, like: Volume, *, description: str = "") -> Path:
    """Write intensities as float32, or float64 if that is what they are, on the grid of the file that ``like`` was read from.

    Args:
        path: as for :func:`write_labels`.
        array_ras: (I, J, K), or (C, I, J, K), which becomes a NIfTI with C as its fourth axis.
        like: the volume whose grid it is.
        description: NIfTI's description, cut to 79 bytes.

    Returns:
        The path.

    Raises:
        VolumeError: shape, suffix or folder are wrong, or ``path`` is the input itself.
    """
    array_ras = np.asarray(array_ras)
    dtype = np.dtype(np.float64 if array_ras.dtype == np.float64 else np.float32)
    return _write(path, array_ras, like, dtype, {"description": description})


def check_output_path(path: str | os.PathLike[str], like: Volume | None = None) -> Path:
    """Refuse, before any work is done, a path that results cannot be written to.

    Raises:
        VolumeError: the suffix is none of the output formats', the folder does not exist, it is the input itself or a
            link to nothing, or the format cannot store the grid of ``like``.
    """
    path = Path(path)
    if _suffix(path) not in OUTPUT_SUFFIXES:
        raise VolumeError(f"{path} ends in '{path.suffix}', expected {', '.join(OUTPUT_SUFFIXES)}: choose one of them")
    if not path.parent.is_dir():
        raise VolumeError(f"the folder {path.parent} does not exist, expected one to write into: create it first")
    if path.is_dir():
        raise VolumeError(f"{path} is a folder, expected the name of a file: add one")
    if path.is_symlink() and not path.exists():
        raise VolumeError(f"{path} is a link to {path.readlink()}, which does not exist: remove it")
    if like is not None and _suffix(path) not in NIFTI_SUFFIXES:
        itk.check_right_angles(path, like.source.affine)
    source = like.source.path if like is not None else None
    if source is not None and path.exists() and source.exists() and path.samefile(source):
        raise VolumeError(f"{path} is the input itself, expected another file: choose another name")
    return path


def check_same_grid(a: Volume, b: Volume) -> None:
    """Refuse two volumes that do not lie on one grid, after both were brought to canonical orientation.

    Raises:
        VolumeError: shapes differ, or voxels lie apart.
    """
    if a.array.shape != b.array.shape:
        raise VolumeError(
            f"{a.name} has shape {a.array.shape}, {b.name} {b.array.shape} (in RAS order), expected the same grid: "
            f"resample one onto the other"
        )
    apart = grid_distance(a.affine, b.affine, a.array.shape)
    if apart > SAME_GRID_TOLERANCE:
        raise VolumeError(
            f"{a.name} and {b.name} have one shape, but lie up to {apart:.3g} voxels apart, expected the same grid: "
            f"resample one onto the other. Affines (RAS): {a.affine.tolist()} and {b.affine.tolist()}"
        )


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def _canonical(
    array: np.ndarray,
    affine: np.ndarray,
    *,
    labels: bool,
    exact: bool,
    path: Path | None,
    kind: Kind,
    header: Nifti1Header | None = None,
    notes: Sequence[str] = (),
) -> Volume:
    """Check values and geometry, and turn the array into RAS order."""
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

    name = path or "image in memory"
    check_shape(name, array.shape)
    array = array.reshape(array.shape[:3])
    edges = float(np.prod(affine_spacing(affine)))
    if not np.isfinite(affine).all() or not abs(np.linalg.det(affine[:3, :3])) > MIN_VOXEL_FILL * edges:
        raise VolumeError(
            f"{name} has the affine {affine.tolist()}, expected one that spans a volume: repair its header"
        )
    check_extent(name, array.shape, affine)
    orientation = io_orientation(affine)
    source = VolumeSource(path, kind, array.shape, affine, orientation, header)
    own, repaired = (array, ()) if not labels else label_numbers(name, array)
    array = own if labels else _checked_image(name, own, finite=not exact)
    changed = exact and not np.array_equal(array, own, equal_nan=True)
    ras, precise = (np.ascontiguousarray(apply_orientation(a, orientation)) for a in (array, own))
    affine = affine @ inv_ornt_aff(orientation, array.shape)
    return Volume(
        ras,
        affine,
        source,
        (*(f"{name}: {note}" for note in notes), *repaired),
        precise.astype(np.float64) if changed else None,
    )


def _checked_image(name: object, array: np.ndarray, *, finite: bool = True) -> np.ndarray:
    with np.errstate(over="ignore"):
        array = array.astype(np.float32, copy=False)
    low, high = float(array.min()), float(array.max())
    if not finite:
        return array
    # NaN survives min and max, so both are finite if and only if every voxel is.
    if not np.isfinite(low) or not np.isfinite(high):
        nan, inf = int(np.isnan(array).sum()), int(np.isinf(array).sum())
        raise VolumeError(
            f"{name} has {nan} NaN and {inf} infinite voxels of {array.size}, expected finite float32 values: repair "
            f"the export, or replace them (numpy.nan_to_num) where they lie outside the body"
        )
    if low == high:
        raise VolumeError(
            f"{name} is empty: all {array.size} voxels are {low:g}, expected an image with contrast: export it again"
        )
    return array


def _wrong_shape(array: np.ndarray, like: Volume) -> VolumeError:
    return VolumeError(
        f"the array has shape {array.shape}, expected {like.array.shape}, that of {like.name} in RAS order: "
        f"bring it to that grid first"
    )


def _write(
    path: str | os.PathLike[str], ras: np.ndarray, like: Volume, dtype: np.dtype, nifti_options: dict[str, Any]
) -> Path:
    from nibabel.orientations import apply_orientation, axcodes2ornt, ornt_transform

    path = check_output_path(path, like)
    if ras.ndim not in (3, 4) or ras.shape[-3:] != like.array.shape:
        raise _wrong_shape(ras, like)
    as_nifti = _suffix(path) in NIFTI_SUFFIXES
    if ras.ndim == 4 and not as_nifti:
        raise VolumeError(f"the array has shape {ras.shape}, {path.suffix} takes (I, J, K): write .nii.gz")
    back = ornt_transform(axcodes2ornt("RAS"), like.source.orientation)
    own = apply_orientation(ras if ras.ndim == 3 else np.moveaxis(ras, 0, -1), back)

    with whole_file(path) as temporary:
        if as_nifti:
            nifti.write_file(temporary, own, like.source.affine, like.source.header, dtype=dtype, **nifti_options)
        else:
            itk.write_file(temporary, own.astype(dtype), like.source.affine)
    return path
