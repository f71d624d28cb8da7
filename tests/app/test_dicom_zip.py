"""Zips of strangers: unpacked inside their folder and within limits, or refused and gone."""

from __future__ import annotations

import stat
import zipfile
from pathlib import Path

import pytest

from hf_binaryformer.app.dicom_zip import unpack_dicom
from hf_binaryformer.app.limits import Limits
from hf_binaryformer.pipelines.grids import VolumeError

DICOM = b"\0" * 128 + b"DICM" + bytes(range(200))


def pack(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_dicom_files_are_unpacked_under_our_own_names(tmp_path):
    members = {"case/a/IM1": DICOM, "case/b/IM1": DICOM + b"x", "case/readme.txt": b"hello" * 40, "case/empty": b""}
    archive = pack(tmp_path / "z.zip", members)
    assert unpack_dicom(archive, tmp_path / "out", Limits()) == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"00000.dcm", "00001.dcm"}
    assert (tmp_path / "out" / "00001.dcm").read_bytes() == DICOM + b"x"


@pytest.mark.parametrize(
    "name", ["../evil.dcm", "a/../../evil.dcm", "/etc/evil.dcm", "C:/evil.dcm", "..\\evil.dcm", "a\\..\\..\\evil"]
)
def test_what_leads_outside_is_refused(tmp_path, name):
    archive = pack(tmp_path / "z.zip", {"good.dcm": DICOM, name: DICOM})
    with pytest.raises(VolumeError, match="leads outside its folder, and is refused"):
        unpack_dicom(archive, tmp_path / "deep" / "out", Limits())
    assert {path.name for path in tmp_path.rglob("*")} == {"z.zip"}


def test_links_are_refused(tmp_path):
    link = zipfile.ZipInfo("link.dcm")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(VolumeError, match="has a link"):
        unpack_dicom(tmp_path / "z.zip", tmp_path / "out", Limits())


def test_bombs_are_refused_by_their_ratio_and_by_their_size(tmp_path):
    bomb = pack(tmp_path / "bomb.zip", {"a.dcm": DICOM + bytes(5_000_000)}, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 20_000
    with pytest.raises(VolumeError, match="times its own size, and is refused"):
        unpack_dicom(bomb, tmp_path / "ratio", Limits())
    assert sum(path.stat().st_size for path in (tmp_path / "ratio").iterdir()) <= 100 * bomb.stat().st_size
    large = pack(tmp_path / "large.zip", {f"{n}.dcm": DICOM + bytes(600_000) for n in range(2)})
    with pytest.raises(VolumeError, match=r"more than 1\.0 MB"):
        unpack_dicom(large, tmp_path / "size", Limits(unpacked_mb=1))


def test_stated_sizes_are_not_believed(tmp_path):
    path = pack(tmp_path / "lie.zip", {"a.dcm": DICOM + bytes(5_000_000)}, zipfile.ZIP_DEFLATED)
    content = path.read_bytes()
    size = len(DICOM) + 5_000_000
    assert content.count(size.to_bytes(4, "little")) == 2
    path.write_bytes(content.replace(size.to_bytes(4, "little"), (100).to_bytes(4, "little")))
    with pytest.raises(VolumeError):
        unpack_dicom(path, tmp_path / "out", Limits())
    assert sum(file.stat().st_size for file in (tmp_path / "out").iterdir()) <= 100 * path.stat().st_size


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"no zip at all"), "no complete zip"),
        (lambda path: pack(path, {"a.txt": b"x" * 300}), "holds no DICOM files"),
        (lambda path: pack(path, {}), "holds no DICOM files"),
        (lambda path: pack(path, {f"{n}.dcm": DICOM for n in range(6)}), "has 6 files, expected at most 5"),
        (lambda path: pack(path, {"a.dcm": DICOM}, zipfile.ZIP_LZMA), "packed by method 14"),
        (lambda path: spoil(pack(path, {"a.dcm": DICOM * 9})), "no complete zip"),
    ],
    ids=["no zip", "no dicom", "nothing", "many", "method", "damaged"],
)
def test_other_zips_that_cannot_be_used(tmp_path, make, message):
    path = tmp_path / "z.zip"
    make(path)
    with pytest.raises(VolumeError, match=message):
        unpack_dicom(path, tmp_path / "out", Limits(zip_files=5))


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[400] ^= 0xFF
    path.write_bytes(content)
