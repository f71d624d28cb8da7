"""Tests of Parquet shards: what they are cut into, and the way back to a prepared folder."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hub_double import Repository, running_hub
from typer.testing import CliRunner

from hf_binaryformer.commands import prepare
from hf_binaryformer.data import folder_writer
from hf_binaryformer.data.folder_writer import NewCase, write_case, write_dataset
from hf_binaryformer.data.prepared_folder import PreparedFolder
from hf_binaryformer.data.shards import partition

MANIFEST = {"name": "toy", "source": "a test", "licence": "CC BY 4.0", "label_names": {"0": "background", "1": "one"}}
SPLITS = {"a": "train", "b": "train", "c-2.1": "validation", "d": "test"}


def build(out: Path, case: NewCase) -> dict:
    rng = np.random.default_rng(ord(case.case[0]))
    values = rng.integers(0, 900, (5, 6, 4)).astype(np.int16), rng.integers(0, 2, (5, 6, 4)).astype(np.uint8)
    image, labels = (nib.Nifti1Image(array, np.diag([1, 2, 3, 1])) for array in values)
    return write_case(out, case, image, labels if case.inputs[0] else None, {})


def prepared(out: Path, labelled: bool = True) -> Path:
    """A prepared folder of four cases, with shards."""
    cases = [NewCase(name, f"patient {name}", split, (labelled,)) for name, split in SPLITS.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_writer.sys, "argv", ["prepare_data.py", "toy", "--source", "/home/somebody/raw"])
        write_dataset(out, cases, build, MANIFEST, 1, 0, shard_mb=1)
    return out


def unpack(source: object, out: Path):
    return CliRunner().invoke(prepare.app, ["shards", "--source", str(source), "--out", str(out)])


def files(folder: Path) -> dict[str, bytes]:
    """Volumes by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.nii.gz")}


def test_parts_keep_order_and_limit() -> None:
    rows = [{"case": str(n)} for n in range(6)]
    parts = partition(rows, [4, 4, 3, 20, 1, 9], 10)
    assert [[row["case"] for row in part] for part in parts] == [["0", "1"], ["2"], ["3"], ["4", "5"]]
    assert partition([], [], 10) == []


@pytest.mark.parametrize("labelled", [True, False])
def test_there_and_back(tmp_path: Path, labelled: bool) -> None:
    whole = prepared(tmp_path / "whole", labelled)
    result = unpack(whole / "shards", tmp_path / "back")
    assert result.exit_code == 0 and "4 volumes" in result.output, result.output
    assert files(tmp_path / "back") == files(whole) and len(files(whole)) == (8 if labelled else 4)
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (whole, tmp_path / "back")]
    assert "/home/somebody/raw" in manifests[0].pop("command") and manifests[1].pop("command")
    assert manifests[0] == manifests[1]
    assert "somebody" not in "".join(path.read_text() for path in (whole / "shards").glob("*.*"))
    assert [case.name for case in PreparedFolder(tmp_path / "back").split("train")] == ["a", "b"]
    assert CliRunner().invoke(prepare.app, ["check-leakage", str(tmp_path / "back")]).exit_code == 0


def lose_a_shard(shards: Path) -> None:
    next((shards / "data").glob("test-*")).unlink()


def change_a_hash(shards: Path) -> None:
    edit(shards, lambda rows: rows[2].update(label_sha256="0" * 64))


def name_another(shards: Path) -> None:
    edit(shards, lambda rows: rows[0].update(image="images/b.nii.gz"))


def move_to_test(shards: Path) -> None:
    edit(shards, lambda rows: rows[1].update(split="test"))


def edit(shards: Path, change) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    change(manifest["cases"])
    (shards / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_shard, "lacks d (1 volumes)"),
        (change_a_hash, "label of c-2.1 (validation) is not what manifest.json says"),
        (name_another, "image of a (train) is not"),
        (move_to_test, "image of b (train) is not"),
        (lambda shards: (shards / "manifest.json").unlink(), "has no manifest.json"),
        (lambda shards: next(shards.glob("data/*.parquet")).write_bytes(b"PAR1"), "fetch the shards anew"),
        (shutil.rmtree, "is neither a folder nor a data set"),
    ],
)
def test_damage_is_named_and_nothing_written(tmp_path: Path, damage, message: str) -> None:
    whole = prepared(tmp_path / "whole")
    damage(whole / "shards")
    result = unpack(whole / "shards", tmp_path / "back")
    assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
    assert list(tmp_path.iterdir()) == [whole]


def test_shards_come_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    whole = prepared(tmp_path / "whole")
    with running_hub() as hub:
        paths = [path for path in (whole / "shards").rglob("*") if path.is_file()]
        contents = {path.relative_to(whole / "shards").as_posix(): path.read_bytes() for path in paths}
        hub.repositories["datasets/tester/toy"] = Repository(files=contents, commits=[list(contents)])
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        fetch = huggingface_hub.snapshot_download
        monkeypatch.setattr(
            huggingface_hub,
            "snapshot_download",
            lambda name, **options: fetch(name, **options, endpoint=hub.endpoint, cache_dir=tmp_path / "cache"),
        )
        assert unpack("tester/toy", tmp_path / "back").exit_code == 0
        missing = unpack("tester/nothing", tmp_path / "none")
    assert files(tmp_path / "back") == files(whole)
    assert missing.exit_code == 2 and "data set that the Hub gives" in " ".join(missing.output.split())
    assert not (tmp_path / "none").exists()
