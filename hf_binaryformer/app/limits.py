"""What the page accepts, so that one visitor cannot take all memory or disk of the machine."""

from __future__ import annotations

import gzip
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_binaryformer.pipelines.grids import VolumeError
from hf_binaryformer.pipelines.nifti import GZIP_MAGIC, parsing

SUFFIXES = (".nii", ".nii.gz", ".zip")
MB = 10**6
MAX_NAME = 80


@dataclass(frozen=True)
class Limits:
    """Sizes beyond which a file is refused.

    Args:
        upload_mb: of a file as it is uploaded, in units of 10⁶ bytes.
        unpacked_mb: of all files of a zip together, unpacked.
        zip_files: number of files in a zip.
        zip_ratio: unpacked size of a zip divided by its own size; images seldom reach 20.
        voxels: of a volume.
    """

    upload_mb: int = 500
    unpacked_mb: int = 2000
    zip_files: int = 20_000
    zip_ratio: int = 100
    voxels: int = 512**3


def clean_name(name: str) -> str:
    """The last part of a file's name, of at most 80 harmless characters, with its ending."""
    last = re.split(r"[/\\]", name)[-1]
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", last).lstrip("._-") or "scan"
    suffix = suffix_of(plain)
    return plain[: len(plain) - len(suffix)][: MAX_NAME - len(suffix)] + suffix


def suffix_of(name: str) -> str:
    """The ending that says what a file is: ".nii.gz", ".nii", ".zip", or "" for any other."""
    return next((suffix for suffix in (".nii.gz", ".nii", ".zip") if name.lower().endswith(suffix)), "")


def check_upload(path: Path, name: str, limits: Limits) -> None:
    """Refuse a file by its name and size.

    Raises:
        VolumeError: it has another ending, is empty, or is too large.
    """
    if not suffix_of(name):
        raise VolumeError(
            f"'{name}' cannot be read here, expected {', '.join(SUFFIXES)} (DICOM as a .zip): convert it first"
        )
    size = path.stat().st_size
    if size == 0:
        raise VolumeError(f"'{name}' is empty, expected a scan: export it again")
    if size > limits.upload_mb * MB:
        raise VolumeError(
            f"'{name}' has {size / MB:,.0f} MB, expected at most {limits.upload_mb} MB: crop it, or use the command line"
        )


def check_voxels(path: Path, limits: Limits) -> None:
    """Refuse a NIfTI file whose header asks for too many voxels, before it is unpacked.

    Raises:
        VolumeError: it does, or the file is damaged.
    """
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    with parsing(path.name):
        with path.open("rb") as file:
            opener: Any = gzip.open if file.read(2) == GZIP_MAGIC else open
        with opener(path, "rb") as file:
            start = file.read(Nifti2Header.template_dtype.itemsize)
        for kind in (Nifti1Header, Nifti2Header):
            if kind.may_contain_header(start):
                check_shape(
                    path.name, kind(start[: kind.template_dtype.itemsize], check=False).get_data_shape(), limits
                )


def check_shape(name: str, shape: tuple[int, ...], limits: Limits) -> None:
    """Refuse a volume of more than ``limits.voxels`` voxels.

    Raises:
        VolumeError: it has more.
    """
    voxels = 1
    for n in shape:
        voxels *= int(n)
    if voxels > limits.voxels:
        raise VolumeError(
            f"'{name}' has {voxels / 1e6:,.0f} million voxels, shape {tuple(map(int, shape))}, expected at most "
            f"{limits.voxels / 1e6:,.0f} million: crop it, or use the command line"
        )
