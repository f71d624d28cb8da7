"""python scripts/reliability/load.py --record model_cards/evidence/reliability/load.json

Segments a folder of many scans of three sizes in one run, as ``binaryformer segment FOLDER -o OUT`` does, with a damaged
file among them, and reads the memory of the process after each. Memory must stay as it is: the largest of the last fifth of
the scans is compared with the largest of the second fifth.
"""

from __future__ import annotations

import csv
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm.auto import tqdm

from hf_binaryformer.commands.many_scans import segment_scans
from jobs import head, save, save_network
from records import write_record

SHAPES = ((40, 48, 40), (64, 72, 56), (33, 90, 47))
GROWTH = 1.02


def resident_mb() -> float:
    """Memory of this process, MB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def segment_many(volumes: int) -> dict[str, Any]:
    """Memory in MB after each scan, what is made of it, and what the run left."""
    memory: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        scans, out = Path(name) / "scans", Path(name) / "out"
        for number in range(volumes):
            save(head(SHAPES[number % len(SHAPES)]), scans / f"{number:03d}.nii.gz")
        (scans / "damaged.nii.gz").write_bytes((scans / "000.nii.gz").read_bytes()[:-100])
        network = save_network(Path(name) / "network")
        started = time.perf_counter()
        with tqdm(total=volumes, desc="scans") as shown:

            def finished(name: str, report: Mapping[str, Any]) -> None:
                memory.append(resident_mb())
                shown.update()

            done = segment_scans([scans], out, model=str(network), finished=finished)
        seconds = time.perf_counter() - started
        with done["table"].open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    fifth = volumes // 5
    early, late = max(memory[fifth : 2 * fifth]), max(memory[-fifth:])
    return {
        "volumes": volumes,
        "rows": len(rows),
        "failed": [name for name, _ in done["failed"]],
        "first_mb": round(memory[0], 1),
        "early_mb": round(early, 1),
        "late_mb": round(late, 1),
        "growth": round(late / early, 4),
        "seconds": round(seconds, 1),
    }


def main(
    volumes: Annotated[int, typer.Option(min=5)] = 100,
    record: Annotated[Path | None, typer.Option(help="Figures to write: .json.")] = None,
) -> None:
    """Measure; exit code 1 if memory grows by more than 2 %."""
    figures = segment_many(volumes)
    typer.echo(figures)
    write_record(record, 0, {"command": f"python scripts/reliability/load.py --volumes {volumes}", **figures})
    if figures["growth"] > GROWTH:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
