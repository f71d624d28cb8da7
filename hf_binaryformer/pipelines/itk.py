"""Reading and writing with SimpleITK: .mha, .mhd and .nrrd, in nibabel's conventions.

ITK's arrays are (k, j, i) and its space is LPS; here arrays are (I, J, K) and affines RAS+, mm.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from hf_binaryformer.pipelines.grids import VolumeError, affine_spacing
from hf_binaryformer.pipelines.itk_header import check_header

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
# Largest difference of direction cosines from right angles.
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


def unreadable(path: Path, error: Exception) -> VolumeError:
    """The error for a file that a library cannot read to its end."""
    reason = str(error).strip().rpartition("\n")[2]
    return VolumeError(
        f"{path} is truncated, damaged or not of this kind ({reason}), expected a complete file: export it again"
    )


def read_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Array (I, J, K) and affine of an ITK file.

    Raises:
        VolumeError: the file is damaged, or does not hold one real number for each voxel.
    """
    sitk = require("SimpleITK")
    check_header(path)
    try:
        return _array_and_affine(path, sitk.ReadImage(str(path)))
    except RuntimeError as error:
        raise unreadable(path, error) from error


def write_file(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Write (I, J, K) with its RAS+ affine.

    Raises:
        VolumeError: the axes are not at right angles, which these formats cannot store.
    """
    sitk = require("SimpleITK")
    check_right_angles(path, affine)
    lps = LPS_TO_RAS @ affine
    spacing = affine_spacing(lps)
    direction = lps[:3, :3] / spacing
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(spacing)
    image.SetDirection(direction.ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    sitk.WriteImage(image, str(path), useCompression=True)


def check_right_angles(path: Path, affine: np.ndarray) -> None:
    """Refuse a grid that these formats cannot store.

    Raises:
        VolumeError: the axes are not at right angles.
    """
    direction = affine[:3, :3] / affine_spacing(affine)
    if not np.allclose(direction.T @ direction, np.eye(3), atol=DIRECTION_TOLERANCE):
        raise VolumeError(f"the axes are not at right angles, which {path.suffix} cannot store: write .nii.gz")


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
