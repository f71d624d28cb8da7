"""Runs a training script in a process of its own and kills it, as a power cut would."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
PATIENCE_SECONDS = 240


def kill_in_training(script: str, arguments: list[str], output: Path, iterations: int) -> bool:
    """Kill ``script`` (which logs every iteration) after a random one; returns whether there is a checkpoint to go on from."""
    wanted = random.SystemRandom().randint(1, iterations - 1)  # the tests seed the common one
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments, "--output", str(output)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # sums in the same order as here
    log, started = output / "log.jsonl", time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while not log.is_file() or len(log.read_text().splitlines()) < wanted:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() - started < PATIENCE_SECONDS, "it does not train"
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
    print(f"killed after iteration {len(log.read_text().splitlines())}, wanted {wanted}")
    return any((output / "checkpoints").glob("step_????????"))
