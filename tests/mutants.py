"""Plant every fault of mutants.yaml into a copy of the package, and see that its tests fail: `make mutants`.

python tests/mutants.py [WORD ...] runs those whose file or text has one of the words. The exit code is 1 if a fault
survived its tests, or if these cannot run or fail without it.
"""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

ROOT = Path(__file__).parent.parent
PACKAGE = "hf_binaryformer"
# pytest-timeout ends a test that hangs, with the exit code of one that fails.
TIMEOUT_SECONDS = 60
# pytest's exit codes for "all passed" and "some failed"; others mean that the tests did not run.
PASSED, FAILED, CRASHED = 0, 1, 99
# Loaded once, before the processes that run the tests part, because loading takes longer than most tests.
LIBRARIES = (
    *(
        "pytest",
        "numpy",
        "scipy.ndimage",
        "scipy.stats",
        "nibabel",
        "pydicom",
        "SimpleITK",
        "typer.testing",
        "rich.table",
    ),
    *("torch", "torchvision", "timm", "monai.losses", "monai.metrics", "monai.transforms", "accelerate", "diffusers"),
    *("diffusers.training_utils", "transformers", "transformers.modeling_utils"),
)


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Args:
        file: where it is planted.
        find: text that is there exactly once.
        plant: what takes its place.
        tests: arguments of pytest that select the tests which must fail.
    """

    file: str
    find: str
    plant: str
    tests: str

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.file}: {' '.join(self.find.split())} -> {' '.join(self.plant.split())}"

    def planted(self) -> str:
        """The file's text with the fault.

        Raises:
            ValueError: the text is not there exactly once.
        """
        text = (ROOT / self.file).read_text(encoding="utf-8")
        if (count := text.count(self.find)) != 1:
            raise ValueError(
                f"{self.file} has {self.find!r} {count} times, expected once: correct the entry in tests/mutants.yaml"
            )
        return text.replace(self.find, self.plant)


def read_mutants() -> list[Mutant]:
    """All faults, in the order of the file."""
    content = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return [Mutant(**fault, tests=group["tests"]) for group in content for fault in group["faults"]]


def run_tests(tests: str, fault: Mutant | None = None) -> tuple[int, str]:
    """Exit code of pytest with a copy of the package, into which the fault is planted, and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        # The largest files are checkpoints, which no listed test reads.
        shutil.copytree(ROOT / PACKAGE, Path(folder, PACKAGE), ignore=shutil.ignore_patterns("checkpoints"))
        if fault:
            Path(folder, fault.file).write_text(fault.planted(), encoding="utf-8")
        output = Path(folder, "output.txt")
        child = os.fork()
        if not child:
            _run_and_exit(folder, tests, output)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code, output.read_text(encoding="utf-8", errors="replace")


def _run_and_exit(folder: str, tests: str, output: Path) -> NoReturn:
    """In a process of its own: run tests with the package of a folder, and end with pytest's exit code."""
    code = CRASHED
    try:
        import pytest

        file = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(ROOT)
        sys.path.insert(0, folder)
        os.environ["PYTHONPATH"] = folder
        # Some of the libraries that are loaded already are plugins of pytest.
        options = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
        code = int(pytest.main([*options, f"--timeout={TIMEOUT_SECONDS}", *shlex.split(tests)]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def main(words: list[str]) -> int:
    """Run the faults and print a line for each; 0 if all were killed."""
    assert PACKAGE not in sys.modules, "the copies of the package would not be loaded"
    # Before anything is loaded that reads them.
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for library in LIBRARIES:
        importlib.import_module(library)
    mutants = [m for m in read_mutants() if not words or any(word in m.name for word in words)]
    start, bad = time.perf_counter(), 0
    sound: dict[str, tuple[int, str]] = {}
    for mutant in mutants:
        # Tests that fail anyway would seem to see every fault.
        if mutant.tests not in sound:
            sound[mutant.tests] = run_tests(mutant.tests)
        code, output = sound[mutant.tests]
        verdict = "NOT SOUND"
        if code == PASSED:
            code, output = run_tests(mutant.tests, mutant)
            verdict = {PASSED: "SURVIVED", FAILED: "killed"}.get(code, "NOT RUN")
        bad += verdict != "killed"
        print(f"{verdict:<10} {mutant.name}", flush=True)
        if verdict.startswith("NOT"):
            print(output)
    print(f"{len(mutants) - bad} of {len(mutants)} killed in {time.perf_counter() - start:.0f} s")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
