"""The list of planted faults fits the code, and the script that plants them tells a fault from a harmless change."""

from __future__ import annotations

import ast
import dataclasses
import os
import shlex
import subprocess
import sys

import mutants
import pytest


@pytest.mark.parametrize("mutant", mutants.read_mutants(), ids=lambda m: m.name[:80])
def test_every_fault_can_be_planted(mutant: mutants.Mutant) -> None:
    assert mutant.plant != mutant.find
    ast.parse(mutant.planted())
    paths = [word.partition("::")[0] for word in shlex.split(mutant.tests) if word.startswith("tests/")]
    assert paths and all((mutants.ROOT / path).is_file() for path in paths), mutant.tests


def test_a_text_that_is_not_there_once_is_named() -> None:
    imports = (mutants.ROOT / "hf_binaryformer/pipelines/grids.py").read_text().count("import")
    for find, times in (("no such text", 0), ("import", imports)):
        with pytest.raises(ValueError, match=rf"grids\.py has '{find}' {times} times, expected once"):
            mutants.Mutant("hf_binaryformer/pipelines/grids.py", find, "", "").planted()


def verdicts(*listed: mutants.Mutant) -> list[str]:
    """First words of the script's lines, in a process that has not loaded the package."""
    code = (
        f"import mutants; from mutants import Mutant; mutants.read_mutants = lambda: {list(listed)!r}; mutants.main([])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=os.environ | {"PYTHONPATH": str(mutants.ROOT / "tests")},
        capture_output=True,
        text=True,
        check=True,
    )
    names = [mutant.name for mutant in listed]
    return [line.split("  ")[0] for line in done.stdout.splitlines() if any(line.endswith(name) for name in names)]


@pytest.mark.slow
def test_a_fault_is_killed_and_a_harmless_change_survives() -> None:
    fault = mutants.Mutant(
        "hf_binaryformer/pipelines/grids.py",
        "abs(x / y - 1) <= SAME",
        "abs(x / y - 1) > SAME",
        "tests/pipelines/test_grids.py -k count_as_equal",
    )
    harmless = dataclasses.replace(fault, plant="abs(1 - x / y) <= SAME")
    broken = dataclasses.replace(fault, plant="abs(x / y - 1) <= SAME)")
    no_tests = dataclasses.replace(fault, tests=fault.tests + "_to_nothing")
    found = verdicts(fault, harmless, broken, no_tests)
    assert found == ["killed", "SURVIVED", "NOT RUN", "NOT SOUND"]
