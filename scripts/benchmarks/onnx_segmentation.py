"""python scripts/benchmarks/onnx_segmentation.py [--rounds 9] [--threads 1] [--out model_cards/evidence/onnx/cpu.json]

Writes segmentation networks as ONNX files, compares onnxruntime's logits with torch's, and times both on slices. It
refuses to write times if the logits differ by more than the tolerance. Run it on an idle machine.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.exporting import OPSET, export_onnx
from hf_binaryformer.modeling.networks import BinaryFormerForSemanticSegmentation
from measure import describe_device

ROOT = Path(__file__).parents[2]
# Largest difference of logits, as a share of the largest logit. Rounding may tip a bit, and with it some logits.
TOLERANCE = 1e-3
# A machine with more jobs than this for each core is not idle.
IDLE = 0.5
SUBJECTS = {
    "binaryformer-tiny-brain": lambda: BinaryFormerForSemanticSegmentation.from_pretrained("binaryformer-tiny-brain"),
    "vit-s8-224, hamming, random weights": lambda: BinaryFormerForSemanticSegmentation(
        BinaryFormerConfig(image_size=224, num_labels=14, attention_type="hamming")  # type: ignore[call-arg]
    ),
}


def milliseconds(computations: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median of each, in turns, so that a disturbance affects all."""
    samples: dict[str, list[float]] = {name: [] for name in computations}
    for _ in range(rounds + 1):
        for name, compute in computations.items():
            start = time.perf_counter()
            compute()
            samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(statistics.median(taken[1:]), 2) for name, taken in samples.items()}


def measure(name: str, folder: Path, rounds: int, threads: int) -> dict[str, Any]:
    """The row of one network."""
    import onnxruntime

    torch.manual_seed(0)
    model = SUBJECTS[name]().eval()
    path = export_onnx(model, folder / "network.onnx")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    image = torch.randn(1, model.config.num_channels, *model.config.image_shape)
    given = {"pixel_values": image.numpy()}
    with torch.inference_mode():
        expected = model(image).logits.numpy()
        found = session.run(None, given)[0]
        difference = float(np.abs(found - expected).max() / np.abs(expected).max())
        if difference > TOLERANCE:
            sys.exit(f"{name}: logits differ by {difference:.1e} of the largest, tolerance {TOLERANCE:.0e}: no times")

        def by_torch(backend: str | None) -> Callable[[], Any]:
            def compute() -> Any:
                model.set_attention_backend(backend)
                return model(image)

            return compute

        runs = {"onnxruntime": lambda: session.run(None, given), "torch, reference backend": by_torch("reference")}
        times = milliseconds(runs | {"torch, preferred backend": by_torch(None)}, rounds)
    return {
        "name": name,
        "shape": list(image.shape),
        "opset": OPSET,
        "megabytes": round(path.stat().st_size / 1e6, 1),
        "logits_difference": float(f"{difference:.2e}"),
        "same_labels": round(float((found.argmax(1) == expected.argmax(1)).mean()), 6),
        "milliseconds": times,
    }


def main(
    networks: Annotated[list[str], typer.Option("--network", help="Which of them; may be repeated.")] = list(SUBJECTS),  # noqa: B006
    rounds: Annotated[int, typer.Option(help="Timed calls of each.")] = 9,
    threads: Annotated[int, typer.Option(help="Of torch and of onnxruntime.")] = 1,
    out: Annotated[Path, typer.Option(help="Record to write.")] = ROOT / "model_cards/evidence/onnx/cpu.json",
) -> None:
    """Measure and write."""
    torch.set_num_threads(threads)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(name, Path(folder), rounds, threads) for name in networks]
    record = {
        "device": describe_device(),
        "threads": threads,
        "jobs_running_at_the_start": round(load, 1),
        "preliminary": load > IDLE * (os.cpu_count() or 1),
        "versions": {name: version(name) for name in ("torch", "onnx", "onnxruntime", "onnxscript")},
        "tolerance": TOLERANCE,
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    typer.run(main)
