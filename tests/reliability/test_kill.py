"""Jobs killed at random moments: results are whole or absent, and a second run completes what the first began."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "model_cards" / "evidence" / "reliability" / "kill.json"
NAMES = ["segment", "inpaint", "prepare", "pack", "unpack", "train"]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def kill(moments: int, names: list[str], record: Path, seed: int) -> dict:
    """What the script finds, in a process of its own: it copies itself, and a copy has no threads."""
    command = [
        sys.executable,
        str(ROOT / "scripts/reliability/kill.py"),
        "--moments",
        str(moments),
        "--seed",
        str(seed),
    ]
    command += [word for name in names for word in ("--job", name)] + ["--record", str(record)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(record.read_text())["jobs"]


def test_a_few_moments(tmp_path):
    found = kill(2, ["segment", "pack", "train"], tmp_path / "record.json", seed=1)
    assert all(job["killed"] for job in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_ten_moments(name, tmp_path):
    found = kill(10, [name], tmp_path / "record.json", seed=2)[name]
    assert found["killed"] >= 5 and found["file_events"] > 3


def test_the_script_sees_what_is_not_whole(tmp_path):
    """A harness that finds nothing must be able to find something."""
    from jobs import JOBS, faults

    undisturbed = {"images/a.nii.gz": b"whole", "manifest.json": {"cases": []}}
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.nii.gz").write_bytes(b"who")
    found = faults(JOBS["prepare"], tmp_path, undisturbed)
    assert found == ["images/a.nii.gz is not whole", "only 1 of 2 files are in the folder"]
    (tmp_path / "images/a.nii.gz").write_bytes(b"whole")
    assert faults(JOBS["segment"], tmp_path, undisturbed) == []
    (tmp_path / "checkpoints/step_00000002").mkdir(parents=True)
    assert faults(JOBS["train"], tmp_path, undisturbed) == ["step_00000002: files.json is missing or unreadable"]


@pytest.mark.skipif(not RECORD.is_file(), reason="there is no record here")
def test_the_record_has_a_hundred_moments_of_each_job_and_no_fault():
    jobs = json.loads(RECORD.read_text())["jobs"]
    assert sorted(jobs) == sorted(NAMES)
    for job in jobs.values():
        assert job["moments"] >= 100 and not job["faults"] and not job["reruns_that_differ"]
