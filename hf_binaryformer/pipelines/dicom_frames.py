"""What a DICOM file says of each of its frames: where it lies, how it is rescaled, and what tells it from another.

A classic file holds one frame and describes it directly. A multi-frame file ("enhanced", DICOM PS3.3 C.7.6.16) describes
its frames in functional groups: one group for each frame, and one for what all of them share.
"""

from __future__ import annotations

import io
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hf_binaryformer.pipelines.grids import VolumeError
from hf_binaryformer.pipelines.itk import require, unreadable

if TYPE_CHECKING:
    from pydicom import Dataset

# DICOM's cosines are rounded to a few digits; vectors further than this from unit length or right angles are no axes.
COSINE_TOLERANCE = 1e-2
CONVERT = "convert it with dcm2niix, and give one volume of the result"
SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
# A deflated file may hold so many bytes, and so many for each of its own: empty slices deflate well, and so do bombs.
INFLATED_BYTES, INFLATED_SHARE = 2**28, 100
# Bytes that are inflated at once, to at most 1032 times as many.
INFLATED_PART = 2**14


class Trait(NamedTuple):
    """What may tell frames at one position apart: its name in the plural, its unit, and DICOM's names for it."""

    name: str
    unit: str
    keywords: tuple[str, ...]


# The most telling ones first: those of enhanced files, then those of classic ones.
TRAITS = (
    Trait("echo times", "ms", ("EffectiveEchoTime", "EchoTime")),
    Trait("b-values", "s/mm²", ("DiffusionBValue",)),
    Trait("temporal positions", "", ("TemporalPositionIndex", "TemporalPositionIdentifier")),
    Trait("trigger times", "ms", ("NominalCardiacTriggerDelayTime", "TriggerTime")),
    Trait("inversion times", "ms", ("InversionTimes", "InversionTime")),
    Trait("repetition times", "ms", ("RepetitionTime",)),
    Trait("flip angles", "degrees", ("FlipAngle",)),
    Trait("tube voltages", "kV", ("KVP",)),
    Trait("kernels", "", ("ConvolutionKernel",)),
    Trait("image types", "", ("FrameType", "ImageType")),
    Trait("complex components", "", ("ComplexImageComponent",)),
    Trait("stacks", "", ("StackID",)),
    Trait("acquisition numbers", "", ("FrameAcquisitionNumber", "AcquisitionNumber")),
    Trait("acquisition times", "", ("FrameAcquisitionDateTime", "AcquisitionTime")),
)


@dataclass(frozen=True, eq=False)
class Frame:
    """One image of one slice.

    Args:
        file: where its pixels are.
        name: for messages.
        index: of the file's frames, from 0.
        shape: (rows, columns).
        position: (3,) centre of its first pixel, mm, LPS.
        orientation: (2, 3) unit vectors, LPS: along a row, in which the column index grows; along a column.
        spacing: mm between rows, mm between columns.
        thickness: mm; None if the file does not say.
        slope, intercept: value = slope · stored value + intercept.
        bits: of a stored value.
        traits: values of each of :data:`TRAITS`, by its name; () if the file does not state it.
    """

    file: Path
    name: str
    index: int
    shape: tuple[int, int]
    position: np.ndarray
    orientation: np.ndarray
    spacing: tuple[float, float]
    thickness: float | None
    slope: float
    intercept: float
    bits: int
    traits: dict[str, tuple[float | str, ...]]

    @property
    def normal(self) -> np.ndarray:
        """Unit vector at right angles to the slice, LPS."""
        return np.cross(*self.orientation)


def read_frames(file: Path) -> list[Frame]:
    """The frames of a file in the file's order; their pixels are not read.

    Raises:
        VolumeError: the file is damaged; its pixels are colours, inverted, or several slices tiled in one image; its
            frames have no functional groups; or one of them does not say where it lies.
    """
    with reading(file):
        dataset = read_dataset(file, stop_before_pixels=True)
        _check_kind(file, dataset)
        shared = _macros(dataset.get("SharedFunctionalGroupsSequence"))
        groups = dataset.get("PerFrameFunctionalGroupsSequence") or []
        if not groups:
            return [_frame(file, "", 0, [*shared, dataset])]
        return [
            _frame(file, f"frame {index + 1} of ", index, [*_macros([group]), *shared, dataset])
            for index, group in enumerate(groups)
        ]


class _BoundedFile(io.BufferedReader):
    """A file that takes no memory for more bytes than it has left, whatever length an element states."""

    def read(self, size: int | None = -1, /) -> bytes:
        """As for any file."""
        if size is None or size < 0:
            # pydicom asks for all that is left only of a deflated file, and then inflates it at once.
            content = super().read()
            _check_inflated(content)
            return content
        left = os.fstat(self.fileno()).st_size - self.tell()
        return super().read(max(0, min(size, left)))


def _check_inflated(content: bytes) -> None:
    """Refuse deflated bytes that would take far more memory than their file; they are inflated part by part and dropped.

    Raises:
        ValueError: they hold more than a file of images.
        zlib.error: they are damaged.
    """
    stream, size, limit = zlib.decompressobj(-zlib.MAX_WBITS), 0, INFLATED_BYTES + INFLATED_SHARE * len(content)
    for start in range(0, len(content), INFLATED_PART):
        size += len(stream.decompress(content[start : start + INFLATED_PART]))
        if size > limit:
            raise ValueError(f"its {len(content)} deflated bytes hold more than {limit}")


def read_dataset(file: Path, **options: Any) -> Dataset:
    """What pydicom's ``dcmread`` reads from a file, which may lack preamble and mark; call it within :func:`reading`."""
    with _BoundedFile(io.FileIO(file)) as opened:
        dataset: Dataset = require("pydicom").dcmread(opened, force=True, **options)
    return dataset


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turns whatever pydicom and ITK raise over a damaged file into one message.

    Raises:
        VolumeError: the file is damaged, or the block raised it.
    """
    try:
        with warnings.catch_warnings():
            # pydicom warns of formal faults in every other file, whether or not the volume depends on them.
            warnings.simplefilter("ignore")
            yield
    except (VolumeError, ImportError, MemoryError):
        raise
    except Exception as error:
        # pydicom converts an element when it is asked for, and damage can make that fail in any way.
        raise unreadable(file, error) from error


def _check_kind(file: Path, dataset: Dataset) -> None:
    """Refuse a file that is no part of a volume of grey values, or whose frames have no place."""
    kind = dataset.SOPClassUID.name if "SOPClassUID" in dataset else "of unknown kind"
    if "Rows" not in dataset:
        if "SOPClassUID" not in dataset:
            raise unreadable(file, ValueError("it holds no image"))
        raise VolumeError(f"{file} ({kind}) holds no image, expected a slice or a volume: give a file of the images")
    if dataset.get("SOPClassUID") == SEGMENTATION:
        raise VolumeError(
            f"{file} ({kind}) holds segments, expected an image or a label map: convert it to NIfTI with dcmqi's "
            f"segimage2itkimage"
        )
    colours = dataset.get("PhotometricInterpretation", "MONOCHROME2")
    if colours == "MONOCHROME1":
        raise VolumeError(
            f"{file} is MONOCHROME1, in which low values are bright, expected MONOCHROME2: export it without inversion"
        )
    if colours != "MONOCHROME2" or dataset.get("SamplesPerPixel", 1) != 1:
        raise VolumeError(f"{file} holds {colours}, expected one real number for each voxel: make it grey first")
    if "MOSAIC" in _as_tuple(dataset.get("ImageType")):
        raise VolumeError(
            f"{file} is a Siemens mosaic, many slices tiled in one image of {dataset.Rows} x {dataset.Columns} pixels, "
            f"expected one slice in each file or frame: {CONVERT}"
        )
    count = int(dataset.get("NumberOfFrames") or 1)
    described = len(dataset.get("PerFrameFunctionalGroupsSequence") or [])
    if not described and count > 1:
        raise VolumeError(
            f"{file} ({kind}) has {count} frames, but does not say where each of them lies, expected functional groups "
            f"of enhanced MR or CT: export the series again, as the scanner sent it"
        )
    if described and described != count:
        raise VolumeError(
            f"{file} has {count} frames, but describes {described} in its functional groups, expected as many: export "
            f"it again"
        )


def _macros(groups: Any) -> list[Dataset]:
    """The contents of functional groups, such as the plane position: the first item of each of their sequences."""
    return [
        element.value[0]
        for group in groups or []
        for element in group
        # Manufacturers' own sequences repeat public attributes in senses of their own.
        if element.VR == "SQ" and element.value and not element.tag.is_private
    ]


def _frame(file: Path, prefix: str, index: int, scopes: list[Dataset]) -> Frame:
    """A frame from the data sets that describe it, the most specific first."""

    def stated(*keywords: str, default: Any = None) -> Any:
        found = (scope.get(keyword) for keyword in keywords for scope in scopes)
        return next((value for value in found if value is not None and value != ""), default)

    def numbers(keyword: str, count: int) -> np.ndarray:
        values = np.array([float(value) for value in _as_tuple(stated(keyword))])
        if len(values) != count or not np.isfinite(values).all():
            raise VolumeError(
                f"{prefix}{file} has {f'the {keyword} {values.tolist()}' if len(values) else f'no {keyword}'}, expected "
                f"{count} numbers, which place it in space: export the series again, as the scanner sent it"
            )
        return values

    orientation = numbers("ImageOrientationPatient", 6).reshape(2, 3)
    if not np.allclose(orientation @ orientation.T, np.eye(2), atol=COSINE_TOLERANCE):
        raise VolumeError(
            f"{prefix}{file} has the ImageOrientationPatient {orientation.ravel().tolist()}, expected two vectors of "
            f"length 1 at right angles: export it again"
        )
    rows, columns = numbers("PixelSpacing", 2)
    if min(rows, columns) <= 0:
        raise VolumeError(
            f"{prefix}{file} has the PixelSpacing {rows:g} x {columns:g} mm, expected more than 0: export it again"
        )
    slope, intercept = float(stated("RescaleSlope", default=1)), float(stated("RescaleIntercept", default=0))
    if slope == 0 or not np.isfinite([slope, intercept]).all():
        raise VolumeError(
            f"{prefix}{file} has a rescale slope of {slope:g} and an intercept of {intercept:g}, expected finite numbers "
            f"and a slope other than 0: export it again"
        )
    thickness = stated("SliceThickness")
    return Frame(
        file=file,
        name=f"{prefix}{file.name}",
        index=index,
        shape=(int(stated("Rows")), int(stated("Columns"))),
        position=numbers("ImagePositionPatient", 3),
        orientation=orientation,
        spacing=(float(rows), float(columns)),
        thickness=None if thickness is None else float(thickness),
        slope=slope,
        intercept=intercept,
        bits=int(stated("BitsAllocated", default=16)),
        traits={trait.name: _comparable(stated(*trait.keywords)) for trait in TRAITS},
    )


def _as_tuple(value: Any) -> tuple[Any, ...]:
    """The values of a DICOM element, which holds none, one or several."""
    if value is None:
        return ()
    return (value,) if isinstance(value, (str, bytes)) or not isinstance(value, Iterable) else tuple(value)


def _comparable(value: Any) -> tuple[float | str, ...]:
    """The values of a DICOM element in plain types, of which every two have an order."""
    return tuple(float(v) if isinstance(v, (int, float)) else str(v) for v in _as_tuple(value))
