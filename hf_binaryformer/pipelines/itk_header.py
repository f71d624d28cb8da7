"""Checks the text headers of .mha, .mhd and .nrrd files before ITK reads them.

ITK takes memory for all that a header asks for, whatever the file holds. Where a MetaImage header states another number of
axes than 1 to 10, ITK writes beyond its arrays, which ends the process, and its decomposition of directions does not end
where a cosine is huge. All of these are refused here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from hf_binaryformer.modeling.file_names import stays_below
from hf_binaryformer.pipelines.grids import MAX_COMPRESSION, VolumeError, check_claim

# Headers with all that a scanner states are shorter by far.
MAX_HEADER_BYTES = 2**20
MAX_AXES = 10
MAX_CHANNELS = 1024
# Of cosines, spacings and positions, mm.
LARGEST_NUMBER = 1e9
META_GEOMETRY = (
    r"TransformMatrix|Rotation|Orientation|Offset|Position|Origin|CenterOfRotation|ElementSpacing|ElementSize"
)
NRRD_GEOMETRY = (
    r"space directions|space origin|spacings|thicknesses|axis mins|axis maxs|axismins|axismaxs|measurement frame"
)
META_BYTES = {"CHAR": 1, "SHORT": 2, "INT": 4, "LONG": 4, "LONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8}
# By the last word of a type's name, such as "unsigned short int", "uint16_t" or "long long".
NRRD_BYTES = {
    "short": 2,
    "int16": 2,
    "int": 4,
    "int32": 4,
    "long": 8,
    "int64": 8,
    "longlong": 8,
    "float": 4,
    "double": 8,
}


def check_header(path: Path) -> None:
    """Refuse a file whose header ITK must not be given.

    Raises:
        VolumeError: the file cannot be opened; its header has no end; a number of axes, channels or voxels is missing, is
            no number, is stated twice or is out of range; its geometry holds a huge number; its data file is missing or not
            below its folder; or it asks for more voxels than the file can hold.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_HEADER_BYTES).decode("latin-1")
    except OSError as error:
        raise VolumeError(f"{path} cannot be read ({error}), expected a volume file: check name and rights") from error
    if text.startswith("NRRD"):
        _check_nrrd(path, re.split(r"\r?\n\r?\n", text, maxsplit=1)[0])
    elif end := re.search(r"^\s*ElementDataFile\s*[=:](.*)$", text, re.MULTILINE):
        _check_meta(path, text[: end.start()], end[1].strip(), text[end.end() :])
    else:
        raise _refusal(path, "no line ElementDataFile, with which a header ends")


def _check_meta(path: Path, header: str, data: str, rest: str) -> None:
    axes = _numbers(path, header, "NDims", 1)
    if not axes or not 1 <= axes[0] <= MAX_AXES:
        raise _refusal(path, f"NDims = {axes[0] if axes else 'missing'}, and not 1 to {MAX_AXES} axes")
    shape = _numbers(path, header, "DimSize", axes[0])
    if not shape:
        raise _refusal(path, "no DimSize")
    channels = _numbers(path, header, "ElementNumberOfChannels", 1) or [1]
    kind = (re.findall(r"^\s*ElementType\s*[=:]\s*MET_(\w+)", header, re.MULTILINE) or ["missing"])[-1]
    if kind.removeprefix("U") not in META_BYTES or not 1 <= channels[0] <= MAX_CHANNELS:
        raise _refusal(path, f"ElementType {kind} with {channels[0]} channels, and not numbers")
    _check_geometry(path, header, META_GEOMETRY)
    stored = _bytes_of_data(path, "" if data.upper() == "LOCAL" else data, rest)
    packed = _numbers(path, header, "CompressedDataSize", 1) or [0]
    if not 0 <= packed[0] <= stored:
        raise _refusal(path, f"CompressedDataSize = {packed[0]}, but {stored} bytes")
    is_packed = re.search(r"^\s*CompressedData\s*[=:]\s*[^Ff\s0]", header, re.MULTILINE)
    available = stored * (MAX_COMPRESSION if is_packed else 1)
    check_claim(path, shape, META_BYTES[kind.removeprefix("U")] * channels[0], available)


def _check_nrrd(path: Path, header: str) -> None:
    fields = {name.strip().lower(): value.strip() for name, _, value in (x.partition(":") for x in header.splitlines())}
    if not re.fullmatch(r"\d{1,18}(\s+\d{1,18})*", fields.get("sizes", "")):
        raise _refusal(path, f"the sizes '{fields.get('sizes', '')[:80]}', and not whole numbers")
    _check_geometry(path, header, NRRD_GEOMETRY)
    kind = re.sub(r"_t$|\bint$", "", fields.get("type", "")).strip() or "int"
    voxel = NRRD_BYTES.get(kind.split()[-1].removeprefix("u"), 1)
    names = re.findall(r"^\s*data ?file\s*:(.*)$", header, re.MULTILINE | re.IGNORECASE)
    if len(names) > 1:
        raise _refusal(path, "several lines data file")
    stored = _bytes_of_data(path, names[0].strip() if names else "", header)
    packed = fields.get("encoding", "").lower() not in ("raw", "txt", "text", "ascii", "hex")
    check_claim(path, [int(n) for n in fields["sizes"].split()], voxel, stored * (MAX_COMPRESSION if packed else 1))


def _numbers(path: Path, header: str, name: str, count: int) -> list[int]:
    """The whole numbers of a field, [] if it is missing."""
    found: list[int] = []
    for line in re.findall(rf"^\s*{name}\b(.*)$", header, re.MULTILINE):
        if (
            not re.fullmatch(r"\s*[=:]\s*-?\d{1,18}(\s+-?\d{1,18})*\s*", line)
            or len(re.findall(r"-?\d+", line)) != count
        ):
            raise _refusal(path, f"{name} '{line.strip()[:80]}', and not {count} whole numbers")
        if found and found != [int(n) for n in re.findall(r"-?\d+", line)]:
            # ITK takes memory for the first number of axes, and fills it for the last.
            raise _refusal(path, f"several lines {name}, which differ")
        found = [int(n) for n in re.findall(r"-?\d+", line)]
    return found


def _check_geometry(path: Path, header: str, names: str) -> None:
    for name, text in re.findall(rf"^\s*({names})\s*[=:](.*)$", header, re.MULTILINE | re.IGNORECASE):
        for number in re.findall(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|\binf", text):
            if not abs(float(number)) <= LARGEST_NUMBER:
                raise _refusal(path, f"{name} with {number[:20]}, and not numbers up to {LARGEST_NUMBER:g}")


def _bytes_of_data(path: Path, data: str, names: str) -> int:
    """Size of the file that holds the voxels, or of all files beside it where they are spread over several.

    Args:
        path: of the header.
        data: what it names; "" if it holds the voxels itself.
        names: text whose lines are names of files if ``data`` is "LIST".
    """
    if not data:
        return path.stat().st_size
    listed = names.splitlines() if data.upper().startswith("LIST") else [data]
    if outside := [name for name in map(str.strip, listed) if name and not stays_below(name)]:
        raise VolumeError(
            f"{path} names '{outside[0][:80]}' as a file of its voxels, expected one below its folder: put it beside the header"
        )
    if data.upper().startswith("LIST") or "%" in data:
        return sum(file.stat().st_size for file in path.parent.iterdir() if file.is_file())
    if not os.path.isfile(path.parent / data):
        raise VolumeError(
            f"{path} names '{data[:80]}' as the file of its voxels, which is missing: put it beside the header"
        )
    return (path.parent / data).stat().st_size


def _refusal(path: Path, found: str) -> VolumeError:
    return VolumeError(
        f"{path} is truncated, damaged or not of this kind: its header has {found}, expected a complete file: export it again"
    )
