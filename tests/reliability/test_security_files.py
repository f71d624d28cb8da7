"""Names and links in files of strangers lead nowhere else, and small files that hold much take no more memory than stated."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
import vq_cases
from dicom_cases import write_dicom
from safetensors.torch import load_file, save_file
from toys import write_idx
from typer.testing import CliRunner

import hf_binaryformer as bf
from hf_binaryformer.commands import prepare
from hf_binaryformer.data.hashing import file_hash
from hf_binaryformer.data.prepared_folder import PreparedFolder
from hf_binaryformer.modeling.file_names import stays_below
from hf_binaryformer.modeling.pretrained import CheckpointError
from hf_binaryformer.pipelines.volumes import VolumeError, read_volume
from hf_binaryformer.pipelines.whole_files import whole_file, whole_folder
from hf_binaryformer.training.checkpoints import MANIFEST, find_damage
from hf_binaryformer.training.publishing import published_files
from jobs import pack, save_network

ROOT = Path(__file__).parents[2]
OPENED: list[str] = []


def record(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("open", "os.listdir", "os.scandir", "os.rename", "os.mkdir", "os.link", "os.symlink"):
        OPENED.extend(os.path.realpath(a) for a in arguments if isinstance(a, (str, os.PathLike)))


sys.addaudithook(record)


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder with a stranger's goal, that Python must neither read from nor write to."""
    folder = tmp_path / "outside"
    folder.mkdir()
    nib.save(nib.Nifti1Image(np.arange(60, dtype=np.float32).reshape(3, 4, 5), np.eye(4)), folder / "a.nii.gz")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    OPENED.clear()
    yield folder
    opened = [path for path in OPENED if path.startswith(str(folder) + os.sep)]
    assert opened == []
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def leading_out(outside: Path, name: str) -> list[str]:
    """Names for a file in that folder, as a file in a folder beside it could state them."""
    return [f"../outside/{name}", f"x/../../outside/{name}", str(outside / name), f"..\\outside\\{name}", f"C:\\{name}"]


def test_the_watch_sees_what_is_opened(outside):
    (outside / "a.nii.gz").read_bytes()
    assert any(path.endswith("outside/a.nii.gz") for path in OPENED)
    OPENED.clear()


def test_names_below_a_folder():
    assert all(map(stays_below, ("a", "a/b.nii.gz", "..a", "a..b/c", "sub-1:2/a", "a/./b", "ä b")))
    assert not any(map(stays_below, ("", "..", "a/..", "/a", "a\\b", "C:a", "a\0", None, 3)))


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("part", ["network", "pipeline/transformer"])
def test_indices_of_weights(part, number, tmp_path, outside):
    (save_network if part == "network" else vq_cases.save_checkpoint)(tmp_path / part.split("/")[0])
    folder = tmp_path / part
    whole = next(folder.glob("*.safetensors"))
    tensors, index = load_file(whole), folder / f"{whole.name}.index.json"
    whole.unlink()
    # Both libraries take shards of such names.
    shards = {f"{whole.stem}-0000{n}-of-00002.safetensors": list(tensors)[n - 1 :: 2] for n in (1, 2)}
    for name, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / name, {"format": "pt"})
    names = {key: name for name, keys in shards.items() for key in keys}
    total = sum(tensor.nbytes for tensor in tensors.values())
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": names}))
    bf.from_pretrained(folder)
    OPENED.clear()

    first = next(iter(shards))
    wrong = [*leading_out(outside, first), "more/" + first][number]
    names = {key: wrong if name == first else name for key, name in names.items()}
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": names}))
    with pytest.raises(CheckpointError, match="expected .safetensors files beside it"):
        bf.from_pretrained(folder)


def prepared(folder: Path, **fields: str) -> Path:
    """A manifest of one case with other fields."""
    folder.mkdir(exist_ok=True)
    case = {"case": "a", "group": "p", "split": "train", "image": "images/a.nii.gz", "image_sha256": "0"} | fields
    (folder / "manifest.json").write_text(json.dumps({"label_names": {"0": "background"}, "cases": [case]}))
    return folder


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("key", ["image", "label", "case"])
def test_manifests(key, number, tmp_path, outside):
    folder = prepared(tmp_path / "data", **{key: leading_out(outside, "a.nii.gz")[number], "label_sha256": "0"})
    with pytest.raises(ValueError, match="which is not below its folder|which is no name of a file") as caught:
        PreparedFolder(folder)
    assert "\n" not in str(caught.value)
    result = CliRunner().invoke(prepare.app, ["check-leakage", str(folder)])
    assert result.exit_code == 2 and "case 0" in result.output


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    pack(folder, folder / "data", False)
    return folder / "data" / "shards"


def unpack(shards: Path, out: Path) -> Any:
    return CliRunner().invoke(prepare.app, ["shards", "--source", str(shards), "--out", str(out)])


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("where", ["shard", "manifest", "both"])
def test_shards(where, number, shards, tmp_path, outside):
    name = leading_out(outside, "a")[number]
    copy = Path(shutil.copytree(shards, tmp_path / "shards"))
    file = next((copy / "data").glob("train-00000-*"))
    table, manifest = pq.read_table(file), json.loads((copy / "manifest.json").read_text())
    if where != "shard":
        manifest["cases"][0] |= {"case": name, "image": f"images/{name}.nii.gz"}
        (copy / "manifest.json").write_text(json.dumps(manifest))
    if where != "manifest":
        column = table.schema.get_field_index("case")
        pq.write_table(table.set_column(column, "case", pa.array([name] * len(table))), file)
    result = unpack(copy, tmp_path / "out")
    assert result.exit_code == 2 and "Error: " in result.output and not (tmp_path / "out").exists()


def test_shards_with_the_name_of_a_file_in_place_of_a_volume(shards, tmp_path, outside):
    copy = Path(shutil.copytree(shards, tmp_path / "shards"))
    file = next((copy / "data").glob("train-00000-*"))
    table = pq.read_table(file)
    wanted = {"bytes": None, "path": str(outside / "a.nii.gz")}
    column = table.schema.get_field_index("image")
    kind = table.schema.field("image").type
    pq.write_table(table.set_column(column, "image", pa.array([wanted] * len(table), kind)), file)
    assert "is not what manifest.json says" in " ".join(unpack(copy, tmp_path / "out").output.split())


@pytest.mark.parametrize("files", ["../outside/*", "https://example.org/a.csv", "hf://datasets/a/b/c.csv"])
def test_what_the_page_of_shards_says_is_not_followed(files, shards, tmp_path, outside):
    copy = Path(shutil.copytree(shards, tmp_path / "shards"))
    configs = [{"config_name": "default", "data_files": [{"split": "train", "path": files}]}]
    (copy / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    (copy / "data" / "train.csv").write_text("case\na\n")
    assert unpack(copy, tmp_path / "out").exit_code == 0 and (tmp_path / "out" / "manifest.json").is_file()


META = (
    "ObjectType = Image\nNDims = 3\nBinaryData = True\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\n"
    "ElementSpacing = 1 1 1\nDimSize = 5 6 7\nElementType = MET_UCHAR\nElementDataFile = {}\n"
)
NRRD = (
    "NRRD0004\ntype: unsigned char\ndimension: 3\nspace: left-posterior-superior\nsizes: 5 6 7\n"
    "space directions: (1,0,0) (0,1,0) (0,0,1)\nkinds: domain domain domain\nencoding: raw\nspace origin: (0,0,0)\n"
    "data file: {}\n\n"
)


@pytest.mark.parametrize(("suffix", "header"), [(".mhd", META), (".mha", META), (".nrrd", NRRD)])
def test_detached_voxels(suffix, header, tmp_path, outside):
    pytest.importorskip("SimpleITK")
    voxels = bytes(range(210))
    folder = tmp_path / "scan"
    (folder / "raw").mkdir(parents=True)
    (folder / "raw" / "a.raw").write_bytes(voxels)
    path = folder / f"a{suffix}"
    path.write_text(header.format("raw/a.raw"))
    assert read_volume(path).array.shape == (5, 6, 7)
    for name in leading_out(outside, "a.nii.gz"):
        for text in (name, f"LIST\n{name}", f"LIST 2\n{name}\n{name}", f"{name}%d 1 7 1"):
            path.write_text(header.format(text))
            with pytest.raises(VolumeError, match="put it beside the header"):
                read_volume(path)


def test_a_second_line_of_detached_voxels(tmp_path, outside):
    path = tmp_path / "a.nrrd"
    for lines in ("a.raw\nData File: ../outside/a.nii.gz", "../outside/a.nii.gz\ndatafile: a.raw"):
        path.write_text(NRRD.format(lines))
        with pytest.raises(VolumeError, match="several lines data file"):
            read_volume(path)


@pytest.mark.parametrize("number", range(5))
def test_lists_of_a_checkpoints_files(number, tmp_path, outside):
    name = leading_out(outside, "a.nii.gz")[number]
    place = tmp_path / "step_00000001"
    place.mkdir()
    (place / "a").write_text("a")
    (place / MANIFEST).write_text(json.dumps({"a": file_hash(place / "a")}))
    assert not find_damage(place)
    for listed in ({name: "0"}, [name], None, 3):
        (place / MANIFEST).write_text(json.dumps(listed))
        assert find_damage(place) == "files.json is no list of the files in its folder"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_directories_of_dicom_files_are_not_followed(tmp_path, outside):
    pydicom = pytest.importorskip("pydicom")
    folder = tmp_path / "series"
    write_dicom(folder, np.arange(60, dtype="<i2").reshape(3, 4, 5))
    directory = pydicom.Dataset()
    directory.DirectoryRecordSequence = [pydicom.Dataset() for _ in range(3)]
    for record_, name in zip(directory.DirectoryRecordSequence, leading_out(outside, "a.nii.gz")[:3], strict=True):
        record_.ReferencedFileID = name.replace("/", "\\").split("\\")
    directory.file_meta = pydicom.dataset.FileMetaDataset()
    directory.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    directory.SOPClassUID = "1.2.840.10008.1.3.10"
    directory.SOPInstanceUID = "1.2.3"
    directory.save_as(folder / "DICOMDIR", enforce_file_format=True)
    assert read_volume(folder).array.shape == (4, 3, 5)
    with pytest.raises(VolumeError, match="holds no image"):
        read_volume(folder / "DICOMDIR")


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".nii.zip"])
def test_archives_are_no_volumes(suffix, tmp_path):
    (tmp_path / f"a{suffix}").write_bytes(b"PK\3\4")
    with pytest.raises(VolumeError, match="convert it first"):
        read_volume(tmp_path / f"a{suffix}")


def test_links_of_the_owner_are_read(tmp_path):
    """Scans are often on another disk; who can put a link into a folder could as well name its target."""
    pytest.importorskip("pydicom")
    (tmp_path / "disk").mkdir()
    nib.save(
        nib.Nifti1Image(np.arange(60, dtype=np.float32).reshape(3, 4, 5), np.eye(4)), tmp_path / "disk" / "a.nii.gz"
    )
    write_dicom(tmp_path / "disk" / "series", np.arange(60, dtype="<i2").reshape(3, 4, 5))
    scans = prepared(tmp_path / "scans")
    (scans / "images").symlink_to(tmp_path / "disk")
    (scans / "series").symlink_to(tmp_path / "disk" / "series")
    assert read_volume(PreparedFolder(scans).split("train")[0].image).array.shape == (3, 4, 5)
    assert read_volume(scans / "series").array.shape == (4, 3, 5)


def test_links_are_replaced_and_not_written_through(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.nii.gz").write_text("old")
    link = tmp_path / "a.nii.gz"
    link.symlink_to(outside / "a.nii.gz")
    with whole_file(link) as temporary:
        temporary.write_text("new")
    assert link.read_text() == "new" and not link.is_symlink()
    (tmp_path / "model").symlink_to(outside)
    with whole_folder(tmp_path / "model") as folder:
        (folder / "new").write_text("new")
    assert (tmp_path / "model" / "new").is_file() and not (tmp_path / "model").is_symlink()
    assert [path.read_text() for path in outside.iterdir()] == ["old"]


def test_links_to_files_outside_are_not_published(tmp_path):
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_text("weights")
    (folder / "same.safetensors").symlink_to("model.safetensors")
    assert published_files(folder).keys() == {"model.safetensors", "same.safetensors"}
    for name in ("key.json", "README.md", "b.safetensors"):
        (folder / name).symlink_to(tmp_path / "secret")
        with pytest.raises(typer.BadParameter, match=f"links to files outside \\({name}\\)"):
            published_files(folder)
        (folder / name).unlink()


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
    done = subprocess.run([sys.executable, "-c", PEAKS], input=lines, env=environment, capture_output=True, text=True)
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
