"""A zip of DICOM files, unpacked under names of our own: nothing in the zip decides where a file lands, or how large it is."""

from __future__ import annotations

import re
import stat
import zipfile
import zlib
from pathlib import Path

from hf_binaryformer.app.limits import MB, Limits
from hf_binaryformer.pipelines.dicom import is_dicom
from hf_binaryformer.pipelines.grids import VolumeError

BLOCK = 2**20
ENCRYPTED = 1
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def unpack_dicom(archive: Path, folder: Path, limits: Limits) -> int:
    """Write the DICOM files of a zip into a folder, as 00000.dcm, 00001.dcm, and so on, whatever folders they lay in.

    Args:
        archive: the zip.
        folder: made anew; what else the zip holds is left out.
        limits: sizes as they are counted while unpacking, not as the zip states them.

    Returns:
        Number of DICOM files, at least 1.

    Raises:
        VolumeError: no zip, a damaged or encrypted one, one that leads outside its folder, has links, is too large or
            packed too tightly, or one without DICOM files.
    """
    name = archive.name
    try:
        with zipfile.ZipFile(archive) as content:
            members = [member for member in content.infolist() if not member.is_dir()]
            _check_members(name, members, limits)
            folder.mkdir()
            return _unpack(content, members, archive, folder, limits)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, UnicodeDecodeError) as error:
        raise VolumeError(
            f"'{name}' is no complete zip ({error}), expected a zip of DICOM files: make it again"
        ) from error


def _check_members(name: str, members: list[zipfile.ZipInfo], limits: Limits) -> None:
    if len(members) > limits.zip_files:
        raise VolumeError(f"'{name}' has {len(members)} files, expected at most {limits.zip_files}: zip one series")
    for member in members:
        # Its own spelling, because ZipInfo.filename has been tidied up.
        if _leads_outside(member.orig_filename) or _leads_outside(member.filename):
            raise VolumeError(
                f"'{name}' has a file '{member.orig_filename[:80]}' that leads outside its folder, and is refused: zip the "
                f"series' own folder"
            )
        if stat.S_ISLNK(member.external_attr >> 16):
            raise VolumeError(
                f"'{name}' has a link, '{member.filename[:80]}', and is refused: zip the files themselves"
            )
        if member.flag_bits & ENCRYPTED:
            raise VolumeError(f"'{name}' is encrypted, expected a zip without a password: make it again")
        if member.compress_type not in METHODS:
            raise VolumeError(f"'{name}' is packed by method {member.compress_type}, expected deflate: make it again")


def _leads_outside(name: str) -> bool:
    parts = re.split(r"[/\\]", name)
    return ".." in parts or parts[0] == "" or bool(re.match(r"[A-Za-z]:", name)) or "\0" in name


def _unpack(
    content: zipfile.ZipFile, members: list[zipfile.ZipInfo], archive: Path, folder: Path, limits: Limits
) -> int:
    most = min(limits.unpacked_mb * MB, limits.zip_ratio * archive.stat().st_size)
    total = kept = 0
    for member in members:
        target = folder / f"{kept:05d}.dcm"
        with content.open(member) as source, target.open("wb") as file:
            while block := source.read(BLOCK):
                total += len(block)
                if total > most:
                    raise VolumeError(
                        f"'{archive.name}' unpacks to more than {most / MB:,.1f} MB, expected at most {limits.unpacked_mb} MB "
                        f"and {limits.zip_ratio} times its own size, and is refused: zip one series"
                    )
                file.write(block)
        if is_dicom(target):
            kept += 1
        else:
            target.unlink()
    if not kept:
        raise VolumeError(f"'{archive.name}' holds no DICOM files, expected one series: zip the folder of its slices")
    return kept
