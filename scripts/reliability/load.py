"""python scripts/reliability/load.py --record model_cards/evidence/reliability/load.json

Segments many volumes of three sizes in one process, each file into files with picture, report and probabilities, and reads
the memory of the process after each. Memory must stay as it is: the largest of the last fifth of the volumes is compared
with the largest of the second fifth.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm.auto import tqdm

from hf_binaryformer.commands.jobs import segment_file
from jobs import head, save, save_network
from records import write_record

SHAPES = ((40, 48, 40), (64, 72, 56), (33, 90, 47))
GROWTH = 1.02


def resident_mb() -> float:
    """Memory of this process, MB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def segment_many(volumes: int) -> dict[str, Any]:
    """Memory in MB after each volume, and what is made of it."""
    memory, started = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        network = save_network(folder / "network")
        for number in tqdm(range(volumes), desc="volumes"):
            path = save(head(SHAPES[number % len(SHAPES)]), folder / "in.nii.gz")
            outputs = {key: folder / f"{number}.{key}" for key in ("png", "json", "prob.nii.gz")}
            segment_file(
                path,
                folder / f"{number}.nii.gz",
                overlay=outputs["png"],
                report=outputs["json"],
                probabilities=outputs["prob.nii.gz"],
                model=str(network),
            )
            for file in (*outputs.values(), folder / f"{number}.nii.gz"):
                file.unlink()
            memory.append(resident_mb())
    fifth = volumes // 5
    early, late = max(memory[fifth : 2 * fifth]), max(memory[-fifth:])
    return {
        "volumes": volumes,
        "first_mb": round(memory[0], 1),
        "early_mb": round(early, 1),
        "late_mb": round(late, 1),
        "growth": round(late / early, 4),
        "seconds": round(time.perf_counter() - started, 1),
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
