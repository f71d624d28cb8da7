"""python scripts/reliability/fuzz.py --record model_cards/evidence/reliability/fuzz.json

Gives damaged files to every reader of the package: NIfTI (plain and gzip), .mha, .nrrd, DICOM (series and multi-frame),
config.json and weights of checkpoints, recipes, manifests and label names. An input is made from a small valid file by one
to three faults: flipped bits, boundary values, a cut end, blocks or fields that are lost, doubled or out of range. A reader
must read it or refuse it with an exception that its docstring names; it must not crash, hang, take memory beyond the bound or
leave a file behind, and what it reads must be sane.

Every input is made from the seed, the format and its number alone:
``--format nifti --only 1234 --keep input.nii`` makes one again, keeps it and prints what happens.
Exit code 1: at least one failure.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

# Before any library starts its threads: workers are forked.
os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import typer

from fuzzing.targets import TARGETS, Target
from fuzzing.workers import Limits, make_input, run_format, run_input
from records import write_record


def run_one(target: Target, seed: int, number: int, keep: Path | None) -> None:
    """Run one input in this process and print its outcome."""
    target.preload()
    with tempfile.TemporaryDirectory() as folder:
        sample, data, rng = make_input(target, target.samples(Path(folder) / "samples"), seed, number)
        if keep is not None:
            keep.write_bytes(data)
        outcome, trace = run_input(target, sample, data, rng)
    typer.echo(f"{target.name} {number}: {outcome}\n{trace}")


def main(
    formats: Annotated[list[str] | None, typer.Option("--format", help="One of the formats.  [default: all]")] = None,
    inputs: Annotated[int, typer.Option(help="Inputs of each format.")] = 10_000,
    first: Annotated[int, typer.Option(help="Number of the first input.")] = 0,
    only: Annotated[int | None, typer.Option(help="Run this input alone, and print its outcome.")] = None,
    keep: Annotated[Path | None, typer.Option(help="With --only: write the input here.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    seconds: Annotated[float, typer.Option(help="Limit of one input.")] = Limits.seconds,
    memory_mb: Annotated[float, typer.Option(help="Limit of one input, above the worker's own.")] = Limits.memory_mb,
    record: Annotated[Path | None, typer.Option(help="All figures to write: .json.")] = None,
) -> None:
    """Give damaged files to every reader, and count what happens."""
    if unknown := {*(formats or [])} - {*TARGETS}:
        raise typer.BadParameter(f"no format {', '.join(sorted(unknown))}; known are {', '.join(TARGETS)}")
    chosen = [TARGETS[name] for name in formats or TARGETS]
    if only is not None:
        for target in chosen:
            run_one(target, seed, only, keep)
        return
    limits = Limits(seconds, memory_mb)
    figures: dict[str, Any] = {}
    failures = 0
    for target in chosen:
        summary = run_format(target, range(first, first + inputs), seed, limits)
        figures[target.name] = summary.as_json()
        failures += summary.failures
        typer.echo(
            f"{target.name:<17}{summary.inputs:>7} inputs: {summary.read} read, {summary.refused} refused, "
            f"{summary.failures} failures ({summary.crashed} crashed, {summary.hung} hung), slowest "
            f"{summary.slowest_seconds:.2f} s, peak {summary.peak_memory_mb:.0f} MB"
        )
        for kind, count in sorted(summary.kinds.items()):
            numbers = [e["number"] for e in summary.examples if e["outcome"] == kind]
            typer.echo(f"    {count} x {kind}, for example {', '.join(map(str, numbers)) or 'not kept'}")
    command = f"python scripts/reliability/fuzz.py --inputs {inputs} --first {first} --seed {seed}"
    write_record(record, seed, {"command": command, "limits": asdict(limits), "formats": figures})
    raise typer.Exit(failures > 0)


if __name__ == "__main__":
    typer.run(main)
