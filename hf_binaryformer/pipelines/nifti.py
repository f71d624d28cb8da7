"""Reading and writing with nibabel: NIfTI-1 and NIfTI-2 in one file, plain or compressed."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_binaryformer.pipelines.grids import VolumeError, check_shape

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Header, Nifti1Image

MM_PER_UNIT = {"meter": 1000.0, "micron": 0.001}
# The descrip field holds 80 bytes, the last of them 0.
DESCRIPTION_BYTES = 79


def read_file(path: Path) -> Nifti1Image:
    """The image, with all of a compressed file already unpacked and its checksum verified."""
    import nibabel as nib
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    try:
        image: Any = nib.load(path)
        if not isinstance(image, nib.Nifti1Image):
            raise VolumeError(f"{path} holds a {type(image).__name__}, expected a NIfTI volume: convert it first")
        check_shape(path, image.shape)
        if path.name.lower().endswith(".gz"):
            # nibabel stops reading at the last voxel and does not reach the checksum behind it.
            with gzip.open(path) as file:
                image = type(image).from_bytes(file.read())
    except VolumeError:
        raise
    except (ImageFileError, HeaderDataError, EOFError, OSError, ValueError, zlib.error) as error:
        raise damaged(path, error) from error
    return image


def image_values(name: object, image: Nifti1Image, *, labels: bool) -> tuple[np.ndarray, np.ndarray]:
    """Array (float32, or the file's own type for labels) and affine in mm."""
    dtype = image.get_data_dtype()
    if dtype.kind not in "iufb":
        kind = "complex numbers" if dtype.kind == "c" else "colours"
        raise VolumeError(f"{name} holds {kind} ({dtype}), expected one real number for each voxel: make it grey first")
    check_shape(name, image.shape)
    try:
        # What float32 cannot hold becomes Inf, which the caller refuses.
        with np.errstate(over="ignore"):
            array = np.asanyarray(image.dataobj) if labels else np.asanyarray(image.dataobj, dtype=np.float32)
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise damaged(name, error) from error
    affine = np.array(image.affine, dtype=np.float64)
    affine[:3] *= MM_PER_UNIT.get(image.header.get_xyzt_units()[0], 1.0)
    return array, affine


def write_file(
    path: Path,
    array: np.ndarray,
    affine: np.ndarray,
    header: Nifti1Header | None,
    *,
    dtype: np.dtype,
    label_names: Mapping[int, str] | None = None,
    description: str = "",
    intent: str = "none",
) -> None:
    """Write (I, J, K) or (I, J, K, C), converted to ``dtype`` on the way.

    Geometry, codes and units are those of ``header``. Without a header, the geometry is ``affine``, the code "scanner"
    and the unit mm.
    """
    from nibabel.nifti1 import Nifti1Extension, Nifti1Image
    from nibabel.nifti2 import Nifti2Header, Nifti2Image

    image: Nifti1Image
    if header is None:
        image = Nifti1Image(array, affine, dtype=dtype)
        image.set_qform(affine, code="scanner")
        image.set_sform(affine, code="scanner")
        image.header.set_xyzt_units("mm")
    else:
        header = header.copy()
        header.extensions.clear()
        header["cal_min"], header["cal_max"], header["aux_file"] = 0, 0, b""
        # The affine that the header itself states leaves its qform, sform and codes as they are.
        kind = Nifti2Image if isinstance(header, Nifti2Header) else Nifti1Image
        image = kind(array, header.get_best_affine(), header, dtype=dtype)
    image.header.set_slope_inter(1, 0)
    image.header.set_intent(intent)
    image.header["descrip"] = description.encode("ascii", "replace")[:DESCRIPTION_BYTES]
    if label_names is not None:
        names = json.dumps({str(label): name for label, name in label_names.items()})
        image.header.extensions.append(Nifti1Extension("comment", names.encode()))
    image.to_filename(path)


def damaged(name: object, error: Exception) -> VolumeError:
    """The error for a file that cannot be read to its end."""
    return VolumeError(f"{name} is truncated or damaged ({error}), expected a complete file: fetch or export it again")
