"""Full disks, read-only targets, inputs that change, two runs at once: results are whole or absent, and errors say why."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from safetensors import SafetensorError

from hf_binaryformer.data.folder_writer import new_folder
from hf_binaryformer.pipelines import whole_files
from hf_binaryformer.pipelines.whole_files import WriteError, all_or_nothing, whole_folder, write_text, writing

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/reliability/disk.py"
RECORD = ROOT / "model_cards" / "evidence" / "reliability" / "disk.json"
NAMES = ["segment", "inpaint", "prepare", "pack", "unpack", "train"]
KINDS = {"disk_full", "read_only", "two_runs"}
CHANGES = {"overwritten", "truncated", "appended", "removed"}
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{SCRIPT.parent}", "OMP_NUM_THREADS": "1"}
# Two small attacks, with what is allowed here and without mounts; then a job that opens its results under their final
# names, and is slow with the first inputs.
QUICK = """
import json, sys, tempfile, time
from pathlib import Path
from disk import Trial, attack
from jobs import JOBS, Job
from targets import can_mount
def set_up(folder):
    (folder / "a.txt").write_text(("b" if (folder / "first").exists() else "a") * 200_000)
def run(inputs, out, again):
    out.mkdir(exist_ok=True)
    for name in ("one", "two"):
        (out / name).write_text((inputs / "a.txt").read_text())
        if "a" in (out / name).read_text():
            time.sleep(0.5)
found = {}
for name, mounts in (("as allowed", can_mount()), ("without mounts", False)):
    with tempfile.TemporaryDirectory() as folder:
        options = {"tries": 2, "changes": 1, "seed": 0, "mounts": mounts, "command_lines": False}
        found[name] = attack(JOBS["unpack"], Path(folder).resolve(), **options)
with tempfile.TemporaryDirectory() as folder:
    trial = Trial(Job("careless", set_up, run), Path(folder).resolve(), False, 0)
    trial.fill_disk(1)
    trial.run_twice(1)
found["careless"] = trial.figures
Path(sys.argv[1]).write_text(json.dumps(found))
"""


def disturb(record: Path, names: list[str], *words: str) -> dict:
    """What the script finds, in a process of its own: it copies itself, and a copy has no threads."""
    command = [sys.executable, str(SCRIPT), *words, "--no-command-lines", "--record", str(record)]
    command += [word for name in names for word in ("--job", name)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(record.read_text())["jobs"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> dict:
    """Figures of all small attacks, from one process: it takes longest to load what the jobs need."""
    path = tmp_path_factory.mktemp("quick") / "found.json"
    done = subprocess.run([sys.executable, "-c", QUICK, str(path)], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())


@needs_fork
@pytest.mark.parametrize("place", ["as allowed", "without mounts"])
def test_a_few_tries(place, quick):
    job = quick[place]
    assert job["disk_full"]["disturbed"] and job["two_runs"]["tried"] == 2
    assert sum(job[kind]["tried"] for kind in CHANGES) == 4
    for kind in (KINDS | CHANGES) & job.keys():
        assert not job[kind]["faults"] and not job[kind]["reruns_that_differ"], job


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_more_tries(name, tmp_path):
    job = disturb(tmp_path / "record.json", [name], "--tries", "4", "--changes", "3", "--seed", "1")[name]
    assert job["disk_full"]["disturbed"] >= 2


@needs_fork
def test_the_script_sees_a_job_that_is_not_whole(quick):
    """A harness that finds nothing must be able to find something."""
    found = quick["careless"]
    for kind, said in (("disk_full", "is not whole"), ("disk_full", "what to do"), ("two_runs", "is not whole")):
        assert any(said in fault for fault in found[kind]["faults"]), found


def test_what_ended_badly_is_told():
    from processes import Ending

    assert "SIGBUS" in Ending(-7, "").problem
    assert "traceback: OSError: x" in Ending(1, "Traceback (most recent call last):\nOSError: x").problem
    assert "what to do" in Ending(1, "error: [Errno 28] No space left on device").problem
    assert "what to do" in Ending(1, "train: 10%error: no space left: free some").problem
    assert not Ending(1, "train: 10%\nerror: no space left: free some").problem
    box = "Usage: binaryformer\n╭─ Error ─╮\n│ Invalid value: another runs: wait for   │\n│ its end │\n╰───╯"
    assert not Ending(2, box).problem and Ending(2, box).message == "Invalid value: another runs: wait for its end"
    assert not Ending(0, "").problem


def test_changes_of_inputs(tmp_path):
    from inputs import Change

    path, rng = tmp_path / "a.nii.gz", random.Random(0)
    nib.save(nib.Nifti1Image(np.arange(60, dtype=np.float32).reshape(3, 4, 5), np.eye(4)), path)
    before, inode = path.read_bytes(), path.stat().st_ino
    for kind in sorted(CHANGES):
        change = Change(path, kind, rng)
        change.do()
        assert kind == "removed" or (path.read_bytes() != before and path.stat().st_ino == inode)
        assert path.exists() != (kind == "removed")
        if kind == "overwritten":
            assert nib.load(path).get_fdata()[0, 0, 0] == 40
        change.undo()
        assert path.read_bytes() == before
        inode = path.stat().st_ino


@pytest.mark.skipif(not RECORD.is_file(), reason="there is no record here")
def test_the_record_has_twenty_tries_of_each_job_and_no_fault():
    jobs = json.loads(RECORD.read_text())["jobs"]
    assert sorted(jobs) == sorted(NAMES)
    for name, job in jobs.items():
        kinds = KINDS | (set() if name == "pack" else CHANGES | {"command_line"})
        assert kinds <= job.keys()
        assert job["disk_full"]["disturbed"] >= 15 and job["two_runs"]["tried"] >= 20
        for kind in kinds:
            assert not job[kind]["faults"] and not job[kind]["reruns_that_differ"] and job[kind]["disturbed"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left for .*MB are free there.*: free some space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left for"),
        (OSError(errno.EFBIG, "File too large"), "no space left for"),
        (
            OSError(errno.EROFS, "Read-only file system"),
            "cannot be written to .Read-only.*: make it writable, or choose",
        ),
        (SafetensorError('IoError(Os { code: 28, kind: StorageFull, message: "No space" })'), "no space left for"),
        (
            RuntimeError("[enforce fail at inline_container.cc:664] ."),
            "could not be written completely .* free some",
        ),
    ],
)
def test_what_cannot_be_written_is_told_with_the_remedy(error, said, tmp_path):
    for context in (
        lambda: writing(tmp_path / "not there yet"),
        lambda: all_or_nothing([tmp_path / "a"]),
        lambda: whole_folder(tmp_path / "a"),
        lambda: new_folder(tmp_path / "a"),
    ):
        with pytest.raises(WriteError, match=said), context():
            raise error
    assert not any(tmp_path.iterdir())


def test_other_errors_stay_what_they_are(tmp_path):
    elsewhere = PermissionError(errno.EACCES, "Permission denied", "/somewhere/in.nii.gz")
    for error in (elsewhere, FileNotFoundError(errno.ENOENT, "No such file", "x"), ValueError("x"), KeyError("x")):
        with pytest.raises(type(error)) as raised, writing(tmp_path):
            raise error
        assert raised.value is error
    with pytest.raises(WriteError, match="choose another"), writing(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "x"))


def test_a_disk_that_is_full_after_some_bytes(tmp_path):
    """A limit on the size of files, which every machine has, stands for the disk."""
    resource = pytest.importorskip("resource")
    write_text(tmp_path / "a", "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(WriteError, match="no space left"):
            write_text(tmp_path / "a", "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


def put(folder: Path, content: str, ready: threading.Barrier) -> None:
    with all_or_nothing([folder / name for name in "abcd"]) as temporary:
        for path in temporary.values():
            path.write_text(content)
        ready.wait()


@pytest.mark.skipif(sys.platform == "win32", reason="needs flock")
def test_the_results_of_two_runs_do_not_mix(tmp_path, monkeypatch):
    replace, ready = os.replace, threading.Barrier(2)

    def slowly(source, target):
        threading.Event().wait(0.02 * random.random())
        replace(source, target)

    monkeypatch.setattr(whole_files.os, "replace", slowly)
    runs = [threading.Thread(target=put, args=(tmp_path, content, ready)) for content in ("one", "two")]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len({path.read_text() for path in tmp_path.iterdir()}) == 1 and len(list(tmp_path.iterdir())) == 4


def test_a_folder_that_is_locked_for_long_is_written_to(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(whole_files, "PATIENCE_SECONDS", 0.05)
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with all_or_nothing([tmp_path / "a", tmp_path / "b"]) as temporary:
        for path in temporary.values():
            path.write_text("x")
    os.close(handle)
    assert (tmp_path / "b").read_text() == "x"


def test_a_folder_that_cannot_be_read_is_written_to(tmp_path, monkeypatch):
    def forbidden(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(whole_files.os, "open", forbidden)
    with all_or_nothing([tmp_path / "a", tmp_path / "b"]) as temporary:
        for path in temporary.values():
            path.write_text("x")
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
