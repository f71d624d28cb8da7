"""Every reader keeps to what it promises of damaged files, and the fuzzing notices one that does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORMATS = ("nifti", "nifti_gz", "mha", "nrrd", "dicom", "dicom_multiframe", "config", "safetensors", "recipe")
FORMATS = (*FORMATS, "manifest", "label_names")
# Readers with one fault each, in a program of its own because its workers are forked.
FAULTS = """
import ctypes, itertools, sys, time
from pathlib import Path
from fuzzing.targets import Sample, Target
from fuzzing.workers import Limits, run_format

def samples(folder):
    folder.mkdir()
    return [Sample(b"valid file", folder / "input", folder / "input")]

def reader(fault):
    def read(sample, rng):
        if sample.path.read_bytes() != sample.data:
            fault(sample)
    return read

def refuse(sample):
    raise ValueError("refused")

def decode(sample):
    b"\\xff".decode()

def hold(sample):
    bytearray(200 * 10**6)

def hide(sample):
    try:
        bytearray(2**40)
    except MemoryError as error:
        raise ValueError("hidden") from error

faults = {
    "refused": refuse, "UnicodeDecodeError": decode, "hang": lambda sample: time.sleep(60),
    "crash: SIGSEGV": lambda sample: ctypes.string_at(0), "memory: 2": hold, "memory: MemoryError": hide,
    "files left behind": lambda sample: (sample.path.parent / "left").write_text(""),
}
for name, fault in faults.items():
    target = Target("toy", samples, lambda data, rng: b"damaged", reader(fault), (ValueError,))
    summary = run_format(target, range(2), 0, Limits(seconds=1, memory_mb=100))
    assert summary.inputs == 2, summary
    if name == "refused":
        assert summary.refused == 2 and not summary.failures, summary
    else:
        assert summary.failures and all(kind.startswith(name) for kind in summary.kinds), (name, summary)
        assert summary.examples[0]["number"] == 0, summary
"""


def run(*words: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts/reliability'}",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=3000)


def check_formats(tmp_path: Path, inputs: int) -> None:
    pytest.importorskip("SimpleITK")
    record = tmp_path / "fuzz.json"
    done = run(str(ROOT / "scripts" / "reliability" / "fuzz.py"), "--inputs", str(inputs), "--record", str(record))
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(record.read_text())
    assert tuple(content["formats"]) == FORMATS
    for name, figures in content["formats"].items():
        assert figures["inputs"] == inputs == figures["read"] + figures["refused"], (name, figures)
        assert figures["slowest_seconds"] < content["limits"]["seconds"]
    assert {"seed", "versions", "processor"} <= content.keys()


@pytest.mark.skipif(sys.platform != "linux", reason="workers measure their memory in /proc")
def test_some_inputs_of_every_format(tmp_path):
    check_formats(tmp_path, 20)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="workers measure their memory in /proc")
def test_inputs_of_every_format(tmp_path):
    check_formats(tmp_path, 300)


@pytest.mark.skipif(sys.platform != "linux", reason="workers measure their memory in /proc")
def test_faults_are_noticed():
    done = run("-c", FAULTS)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="workers measure their memory in /proc")
def test_an_input_is_made_again_from_its_number(tmp_path):
    made = []
    for name in ("a", "b"):
        keep = tmp_path / name
        options = ("--format", "nifti", "--only", "7", "--keep", str(keep))
        done = run(str(ROOT / "scripts" / "reliability" / "fuzz.py"), *options)
        assert done.returncode == 0 and done.stdout.startswith("nifti 7: "), done.stderr
        made.append(keep.read_bytes())
    assert made[0] == made[1]
