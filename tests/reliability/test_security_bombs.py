"""Small files that hold or claim much take no more memory than SECURITY.md states, and their error is one line.

Headers that claim more than any file of their size could hold are in tests/pipelines/test_damaged_files.py.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dicom_cases import write_dicom
from planting import META, NRRD
from toys import write_idx

import hf_binaryformer as bf

ROOT = Path(bf.__file__).parents[1]
# Bytes of zeros that bombs hold.
HELD = 2**28
PEAKS = """
import json, os, resource, sys
from pathlib import Path
from hf_binaryformer.data.pixels import read_idx
from hf_binaryformer.data.shards import _rows_of
from hf_binaryformer.pipelines import dicom_frames, dicom_pixels, itk
from hf_binaryformer.pipelines.volumes import read_volume
import nibabel, pydicom, pyarrow.parquet, SimpleITK

read = {"volume": read_volume, "idx": read_idx, "shard": lambda path: [None for _ in _rows_of(path, ["image"])]}
for line in sys.stdin:
    kind, name = line.split()
    inwards, outwards = os.pipe()
    if os.fork() == 0:
        before, error = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, ""
        try:
            read[kind](Path(name))
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os.write(outwards, json.dumps([taken * 1024, error]).encode())
        os._exit(0)
    os.close(outwards)
    with os.fdopen(inwards) as pipe:
        print(pipe.read() or '[-1, "the process died"]', flush=True)
    os.wait()
"""


def gzip_of_zeros(start: bytes, size: int) -> bytes:
    """A gzip file of ``start`` and zeros: made of members, so that it takes no time and no memory to make."""
    member = gzip.compress(bytes(2**24))
    return gzip.compress(start) + member * (size // 2**24)


def deflate_of_zeros(start: bytes, size: int, bits: int) -> bytes:
    """The same as one stream, whose blocks repeat. The checksum of zlib, of ``bits`` 15, is left out."""
    stream = zlib.compressobj(wbits=bits)
    content = stream.compress(start) + stream.flush(zlib.Z_FULL_FLUSH)
    block = stream.compress(bytes(2**24)) + stream.flush(zlib.Z_FULL_FLUSH)
    return content + block * (size // 2**24) + stream.flush()


def nifti_header(shape: tuple[int, int, int], kind: Any = np.uint8) -> bytes:
    header = nib.Nifti1Header()
    header.set_data_dtype(kind)
    header.set_data_shape(shape)
    header.set_sform(np.eye(4), 1)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    return header.binaryblock + bytes(4)


def deflated_dicom(folder: Path, padding: int) -> Path:
    pydicom = pytest.importorskip("pydicom")
    write_dicom(folder, np.arange(12, dtype="<i2").reshape(3, 4, 1))
    path = next(folder.iterdir())
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.save_as(path)
    content = path.read_bytes()
    # The group's length, 12 bytes after preamble and mark, says where the deflated part starts.
    start = 144 + int.from_bytes(content[140:144], "little")
    inflated = zlib.decompress(content[start:], -zlib.MAX_WBITS)
    private = b"\xe1\x7f\x01\x10OB\0\0" + padding.to_bytes(4, "little")
    path.write_bytes(content[:start] + deflate_of_zeros(inflated + private, padding, -zlib.MAX_WBITS))
    return path


def bombs(folder: Path) -> dict[str, tuple[str, Path, int, str]]:
    """Name -> how it is read, the file, the most bytes that it may take, and the error ("" if it is a valid file)."""
    folder.mkdir()

    def file(name: str, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    def parquet(name: str, rows: int, size: int) -> Path:
        image = pa.array(
            [{"bytes": bytes(size), "path": None}], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        )
        table = pa.table({"case": ["a"] * rows, "image": image.take(pa.array([0] * rows))})
        pq.write_table(table, folder / name, compression="zstd")
        return folder / name

    noise = np.random.default_rng(0).bytes(2**18)
    write_idx(folder / "whole", np.zeros((3, 4, 5), np.uint8))
    little = (folder / "whole").read_bytes()
    meta = META.format("LOCAL").replace("BinaryData = True", "BinaryData = True\nCompressedData = True").encode()
    nrrd = NRRD.replace("data file: {}\n", "").replace("encoding: raw", "encoding: gzip").encode()
    few, mb = 64 * 2**20, 2**20
    return {
        "NIfTI of few voxels": (
            "volume",
            file("few.nii.gz", gzip_of_zeros(nifti_header((5, 6, 7)), HELD)),
            few,
            "all 210 voxels are 0",
        ),
        "NIfTI of many": (
            "volume",
            file("many.nii.gz", gzip.compress(nifti_header((512, 512, 512)) + noise)),
            few,
            "asks for 134218080 bytes, the file has",
        ),
        "NRRD of few voxels": ("volume", file("few.nrrd", nrrd + gzip_of_zeros(b"", HELD)), few, ""),
        "MetaImage of few voxels": ("volume", file("few.mha", meta + deflate_of_zeros(b"", HELD, 15)), few, ""),
        "deflated DICOM": ("volume", deflated_dicom(folder / "dicom", 2 * HELD), few, "deflated bytes hold more than"),
        "IDX of few values": (
            "idx",
            file("few", gzip_of_zeros(little, HELD)),
            few,
            "holds more values, its header says 60",
        ),
        "IDX of many values": (
            "idx",
            file("many", gzip.compress(b"\0\0\x08\3" + b"\xff" * 12 + noise)),
            few,
            "expected at most 1073741824 bytes",
        ),
        "shard of one large volume": ("shard", parquet("one.parquet", 1, 128 * mb), few, "unpacks to 134"),
        "shard of one volume many times": ("shard", parquet("many.parquet", 64, 8 * mb), 2 * few, ""),
    }


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform != "linux", reason="needs fork and Linux's units of memory")
def test_bombs_take_no_more_memory_than_stated(tmp_path):
    pytest.importorskip("SimpleITK")
    cases = bombs(tmp_path / "bombs")
    lines = "".join(f"{kind} {path}\n" for kind, path, _, _ in cases.values())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PEAKS], input=lines, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = dict(zip(cases, map(json.loads, done.stdout.splitlines()), strict=True))
    for name, (_, _, most, message) in cases.items():
        taken, error = found[name]
        print(f"{name}: {taken / 1e6:.0f} MB, {error}")
        assert 0 <= taken <= most, (name, taken, error)
        assert "\n" not in error and (message in error if message else True), (name, error)


LIMITED = """
import re, resource, sys
from pathlib import Path
from hf_binaryformer.cli import main
from hf_binaryformer.pipelines import segmentation
size = 1024 * int(re.search(r"VmSize:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv.pop(1)),) * 2)
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs limits of memory")
def test_a_volume_for_which_memory_is_not_enough_is_an_error_of_one_line(tmp_path):
    """A header that is true, of voxels that are packed a thousandfold: no file can be refused for that."""
    path = tmp_path / "large.nii.gz"
    path.write_bytes(gzip_of_zeros(nifti_header((1000, 1000, 1000)), 61 * 2**24))
    command = [
        sys.executable,
        "-P",
        "-c",
        LIMITED,
        str(500 * 2**20),
        "segment",
        str(path),
        "-o",
        str(tmp_path / "out.nii.gz"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: memory is not enough"), done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out.nii.gz").exists()
