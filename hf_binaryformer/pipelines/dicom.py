"""DICOM series to arrays: which files belong together.

What a file says of its frames is read in ``dicom_frames.py``, sorted in ``dicom_stack.py``, and the pixels come from
``dicom_pixels.py``. pydicom reads the headers; SimpleITK is only needed for compressed pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from hf_binaryformer.pipelines.dicom_frames import read_dataset, read_frames, reading
from hf_binaryformer.pipelines.dicom_pixels import frame_values
from hf_binaryformer.pipelines.dicom_stack import sorted_stack
from hf_binaryformer.pipelines.grids import VolumeError


class Header(NamedTuple):
    """All that decides which series and which volume a file belongs to; "" for what it does not state."""

    is_image: bool
    series: str
    description: str
    frames: int
    concatenation: str


def is_dicom(path: Path) -> bool:
    """Whether a file has DICOM's mark after a preamble of 128 bytes, or begins as a data set without preamble does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(132)
    return start[128:] == b"DICM" or start[:2] in (b"\2\0", b"\x08\0")


def read_dicom(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The one DICOM series in a folder, or the volume that a file belongs to.

    A file of one frame belongs to the volume of its series in its folder. A multi-frame file is a volume of its own,
    together with the files of its concatenation if it is part of one.

    Returns:
        Array (I, J, K), of axes (column, row, slice), rescaled to the values that the files mean, and its affine (4, 4),
        voxel to mm, RAS+.

    Raises:
        VolumeError: there is no series or more than one; a file is damaged or does not hold grey values of slices whose
            place is known; or its frames are not one complete stack.
        ImportError: pydicom is not installed, or pixels are compressed and SimpleITK is not.
    """
    frames = [frame for file in _volume_files(path) for frame in read_frames(file)]
    frames, affine = sorted_stack(path, frames)
    return frame_values(frames), affine


def _volume_files(path: Path) -> list[Path]:
    """The files of the series in a folder, or of the volume that a file belongs to."""
    if path.is_dir():
        series = _by_series(_image_headers(path))
        if not series:
            raise VolumeError(f"{path} holds no DICOM series, expected one: give the folder of its slices, or a file")
        if len(series) > 1:
            raise VolumeError(
                f"{path} holds {len(series)} DICOM series, expected one: give any file of the one you want. "
                + "; ".join(f"{uid} ({_described(headers)})" for uid, headers in series.items())
            )
        return list(next(iter(series.values())))
    own = _header(path)
    if not own.is_image or (own.frames > 1 and not own.concatenation):
        return [path]
    headers = {**_image_headers(path.parent), path: own}
    if own.concatenation:
        return [file for file, header in headers.items() if header.concatenation == own.concatenation]
    return list(_by_series(headers)[own.series])


def _header(file: Path) -> Header:
    keywords = ["Rows", "SeriesInstanceUID", "SeriesDescription", "NumberOfFrames", "ConcatenationUID"]
    with reading(file):
        dataset = read_dataset(file, stop_before_pixels=True, specific_tags=keywords)
        return Header(
            is_image="Rows" in dataset,
            series=str(dataset.get("SeriesInstanceUID") or ""),
            description=str(dataset.get("SeriesDescription") or ""),
            frames=int(dataset.get("NumberOfFrames") or 1),
            concatenation=str(dataset.get("ConcatenationUID") or ""),
        )


def _image_headers(folder: Path) -> dict[Path, Header]:
    """Headers of the images in a folder; plans, reports, directories and what is not DICOM are passed over."""
    headers = {file: _header(file) for file in sorted(folder.iterdir()) if is_dicom(file)}
    return {file: header for file, header in headers.items() if header.is_image}


def _by_series(headers: dict[Path, Header]) -> dict[str, dict[Path, Header]]:
    series: dict[str, dict[Path, Header]] = {}
    for file, header in headers.items():
        series.setdefault(header.series, {})[file] = header
    return series


def _described(headers: dict[Path, Header]) -> str:
    file, header = next(iter(headers.items()))
    return f"{len(headers)} files, '{header.description or 'no description'}', for example {file.name}"
