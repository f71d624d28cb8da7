"""python scripts/benchmarks/segmentation.py --json speed.json: seconds to segment a whole volume, form by form.

The pipeline with its network loaded, on the MNI152 template at 1 mm unless another volume is given; medians of turns in one
process, and beside each time the share of voxels whose label differs from the first row's. ``start`` is a new process that
imports the package and loads the weights.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from hf_binaryformer import __version__
from hf_binaryformer.commands.demo import load_mni152
from hf_binaryformer.pipelines.precision import fast_format
from hf_binaryformer.pipelines.segmentation import VolumeSegmentationPipeline
from hf_binaryformer.pipelines.volumes import Volume, read_volume
from measure import describe_device

COMMAND = "python scripts/benchmarks/segmentation.py"
# Backend, number format and layout of the network's images in memory; the others are compared with the first.
VARIANTS = (
    ("cpu", "float32", "contiguous"),
    ("cpu", "float32", "channels_last"),
    ("cpu", "bfloat16", "contiguous"),
    ("reference", "float32", "contiguous"),
)


def main(
    model: Annotated[str, typer.Option(help="Short name, folder or Hub id.")] = "binaryformer-tiny-brain",
    volume: Annotated[Path | None, typer.Option(help="Volume to segment.  [default: MNI152 at 1 mm]")] = None,
    turns: Annotated[int, typer.Option(min=1, help="Timings of each row.")] = 3,
    record: Annotated[Path | None, typer.Option("--json", help="Record to write: .json.")] = None,
) -> None:
    """Time a whole volume in turns, and compare labels."""
    scan = read_volume(volume) if volume else mni152()
    rows = measure(scan, model, turns)
    table = Table("backend", "dtype", "layout", "seconds", "labels that differ", "of those not 0 in either")
    for row in rows:
        words = row["backend"], row["dtype"], row["layout"], f"{row['median']:.1f}"
        table.add_row(*words, *(f"{share:.6f}" for share in row["differ"]))
    Console().print(table)
    starts = [start_seconds(model) for _ in range(turns)]
    content = {
        "command": f"{COMMAND} --model {model}",
        "model": model,
        "shape": list(scan.array.shape),
        "rows": rows,
        "start_seconds": starts,
        "auto_is": str(fast_format("cpu")).removeprefix("torch."),
        "device": describe_device(),
        "versions": {"torch": torch.__version__, "hf_binaryformer": __version__},
    }
    Console().print(f"start: {statistics.median(starts):.2f} s")
    if record:
        record.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def mni152() -> Volume:
    """The template that the demo segments."""
    with TemporaryDirectory() as folder:
        return read_volume(load_mni152(Path(folder))[0])


def measure(scan: Volume, model: str, turns: int) -> list[dict[str, Any]]:
    """Seconds of each turn and label differences, a row a variant."""
    pipelines = []
    for backend, dtype, layout in VARIANTS:
        pipelines.append(VolumeSegmentationPipeline.from_pretrained(model, backend=backend, dtype=dtype))
        if layout == "channels_last":
            pipelines[-1].model.to(memory_format=torch.channels_last)
    seconds: list[list[float]] = [[] for _ in VARIANTS]
    labels: list[np.ndarray] = []
    for turn in range(turns):
        for number, pipeline in enumerate(pipelines):
            start = time.perf_counter()
            result = pipeline(scan)
            seconds[number].append(time.perf_counter() - start)
            if turn == 0:
                labels.append(result.labels)
    return [
        {
            "backend": backend,
            "dtype": dtype,
            "layout": layout,
            "median": statistics.median(taken),
            "seconds": taken,
            "differ": differ(one, labels[0]),
        }
        for (backend, dtype, layout), taken, one in zip(VARIANTS, seconds, labels, strict=True)
    ]


def differ(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Share of voxels with another label: of all, and of those that are not background in both."""
    different, labelled = one != other, (one > 0) | (other > 0)
    return float(different.mean()), float(different.sum() / max(labelled.sum(), 1))


def start_seconds(model: str) -> float:
    """Seconds from nothing to a loaded network, in a process of its own."""
    code = f"from hf_binaryformer.commands.jobs import load_pipeline; load_pipeline({model!r}); print('loaded', flush=True)"
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        seconds = time.perf_counter() - start
    if said != "loaded\n":
        raise RuntimeError(f"{model} was not loaded: exit code {process.returncode}")
    return seconds


if __name__ == "__main__":
    typer.run(main)
