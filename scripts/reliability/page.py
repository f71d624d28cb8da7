"""python scripts/reliability/page.py: writes docs/reliability.md from the records in model_cards/evidence/reliability

A record that is missing leaves "not measured" in its row.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
import yaml

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "model_cards" / "evidence" / "reliability"
PAGE = ROOT / "docs" / "reliability.md"
OPENING = """# Reliability

What the package promises, the test that holds each promise, and what was tried. Every figure comes from a record in
`model_cards/evidence/reliability`, which names the command that made it, the processor and the versions. This page is written
by `python scripts/reliability/page.py`.

## Promises

| promise | test | tried |
| --- | --- | --- |
"""
REPEATABLE = """
## What the same seed gives

On one machine, with one version of the package and of PyTorch, the same inputs, seed and number of threads give the same
bytes. The table says what else changes nothing, and how much what does change matters. It was measured on the CPU; on a GPU
nothing has been measured yet.

"""
CLOSING = """
A batch of another size, or another number of threads, lets a library sum in another order. Probabilities may then differ in
their last digit, and a label at a tie may change. Two ways of running the operator, "cpu" and "reference", agree within
rounding, not in bytes; each of them draws the same ternary numbers from the same seed.

Not promised: the same bytes on another processor, with another version of PyTorch, or on a GPU.
"""


@dataclass(frozen=True)
class Promise:
    """A row of the page.

    Args:
        text: what is promised.
        test: where it is tested.
        record: name of its record.
        figure: makes the last cell of the record.
    """

    text: str
    test: str
    record: str
    figure: Callable[[dict[str, Any]], str]


def number(value: float) -> str:
    """With a thin space between thousands."""
    return f"{value:,}".replace(",", " ")


def fuzzed(record: dict[str, Any]) -> str:
    """Of the damaged files."""
    found = record["formats"].values()
    inputs, failures = (sum(row[key] for row in found) for key in ("inputs", "failures"))
    slowest, memory = (max(row[key] for row in found) for key in ("slowest_seconds", "peak_memory_mb"))
    return (
        f"{number(inputs)} files in {len(found)} formats: {failures} failures; slowest {slowest:.1f} s, "
        f"at most {memory:.0f} MB"
    )


def sanitized(record: dict[str, Any]) -> str:
    """Of the compiled kernel."""
    calls = record["random_calls"]
    return f"{number(sum(calls.values()))} calls ({', '.join(calls)}): {record['failures']} failures"


def killed(record: dict[str, Any]) -> str:
    """Of the killed jobs."""
    jobs = record["jobs"].values()
    met, damaged, differ = (
        sum(job["killed"] for job in jobs),
        sum(len(job["faults"]) for job in jobs),
        sum(len(job["reruns_that_differ"]) for job in jobs),
    )
    return f"{number(met)} kills of {len(jobs)} jobs: {damaged} damaged results, {differ} reruns that differ"


def disturbed(record: dict[str, Any]) -> str:
    """Of full disks and inputs that change."""
    found = [
        figures
        for job in record["jobs"].values()
        for figures in job.values()
        if isinstance(figures, dict) and "disturbed" in figures
    ]
    met = sum(figures["disturbed"] for figures in found)
    damaged, differ = (sum(len(figures[key]) for figures in found) for key in ("faults", "reruns_that_differ"))
    return f"{number(met)} disturbances of {len(record['jobs'])} jobs: {damaged} damaged results, {differ} reruns that differ"


def agreed(record: dict[str, Any]) -> str:
    """Of the orientations."""
    rows = record["agreement"].values()
    worst = min(row["worst"] for row in rows if row["worst"] is not None)
    tried = sum(row["tried"] - row["refused"] for row in rows)
    size = "×".join(("512", "512", "200"))  # noqa: RUF001
    return (
        f"{number(tried)} volumes in {len(rows)} grids, up to {size}: worst agreement {worst:.4f}; one voxel is refused"
    )


def scaled(record: dict[str, Any]) -> str:
    """Of the changed backgrounds."""
    dice = {name: row["dice"] for name, row in record["changes"].items()}
    worst = min(dice, key=lambda name: dice[name])
    return f"{len(dice)} changes: Dice with the unchanged image at least {dice[worst]:.3f} ({worst})"


def loaded(record: dict[str, Any]) -> str:
    """Of many volumes."""
    return f"{record['volumes']} volumes: {record['early_mb']:.0f} MB, then {record['late_mb']:.0f} MB"


PROMISES = (
    Promise(
        "A damaged file is read or refused in one line; no crash, no hang, no leftover, at most 512 MB and 5 s",
        "`tests/reliability/test_fuzz.py`",
        "fuzz",
        fuzzed,
    ),
    Promise(
        "The compiled kernel stays inside its memory, whatever shapes and strides it gets",
        "`kernels/cpu/test_kernel.cpp` (`make sanitize`)",
        "sanitizers",
        sanitized,
    ),
    Promise(
        "A job that is killed leaves whole results or none, and runs again as if nothing had been",
        "`tests/reliability/test_kill.py`",
        "kill",
        killed,
    ),
    Promise(
        "A full disk, a read-only folder, an input that changes, two runs on one output: results are whole or absent",
        "`tests/reliability/test_disk.py`",
        "disk",
        disturbed,
    ),
    Promise(
        "Labels lie in the same place, however the volume is stored",
        "`tests/reliability/test_geometry.py`",
        "geometry",
        agreed,
    ),
    Promise(
        "Noise, stray voxels and z-scoring do not move the intensities that the network sees",
        "`tests/pipelines/test_intensity_faults.py`",
        "backgrounds",
        scaled,
    ),
    Promise(
        "Memory does not grow with the number of volumes",
        "`tests/reliability/test_load.py`",
        "load",
        loaded,
    ),
)


def planted_faults() -> str:
    """The row of the faults that are planted into the package itself."""
    groups = yaml.safe_load((ROOT / "tests" / "mutants.yaml").read_text(encoding="utf-8"))
    count = sum(len(group["faults"]) for group in groups)
    return f"| The tests see faults in the code | `tests/mutants.py` (`make mutants`) | {count} faults to plant |\n"


def planted_pickles() -> str:
    """The row of the files that strangers could plant."""
    names = runpy.run_path(str(ROOT / "tests" / "reliability" / "planting.py"))["PLANTED"]
    return (
        "| Files of strangers run no code, lead to nothing outside their folder, open no connection "
        "([SECURITY.md](../SECURITY.md)) | `tests/reliability/test_security.py` and its neighbours | "
        f"{len(names)} names under which pickles and code were planted: none was run |\n"
    )


def repeatable(record: dict[str, Any]) -> str:
    """The table of what changes nothing."""
    ways = list(dict.fromkeys(way for figures in record["results"].values() for way in figures))
    lines = [f"| result | {' | '.join(ways)} |", "| --- |" + " --- |" * len(ways)]
    for name, figures in record["results"].items():
        cells = []
        for way in ways:
            found = figures.get(way)
            if found is None:
                cells.append("")
            else:
                cells.append("same bytes" if not found["differ"] else f"within {found['largest_difference']:.0e}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def read(name: str) -> dict[str, Any] | None:
    """A record, or None."""
    path = RECORDS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def render() -> str:
    """The page."""
    text = OPENING
    for promise in PROMISES:
        record = read(promise.record)
        text += (
            f"| {promise.text} | {promise.test} | {'not measured' if record is None else promise.figure(record)} |\n"
        )
    text += planted_pickles() + planted_faults()
    record = read("determinism")
    return text + REPEATABLE + ("not measured\n" if record is None else repeatable(record)) + CLOSING


def main() -> None:
    """Write it."""
    PAGE.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
