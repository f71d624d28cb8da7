"""Names and links in files of strangers lead nowhere else, and small files that hold much take no more memory than stated."""

from __future__ import annotations

import json
import os
import shutil
import sys
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
from planting import META, NRRD
from safetensors.torch import load_file, save_file
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

# Where the package that is tested was found; processes of their own have to find the same one.
ROOT = Path(bf.__file__).parents[1]
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
