"""Files and folders are replaced as a whole; what is left behind is told from what another process is writing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import typer
from torch import nn

from hf_binaryformer.data.claims import claim, claimed_folder, remove_left_behind
from hf_binaryformer.data.folder_writer import new_folder, write_manifest
from hf_binaryformer.pipelines import nifti
from hf_binaryformer.pipelines.volumes import VolumeError, read_volume
from hf_binaryformer.pipelines.whole_files import (
    ChangedError,
    all_or_nothing,
    unchanged,
    whole_file,
    whole_folder,
    write_text,
)
from hf_binaryformer.training.checkpoints import only_run_in, remove_whole
from hf_binaryformer.training.run_log import save_model

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from hf_binaryformer.data.claims import claim, claimed_folder
place = Path(sys.argv[1])
with claim(place), claimed_folder(place, ".x-") as folder:
    (folder / "half").write_text("h")
    print(folder.name, flush=True)
    time.sleep(600)
"""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_is_seen_only_when_it_is_whole(tmp_path):
    path = tmp_path / "a.nii.gz"
    path.write_text("old")
    with whole_file(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old" and temporary.name.endswith("-a.nii.gz") and temporary.name.startswith(".")
    assert path.read_text() == "half" and names(tmp_path) == {"a.nii.gz"}
    with pytest.raises(ArithmeticError), all_or_nothing([path, tmp_path / "b"]) as temporary:
        temporary[path].write_text("new")
        raise ArithmeticError
    assert path.read_text() == "half" and names(tmp_path) == {"a.nii.gz"}
    write_text(path, "Rückenmark")
    assert path.read_text(encoding="utf-8") == "Rückenmark"


def test_names_differ_although_process_numbers_repeat(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)
    with whole_file(tmp_path / "a") as one, whole_file(tmp_path / "a") as two, new_folder(tmp_path / "out") as three:
        one.write_text("1")
        two.write_text("2")
        with new_folder(tmp_path / "out") as four:
            assert three != four
            write_manifest(four, {"cases": []})
        for path in three.iterdir():
            path.unlink()
        (tmp_path / "out" / "manifest.json").unlink()
    assert (tmp_path / "a").read_text() == "1"


def test_a_folder_takes_the_place_of_the_old_one_as_a_whole(tmp_path):
    place = tmp_path / "model"
    for content in ("one", "two"):
        with whole_folder(place) as temporary:
            (temporary / content).write_text(content)
            assert not (place / content).exists()
        assert names(place) == {content} and names(tmp_path) == {"model"}
    with pytest.raises(ArithmeticError), whole_folder(place):
        raise ArithmeticError
    assert names(place) == {"two"} and names(tmp_path) == {"model"}


def test_a_network_is_never_seen_in_part(tmp_path):
    """What the trainings do at their end, with a network that fails while it is saved."""

    class Fails(nn.Linear):
        def save_pretrained(self, folder, state_dict):
            folder.mkdir(exist_ok=True)
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="no space left for .* MB are free"), whole_folder(tmp_path / "model") as place:
        save_model(Fails(2, 2), place, "float32")
    assert names(tmp_path) == set()


def hold(place: Path) -> subprocess.Popen:
    """A process that claims ``place``, and a folder in it."""
    command = [sys.executable, "-c", HOLD, str(place)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.skipif(sys.platform == "win32", reason="needs flock")
def test_leftovers_of_the_dead_are_removed_and_the_work_of_the_living_is_not(tmp_path):
    process = hold(tmp_path)
    try:
        folder = tmp_path / process.stdout.readline().strip()
        assert folder.is_dir()
        assert not remove_left_behind(tmp_path, ".x-") and (folder / "half").is_file()
        refused = pytest.raises(typer.BadParameter, match="another training writes to .*wait for its end")
        with refused, only_run_in(tmp_path, True):
            pass
        with only_run_in(tmp_path, False):
            pass
    finally:
        process.kill()
        process.communicate()
    assert folder.is_dir()
    with only_run_in(tmp_path, True):
        assert remove_left_behind(tmp_path, ".x-") and not folder.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_does_not_keep_the_claim(tmp_path):
    """Data workers outlive a killed training by seconds; the next one need not wait for them."""
    code = (
        "import os, sys, time, pathlib\nfrom hf_binaryformer.data.claims import claim\n"
        "with claim(pathlib.Path(sys.argv[1])):\n    if os.fork() == 0:\n        time.sleep(5)\n        os._exit(0)\n"
        "    print('ready', flush=True)\n    time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    process.stdout.readline()
    time.sleep(0.2)
    with claim(tmp_path) as free:
        assert free is False
    process.kill()
    process.wait()
    with claim(tmp_path) as free:
        assert free is True
    process.stdout.close()


def test_a_name_with_signs_of_a_pattern_is_taken_as_it_is(tmp_path):
    for name in (".a[b]*-12345678", ".ab-12345678"):
        (tmp_path / name).mkdir()
    assert remove_left_behind(tmp_path, ".a[b]*-") and names(tmp_path) == {".ab-12345678"}
    with claimed_folder(tmp_path, ".a[b]*-") as folder:
        assert not remove_left_behind(tmp_path, ".a[b]*-") and folder.is_dir()


def test_the_second_of_two_runs_says_so(tmp_path, capsys):
    with pytest.raises(typer.Exit), new_folder(tmp_path / "out") as mine:
        (mine / "images").mkdir()
        with new_folder(tmp_path / "out") as other:
            write_manifest(other, {"cases": ["other"]})
    assert "was filled by another run meanwhile" in capsys.readouterr().err
    assert names(tmp_path) == {"out"} and names(tmp_path / "out") == {"manifest.json"}


def test_an_empty_folder_is_filled_and_a_mount_that_a_killed_run_has_half_filled(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    with new_folder(out) as folder:
        assert folder.parent == tmp_path
        write_manifest(folder, {"cases": []})
    assert names(out) == {"manifest.json"}
    (out / "manifest.json").unlink()

    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    (out / "images").mkdir()
    (out / ".out-0123abcd").mkdir()
    with new_folder(out) as folder:
        assert folder.parent == out and not (out / "images").exists()
        write_manifest(folder, {"cases": []})
    assert names(out) == {"manifest.json"}
    with pytest.raises(typer.Exit), new_folder(out):
        pass


def test_a_checkpoint_goes_under_another_name_first(tmp_path, monkeypatch):
    checkpoint = tmp_path / "step_00000002"
    checkpoint.mkdir()
    (checkpoint / "a").write_text("a")
    monkeypatch.setattr("hf_binaryformer.training.checkpoints.shutil.rmtree", lambda *a, **k: None)
    remove_whole(checkpoint)
    assert names(tmp_path) == {"step_00000002.old.partial"}
    remove_whole(checkpoint)


def save(path: Path) -> Path:
    nib.save(nib.Nifti1Image(np.arange(60, dtype=np.float32).reshape(3, 4, 5), np.eye(4)), path)
    return path


@pytest.mark.parametrize("change", ["overwritten", "replaced", "removed"])
def test_a_volume_that_changes_while_it_is_read_is_refused(change, tmp_path, monkeypatch):
    path, whole = save(tmp_path / "a.nii"), nifti.read_file

    def read_and_disturb(name):
        image = whole(name)
        if change == "overwritten":
            with path.open("r+b") as file:
                file.seek(400)
                file.write(b"x")
            os.utime(path, ns=(1, 1))
        elif change == "replaced":
            save(tmp_path / "b.nii").replace(path)
        else:
            path.unlink()
        return image

    assert read_volume(path).array.shape == (3, 4, 5)
    monkeypatch.setattr(nifti, "read_file", read_and_disturb)
    with pytest.raises(VolumeError, match=r"a.nii changed while it was read, expected a file at rest"):
        read_volume(path)


def test_a_folder_that_changes_while_it_is_read_is_refused(tmp_path):
    with unchanged(tmp_path):
        pass
    with pytest.raises(ChangedError, match="changed while it was read"), unchanged(tmp_path):
        (tmp_path / "new").write_text("slice")
