"""Reading and writing with SimpleITK: .mha, .mhd, .nrrd and DICOM, in nibabel's conventions.

ITK's arrays are (k, j, i) and its space is LPS; here arrays are (I, J, K) and affines RAS+, mm.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from hf_binaryformer.pipelines.grids import VolumeError

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
SERIES_UID, SERIES_DESCRIPTION = "0020|000e", "0008|103e"
IMAGE_POSITION, IMAGE_ORIENTATION = "0020|0032", "0020|0037"
# Largest deviation of slices from even spacing, as a share of their distance; largest difference of direction cosines.
SPACING_TOLERANCE = 0.05
DIRECTION_TOLERANCE = 1e-3


def require(module: str, extra: str = "dicom") -> Any:
    """Import an optional module.

    Raises:
        ImportError: it is not installed; the message names the extra that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this format needs {module}, not found here: pip install hf-binaryformer[{extra}]"
        ) from error


def is_dicom(path: Path) -> bool:
    """Whether a file has DICOM's mark, which follows a preamble of 128 bytes."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Array (I, J, K) and affine of an ITK file."""
    sitk = require("SimpleITK")
    try:
        return _array_and_affine(path, sitk.ReadImage(str(path)))
    except RuntimeError as error:
        raise _unreadable(path, error) from error


def read_dicom(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Array (I, J, K) and affine of the one DICOM series in a folder, or of the series that a file belongs to.

    Raises:
        VolumeError: there is no series or more than one; slices are missing, doubled or rotated against each other; the
            image has colours; or a file is damaged.
    """
    sitk = require("SimpleITK")
    folder = path if path.is_dir() else path.parent
    found = {uid: _series_files(sitk, folder, uid) for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))}
    if path.is_dir():
        if not found:
            raise VolumeError(f"{path} holds no DICOM series, expected one: give the folder of its slices, or a file")
        if len(found) > 1:
            listed = "; ".join(
                f"{uid} ({len(files)} files, {_describe(sitk, files[0])})" for uid, files in found.items()
            )
            raise VolumeError(
                f"{path} holds {len(found)} DICOM series, expected one: give any file of the one you want. {listed}"
            )
        files = next(iter(found.values()))
    else:
        files = next((files for files in found.values() if path.name in {Path(f).name for f in files}), (str(path),))

    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files)
    reader.MetaDataDictionaryArrayUpdateOn()
    try:
        array, affine = _array_and_affine(path, reader.Execute())
    except RuntimeError as error:
        raise _unreadable(path, error) from error
    if len(files) > 1:
        position, orientation = (_tag(reader, len(files), tag) for tag in (IMAGE_POSITION, IMAGE_ORIENTATION))
        affine = _slice_affine(path, affine, position, orientation)
    return array, affine


def write_file(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Write (I, J, K) with its RAS+ affine.

    Raises:
        VolumeError: the axes are not at right angles, which these formats cannot store.
    """
    sitk = require("SimpleITK")
    lps = LPS_TO_RAS @ affine
    spacing = np.sqrt((lps[:3, :3] ** 2).sum(axis=0))
    direction = lps[:3, :3] / spacing
    if not np.allclose(direction.T @ direction, np.eye(3), atol=DIRECTION_TOLERANCE):
        raise VolumeError(f"the axes are not at right angles, which {path.suffix} cannot store: write .nii.gz")
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(spacing.tolist())
    image.SetDirection(direction.ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    sitk.WriteImage(image, str(path), useCompression=True)


def _series_files(sitk: Any, folder: Path, uid: str) -> tuple[str, ...]:
    return sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)


def _describe(sitk: Any, file: str) -> str:
    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    reader.ReadImageInformation()
    text = reader.GetMetaData(SERIES_DESCRIPTION).strip() if reader.HasMetaDataKey(SERIES_DESCRIPTION) else ""
    return f"'{text or 'no description'}', for example {Path(file).name}"


def _unreadable(path: Path, error: RuntimeError) -> VolumeError:
    reason = str(error).strip().rpartition("\n")[2]
    return VolumeError(
        f"{path} is truncated, damaged or not of this kind ({reason}), expected a complete file: export it again"
    )


def _array_and_affine(path: Path, image: Any) -> tuple[np.ndarray, np.ndarray]:
    if image.GetNumberOfComponentsPerPixel() != 1 or "complex" in image.GetPixelIDTypeAsString():
        kind = image.GetPixelIDTypeAsString()
        raise VolumeError(f"{path} holds {kind}, expected one real number for each voxel: make it grey first")
    sitk = require("SimpleITK")
    size = image.GetSize()
    # A fourth axis of length 1 is dropped; the caller refuses any other shape than three axes.
    if len(size) == 4 and size[3] == 1:
        image = image[:, :, :, 0]
    array = sitk.GetArrayFromImage(image).T
    if array.ndim != 3:
        return array, np.eye(4)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return array, LPS_TO_RAS @ affine


def _tag(reader: Any, count: int, tag: str) -> np.ndarray | None:
    """Numbers of a DICOM tag in every slice, (slices, values); None if a slice lacks it."""
    if not all(reader.HasMetaDataKey(index, tag) for index in range(count)):
        return None
    return np.array([[float(v) for v in reader.GetMetaData(index, tag).split("\\")] for index in range(count)])


def _slice_affine(
    path: Path, affine: np.ndarray, position: np.ndarray | None, orientation: np.ndarray | None
) -> np.ndarray:
    """The affine with its third column from the slices' positions.

    ITK does not check these positions, and does not follow them if the slices are tilted.
    """
    if position is None or orientation is None:
        raise VolumeError(f"{path} has slices without a position in space, expected one for each: export it again")
    if np.abs(orientation - orientation[0]).max() > DIRECTION_TOLERANCE:
        raise VolumeError(f"{path} has slices turned against each other, expected one stack: export it without scouts")
    steps = np.diff(position, axis=0)
    mean = steps.mean(axis=0)
    length = float(np.sqrt((mean**2).sum()))
    worst = float(np.sqrt(((steps - mean) ** 2).sum(axis=1)).max())
    if worst > SPACING_TOLERANCE * max(length, 1e-6):
        raise VolumeError(
            f"{path} has {len(position)} slices {length:.3g} mm apart on average and up to {worst:.3g} mm off that, "
            f"expected even steps: slices are missing, or several volumes are mixed; export one complete series"
        )
    result = affine.copy()
    result[:3, 2] = LPS_TO_RAS[:3, :3] @ mean
    result[:3, 3] = LPS_TO_RAS[:3, :3] @ position[0]
    return result
