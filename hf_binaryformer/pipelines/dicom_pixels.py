"""The values of DICOM frames: what is stored, without padding, rescaled frame by frame."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_binaryformer.pipelines.dicom_frames import Frame, read_dataset, reading
from hf_binaryformer.pipelines.grids import MAX_COMPRESSION, check_claim
from hf_binaryformer.pipelines.itk import require, unreadable

if TYPE_CHECKING:
    from pydicom import Dataset

# All that describes how pixels are stored. Rescaling is left out: ITK would apply it, and not frame by frame.
STORAGE = (
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelData",
)
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
# Tags of an item and of what follows the last one, as stored.
ITEM, LAST_ITEM = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
# Frames without content, which JPEG compresses most, need more than this share of their size with all headers.
MAX_PIXEL_COMPRESSION = 10_000
# float32 holds every whole number of so many bits.
FLOAT32_BITS = 24


def frame_values(frames: Sequence[Frame]) -> np.ndarray:
    """Values of the frames: slope · stored value + intercept, each frame with its own.

    Pixels that the file calls padding were not measured. They take the lowest value that was, or 0 if that is lower, so
    that they count as background.

    Args:
        frames: of one shape; they become the last axis, in their order.

    Returns:
        (columns, rows, frames) float32, or float64 where float32 would round what is stored.

    Raises:
        VolumeError: a file has no pixels, or is truncated or damaged.
    """
    rows, columns = frames[0].shape
    exact = np.float64 if max(frame.bits for frame in frames) > FLOAT32_BITS else np.float32
    of_file: dict[Path, list[int]] = {}
    for k, frame in enumerate(frames):
        of_file.setdefault(frame.file, []).append(k)
    values, measured = np.empty(0, dtype=exact), np.empty(0, dtype=bool)
    for file, ks in of_file.items():
        stored, inside = _stored_values(file)
        if not values.size:
            # Not before the pixels of one file are there: what headers say alone may be more than memory holds.
            values = np.empty((columns, rows, len(frames)), dtype=exact)
            measured = np.ones(values.shape, dtype=bool)
        for k in ks:
            frame = frames[k]
            # What float32 cannot hold becomes Inf, which the caller refuses.
            with np.errstate(over="ignore"):
                values[:, :, k] = (stored[frame.index] * np.float64(frame.slope) + frame.intercept).T
            measured[:, :, k] = inside[frame.index].T
    if not measured.all():
        values[~measured] = min(0, values.min(where=measured, initial=np.inf))
    return values


def _stored_values(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Stored numbers of all frames, (frames, rows, columns), and where they are no padding."""
    with reading(file):
        dataset: Any = read_dataset(file)
        if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise unreadable(file, ValueError("it has no pixel data"))
        if "TransferSyntaxUID" not in dataset.file_meta:
            # Files from before 1993 and bare network messages do not name their encoding; pydicom has recognised it.
            dataset.file_meta.TransferSyntaxUID = _encoding(dataset)
        syntax = dataset.file_meta.TransferSyntaxUID
        compressed = syntax.is_encapsulated
        packing = MAX_PIXEL_COMPRESSION if compressed else MAX_COMPRESSION if syntax.is_deflated else 1
        shape = (int(dataset.get("NumberOfFrames") or 1), dataset.Rows, dataset.Columns)
        check_claim(file, shape, dataset.BitsAllocated / 8, file.stat().st_size * packing)
        stored = _decompressed(dataset) if compressed else dataset.pixel_array
        stored = stored.reshape(-1, dataset.Rows, dataset.Columns)
        return stored, _measured(dataset, stored)


def _measured(dataset: Dataset, stored: np.ndarray) -> np.ndarray:
    """Where stored values are none of the padding values that the file names."""
    if dataset.get("PixelPaddingValue") is None or stored.dtype.kind not in "iu":
        return np.ones(stored.shape, dtype=bool)
    padding = dataset.PixelPaddingValue
    limit = dataset.get("PixelPaddingRangeLimit")
    # Signed padding is often written as an unsigned number, and wraps round to what it means.
    low, high = np.sort(np.array([padding, padding if limit is None else limit]).astype(stored.dtype))
    return (stored < low) | (stored > high)


def _encoding(dataset: Dataset) -> Any:
    uid = require("pydicom").uid
    implicit, little = dataset.original_encoding
    if implicit:
        return uid.ImplicitVRLittleEndian
    return uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian


def _check_fragments(pixels: bytes) -> None:
    """Refuse compressed pixels (DICOM PS3.5 A.4) whose items do not end where the next one starts, or the pixels end.

    GDCM takes memory for the length that an item states.

    Raises:
        ValueError: an item is cut, or something else stands in its place.
    """
    at = 0
    while at < len(pixels) and pixels[at : at + 4] != LAST_ITEM:
        length = int.from_bytes(pixels[at + 4 : at + 8], "little")
        if pixels[at : at + 4] != ITEM or at + 8 + length > len(pixels):
            raise ValueError(f"a fragment of its compressed pixels is damaged at byte {at} of {len(pixels)}")
        at += 8 + length


def _decompressed(dataset: Dataset) -> np.ndarray:
    """Stored values of compressed pixels.

    GDCM, within SimpleITK, decodes all kinds of JPEG without further packages, which pydicom does not.
    """
    pydicom, sitk = require("pydicom"), require("SimpleITK")
    _check_fragments(dataset.PixelData)
    bare = pydicom.Dataset()
    for name in STORAGE:
        if name in dataset:
            bare[name] = dataset[name]
    bare.SOPClassUID, bare.SOPInstanceUID = SECONDARY_CAPTURE, "1.2.3"
    bare.file_meta = pydicom.dataset.FileMetaDataset()
    bare.file_meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pixels.dcm"
        bare.save_as(path, enforce_file_format=True)
        return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
