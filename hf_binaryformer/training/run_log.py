"""What a training writes in addition to its checkpoints: a log, the final weights, and a summary for its card."""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open

from hf_binaryformer.pipelines.whole_files import write_text, writing
from hf_binaryformer.training.checkpoints import BEST_WEIGHTS, FREE_AND_RESUME, VALIDATION, Progress


class Log:
    """``output/log.jsonl``, one record per line, and the trackers."""

    def __init__(self, accelerator: Accelerator, output: Path, progress: Progress) -> None:
        self._accelerator, self._path, first = accelerator, output / "log.jsonl", progress.step
        self._started = time.perf_counter() - progress.seconds
        if accelerator.is_main_process:
            output.mkdir(parents=True, exist_ok=True)
            # Records are dropped that will be written again. A run that was killed has logged iterations after its
            # checkpoint. A run that was stopped between two records has logged losses that its next record repeats.
            known = read_log(self._path) if self._path.is_file() and first else []
            end = first - 1 if progress.parts else first
            write_text(self._path, "".join(json.dumps(record) + "\n" for record in known if record["step"] <= end))

    def seconds(self) -> float:
        """Seconds of training so far, including earlier starts up to their checkpoints."""
        return time.perf_counter() - self._started

    def write(self, record: dict[str, Any]) -> None:
        """Add a record with the seconds of training so far."""
        record["seconds"] = round(self.seconds(), 3)
        if self._accelerator.is_main_process:
            with writing(self._path, FREE_AND_RESUME), self._path.open("a") as log:
                log.write(to_json(record) + "\n")
        # Not every tracker takes words.
        figures = {k: v for k, v in record.items() if k != "step" and not isinstance(v, str)}
        self._accelerator.log(figures, step=record["step"])


def to_json(record: dict[str, Any]) -> str:
    """One line of JSON, with null for NaN and infinite numbers, which JSON does not have."""
    return json.dumps({k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()})


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log; a truncated last line, for example after the disk was full, is skipped."""
    records = []
    for line in path.read_text().splitlines():
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


def save_model(model: Any, folder: Path, dtype: str) -> None:
    """Run ``save_pretrained`` with weights in a number format that the configuration does not name.

    Half-precision files therefore still load as float32.
    """
    kind = getattr(torch, dtype)
    rounded = {key: t.to(kind) if t.is_floating_point() else t for key, t in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=rounded)


def write_summary(recipe: dict[str, Any], section: str, output: Path, device: torch.device) -> None:
    """Write ``output/training.json`` for the card: the last record, settings, device and torch's version.

    Validation figures are those of the saved weights: of the best validation, if that chooses the weights.
    """
    last = read_log(output / "log.jsonl")[-1]
    if recipe[section]["best_by"]:
        with safe_open(output / BEST_WEIGHTS, "pt") as file:
            last |= json.loads(file.metadata()[VALIDATION])
    chosen = {key: recipe[section][key] for key in ("batch_size", "learning_rate", "seed")}
    where = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type}
    summary = {"iterations": last.pop("step"), **last, **chosen, **where, "torch": torch.__version__}
    write_text(output / "training.json", json.dumps(summary, indent=2) + "\n")
