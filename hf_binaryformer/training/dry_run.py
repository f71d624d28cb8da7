"""``--dry-run`` of the training scripts: tries two steps on random data of the recipe's size, and measures the cost."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset

from hf_binaryformer.training.loop import Task, run, start
from hf_binaryformer.training.run_log import read_log

# The first step includes setup; the time of the second one is the cost of a step.
STEPS = 2


class RandomSamples(Dataset):
    """Images of noise with random labels.

    Args:
        image_shape: shape (C, H, W) of "pixel_values", float32, normally distributed.
        label_shape: shape of "labels", int64; () for one label per image.
        classes: labels are 0 ... classes - 1.
        length: number of samples.
    """

    def __init__(self, image_shape: tuple[int, ...], label_shape: tuple[int, ...], classes: int, length: int) -> None:
        self._image_shape, self._label_shape, self._classes, self._length = image_shape, label_shape, classes, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(number)
        return {
            "pixel_values": torch.randn(self._image_shape, generator=generator),
            "labels": torch.randint(self._classes, self._label_shape, generator=generator),
        }


def rehearse(train: dict[str, Any], build: Callable[[Accelerator], Task]) -> None:
    """Train :data:`STEPS` steps in a temporary folder and print a line of JSON.

    Its keys: parameters, batch_size, processes, device, mixed_precision, losses (one per step), seconds_per_step, minutes
    (of the whole training at that pace), peak_gib (peak memory of this process: on the GPU if there is one, otherwise all
    of its memory).

    Args:
        train: the recipe's section; it is changed in place to the shortened training.
        build: makes the task, on random data.
    """
    iterations = train["iterations"]
    train |= {"iterations": STEPS, "log_every": 1, "trackers": []}
    train |= dict.fromkeys(("validate_every", "best_by", "checkpoint_every"))
    accelerator = start(train, None)
    with TemporaryDirectory() as own:
        folder = Path(own)
        task = build(accelerator)
        run(task, train, accelerator, folder, resume=False, stop_after=None)
        if not accelerator.is_main_process:
            return
        records = read_log(folder / "log.jsonl")
    on_gpu = accelerator.device.type == "cuda"
    unit = 1 if sys.platform == "darwin" else 1024
    whole = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.cuda.max_memory_allocated() if on_gpu else whole
    seconds = records[-1]["seconds"] - records[-2]["seconds"]
    report = {
        "parameters": sum(p.numel() for p in task.model.parameters()),
        "batch_size": train["batch_size"],
        "processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name() if on_gpu else accelerator.device.type,
        "mixed_precision": accelerator.mixed_precision,
        "losses": [round(record["loss"], 4) for record in records],
        "seconds_per_step": round(seconds, 3),
        "minutes": round(iterations * seconds / 60, 1),
        "peak_gib": round(peak / 2**30, 2),
    }
    print(json.dumps(report))
