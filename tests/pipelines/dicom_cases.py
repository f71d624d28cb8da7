"""DICOM files with known pixels, and where DICOM's own formula (PS3.3, C.7.6.2.1.1) puts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

# The geometry that every case has unless it says otherwise; mm, LPS. BETWEEN_ROWS is PixelSpacing's first number.
ALONG_ROW, ALONG_COLUMN = np.array([0.8, 0.6, 0.0]), np.array([-0.6, 0.8, 0.0])
BETWEEN_ROWS, BETWEEN_COLUMNS = 1.5, 0.75
FIRST = np.array([-40.0, 25.0, 60.0])
UPWARDS = (0.0, 0.0, 2.0)

ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"
ENHANCED_CLASSES = {
    "enhanced MR": ENHANCED_MR,
    "enhanced CT": "1.2.840.10008.5.1.4.1.1.2.1",
    "legacy converted enhanced MR": "1.2.840.10008.5.1.4.1.1.4.4",
    "legacy converted enhanced CT": "1.2.840.10008.5.1.4.1.1.2.2",
}


def position_of(k: float, step: Sequence[float] = UPWARDS) -> np.ndarray:
    """ImagePositionPatient of slice k."""
    return np.round(FIRST + k * np.asarray(step), 6)


def ras_affine(step: Sequence[float] = UPWARDS) -> np.ndarray:
    """Affine for (column, row, slice), RAS: DICOM's formula, in which x and y change their signs."""
    lps = np.eye(4)
    lps[:3, :3] = np.column_stack([ALONG_ROW * BETWEEN_COLUMNS, ALONG_COLUMN * BETWEEN_ROWS, step])
    lps[:3, 3] = FIRST
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps


def write_dicom(
    folder: Path,
    array: np.ndarray,
    *,
    step: tuple[float, float, float] = (0.6, -0.8, 2.0),
    uid: str = "1.2.826.0.1.3680043.8.498.1",
    skip: Sequence[int] = (),
    each: Mapping[int, Mapping[str, object]] | None = None,
    prefix: str | None = None,
    **tags: object,
) -> np.ndarray:
    """A classic series of (rows, columns, slices); returns its affine for (column, row, slice), RAS.

    ``tags`` are set in every slice, ``each[k]`` in slice k. A tag that is None is left out; one that may be signed or
    unsigned is a pair: ("SS" or "US", value).
    """
    pydicom = pytest.importorskip("pydicom")
    folder.mkdir(exist_ok=True)
    for k in range(array.shape[2]):
        if k in skip:
            continue
        # Anew for each slice, or a tag of one would stay in the next.
        slice_ = pydicom.dcmread(pydicom.data.get_testdata_file("MR_small.dcm"))
        slice_.Rows, slice_.Columns = array.shape[:2]
        slice_.PixelData = np.ascontiguousarray(array[:, :, k], dtype="<i2").tobytes()
        slice_.PixelSpacing = [BETWEEN_ROWS, BETWEEN_COLUMNS]
        slice_.ImageOrientationPatient = [*ALONG_ROW.tolist(), *ALONG_COLUMN.tolist()]
        slice_.ImagePositionPatient = position_of(k, step).tolist()
        slice_.SeriesInstanceUID = uid
        slice_.SeriesDescription = f"series {uid[-1]}"
        slice_.InstanceNumber = 100 - k
        slice_.SliceThickness = 99.0  # not the distance of the slices
        for name, value in {**tags, **(each or {}).get(k, {})}.items():
            if value is None:
                delattr(slice_, name)
            elif isinstance(value, tuple):
                slice_.add_new(name, *value)
            else:
                setattr(slice_, name, value)
        # File names run against the order of the slices.
        name = f"{prefix or uid[-1]}_{(k * 7) % 11:02d}.dcm"
        slice_.SOPInstanceUID = slice_.file_meta.MediaStorageSOPInstanceUID = f"{uid}.{len(list(folder.iterdir())) + 1}"
        slice_.save_as(folder / name)
    return ras_affine(step)


def groups(**attributes: object) -> object:
    """A functional group: each attribute in the macro that DICOM puts it into (PS3.3, C.7.6.16 and C.8.13)."""
    pydicom = pytest.importorskip("pydicom")
    macro_of = {
        "ImagePositionPatient": "PlanePositionSequence",
        "ImageOrientationPatient": "PlaneOrientationSequence",
        "PixelSpacing": "PixelMeasuresSequence",
        "SliceThickness": "PixelMeasuresSequence",
        "RescaleSlope": "PixelValueTransformationSequence",
        "RescaleIntercept": "PixelValueTransformationSequence",
        "EffectiveEchoTime": "MREchoSequence",
        "DiffusionBValue": "MRDiffusionSequence",
        "TemporalPositionIndex": "FrameContentSequence",
        "StackID": "FrameContentSequence",
        "FrameType": "MRImageFrameTypeSequence",
    }
    group = pydicom.Dataset()
    for name, value in attributes.items():
        if macro_of[name] not in group:
            setattr(group, macro_of[name], [pydicom.Dataset()])
        setattr(group[macro_of[name]].value[0], name, value)
    return group


# What all frames share unless a case says otherwise. The thickness is not the distance of the slices.
SHARED = {
    "ImageOrientationPatient": [*ALONG_ROW.tolist(), *ALONG_COLUMN.tolist()],
    "PixelSpacing": [BETWEEN_ROWS, BETWEEN_COLUMNS],
    "SliceThickness": 99.0,
}


def write_multiframe(
    path: Path,
    pixels: np.ndarray,
    frames: Sequence[Mapping[str, object]] | None,
    *,
    shared: Mapping[str, object] = SHARED,
    sop_class: str = ENHANCED_MR,
    uid: str = "1.2.826.0.1.3680043.8.498.7",
    **tags: object,
) -> Path:
    """A multi-frame file of (frames, rows, columns) whose functional groups hold ``frames`` and ``shared``."""
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, f"{uid}.{int.from_bytes(path.stem.encode()) % 10**9}"
    dataset.SeriesInstanceUID, dataset.StudyInstanceUID, dataset.Modality = uid, f"{uid}.0", "MR"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = np.ascontiguousarray(pixels, dtype=f"<{pixels.dtype.kind}2").tobytes()
    if frames is not None:
        dataset.SharedFunctionalGroupsSequence = [groups(**shared)]
        dataset.PerFrameFunctionalGroupsSequence = [groups(**frame) for frame in frames]
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def placed(k: float, **attributes: object) -> dict[str, object]:
    """The functional groups of a frame that lies where slice k does."""
    return {"ImagePositionPatient": position_of(k).tolist(), **attributes}
