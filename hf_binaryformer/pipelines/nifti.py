"""Reading and writing with nibabel: NIfTI-1 and NIfTI-2 in one file, plain or compressed."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from hf_binaryformer.pipelines.grids import (
    MAX_COMPRESSION,
    MAX_VOXELS,
    VolumeError,
    affine_spacing,
    check_shape,
    grid_distance,
)

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Header, Nifti1Image

MM_PER_UNIT = {"meter": 1000.0, "micron": 0.001}
# The descrip field holds 80 bytes, the last of them 0.
DESCRIPTION_BYTES = 79
GZIP_MAGIC = b"\x1f\x8b"
# Quaternions that round to more than a unit length by no more than this are taken as of unit length.
QUATERNION_TOLERANCE = 1e-5
QUATERNION_ROUNDING = 1e-7
# qform and sform agree if no corner of the grid lies further apart, in voxels.
SAME_FORM_TOLERANCE = 0.1


def read_file(path: Path) -> Nifti1Image:
    """The image, with all of the file already unpacked and, if it is compressed, its checksum verified.

    What the file holds decides whether it is unpacked, not whether its name ends in .gz.

    Raises:
        VolumeError: the file is not NIfTI, damaged, shorter than its header says, or too large.
    """
    with parsing(path), unpacked(path) as (file, available):
        image_class, header = _read_header(path, file)
        claimed = int(header["vox_offset"]) + math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize
        if claimed > available:
            raise EOFError(f"its header asks for {claimed} bytes, the file has at most {available}")
        size = header.template_dtype.itemsize
        file.seek(size)
        content = header.binaryblock + file.read(claimed - size)
        # The checksum stands behind the last voxel.
        while file.read(2**20):
            pass
        if len(content) < claimed:
            raise EOFError(f"its header asks for {claimed} bytes, the file has {len(content)}")
        image: Nifti1Image = image_class.from_bytes(content)
    return image


@contextmanager
def unpacked(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The content of a file that may be compressed with gzip, and how many bytes it can have at most."""
    with path.open("rb") as file:
        compressed = file.read(2) == GZIP_MAGIC
    opener: Any = gzip.open if compressed else open
    with opener(path, "rb") as file:
        yield file, path.stat().st_size * (MAX_COMPRESSION if compressed else 1)


@contextmanager
def parsing(name: object) -> Iterator[None]:
    """Turns whatever nibabel and gzip raise over a damaged file into one message.

    Raises:
        VolumeError: the file is damaged, or the block raised it.
    """
    try:
        yield
    except (VolumeError, ImportError, MemoryError):
        raise
    except Exception as error:
        # nibabel converts a field when it is asked for: an unknown code is a KeyError, a NaN a ValueError, and so on.
        raise damaged(name, error) from error


def _read_header(path: Path, file: BinaryIO) -> tuple[type[Nifti1Image], Nifti1Header]:
    """The class of a NIfTI file, and its header, with small faults repaired."""
    import nibabel as nib

    start = file.read(nib.Nifti2Header.template_dtype.itemsize)
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        header_class = kind.header_class
        if not header_class.may_contain_header(start):
            continue
        header = header_class(start[: header_class.template_dtype.itemsize], check=False)
        shape = header.get_data_shape()
        check_voxels(path, shape)
        if not header["pixdim"][1:4].all() and header["sform_code"] == 0:
            raise VolumeError(
                f"{path} has voxels of {' x '.join(f'{n:g}' for n in header['pixdim'][1:4])} mm, expected sizes above "
                f"0: repair pixdim in its header"
            )
        quaternion = [f"quatern_{axis}" for axis in "bcd"]
        length = math.sqrt(sum(float(header[name]) ** 2 for name in quaternion))
        if 1 < length < 1 + QUATERNION_TOLERANCE:
            for name in quaternion:
                header[name] *= (1 - QUATERNION_ROUNDING) / length
        return kind, header
    raise damaged(path, ValueError("it does not start with the header of a NIfTI volume"))


def check_voxels(path: Path, shape: Sequence[int]) -> None:
    """Refuse, before voxels are read, a header that claims another kind of shape, or too many voxels.

    Raises:
        VolumeError: it does.
    """
    check_shape(path, shape)
    if min(shape) < 0 or math.prod(shape) > MAX_VOXELS:
        raise VolumeError(f"{path} has shape {shape}, expected at most {MAX_VOXELS} voxels: export it again")


def header_affine(header: Nifti1Header, shape: Sequence[int]) -> tuple[np.ndarray, list[str]]:
    """The affine in mm, and notes where the header leaves a choice.

    The sform is used if it has a code, then the qform, as nibabel does; but an sform that is the identity matrix is a
    placeholder and gives way to a qform.
    """
    unit = MM_PER_UNIT.get(header.get_xyzt_units()[0], 1.0)
    to_mm = np.diag([unit, unit, unit, 1.0])
    sform, qform = (form(coded=True)[0] for form in (header.get_sform, header.get_qform))
    affine = np.array(header.get_best_affine(), dtype=np.float64)
    if sform is None and qform is None:
        return to_mm @ affine, [
            "neither sform nor qform has a code, so that left and right are not known: the first axis is taken to run "
            "to the left, as nibabel does"
        ]
    if sform is None or qform is None:
        return to_mm @ affine, []
    apart = grid_distance(qform, sform, shape[:3])
    if apart <= SAME_FORM_TOLERANCE:
        return to_mm @ affine, []
    used, why = ("sform", "")
    if np.array_equal(sform, np.eye(4)):
        affine, used, why = np.array(qform, dtype=np.float64), "qform", ", as the sform is only the identity matrix"
    mm = apart * min(affine_spacing(qform)) * unit
    return to_mm @ affine, [f"sform and qform lie up to {mm:.3g} mm apart; the {used} is used{why}"]


def is_scaled(image: Nifti1Image) -> bool:
    """Whether the values are stored numbers times a slope, plus an intercept."""
    return (getattr(image.dataobj, "slope", 1), getattr(image.dataobj, "inter", 0)) != (1, 0)


def image_values(name: object, image: Nifti1Image, *, own_type: bool) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Array (float32, or the type that the file's values have), affine in mm, and notes on the geometry."""
    dtype = image.get_data_dtype()
    if dtype.kind not in "iufb":
        kind = "complex numbers" if dtype.kind == "c" else "colours"
        raise VolumeError(f"{name} holds {kind} ({dtype}), expected one real number for each voxel: make it grey first")
    check_shape(name, image.shape)
    with parsing(name):
        # What float32 cannot hold becomes Inf, which the caller refuses.
        with np.errstate(over="ignore"):
            array = np.asanyarray(image.dataobj) if own_type else np.asanyarray(image.dataobj, dtype=np.float32)
        affine, notes = header_affine(image.header, image.shape)
    return array, affine, notes


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
