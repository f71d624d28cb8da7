"""Runs training scripts in processes of their own: killed as by a power cut, interrupted as from a terminal, or two together."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
PATIENCE_SECONDS = 240


def environment(threads: int) -> dict[str, str]:
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}


def start(script: str, arguments: list[str], output: Path, iterations: int) -> subprocess.Popen:
    """A process in a session of its own, once its log has so many iterations (it logs every one)."""
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments, "--output", str(output)]
    # Sums in the same order as here.
    settings = dict(env=environment(torch.get_num_threads()), start_new_session=True, text=True)
    log, started = output / "log.jsonl", time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **settings)
    with ended_with_the_test(process):
        while not log.is_file() or len(log.read_text().splitlines()) < iterations:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() - started < PATIENCE_SECONDS, "it does not train"
            time.sleep(0.002)
    return process


@contextmanager
def ended_with_the_test(process: subprocess.Popen) -> Iterator[None]:
    """Whatever goes wrong, nothing of its session goes on."""
    try:
        yield
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise


def kill_in_training(script: str, arguments: list[str], output: Path, iterations: int) -> bool:
    """Kill ``script`` after a random iteration; returns whether there is a checkpoint to go on from."""
    wanted = random.SystemRandom().randint(1, iterations - 1)  # the tests seed the common one
    process = start(script, arguments, output, wanted)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    print(f"killed after iteration {len((output / 'log.jsonl').read_text().splitlines())}, wanted {wanted}")
    return any((output / "checkpoints").glob("step_????????"))


def interrupt_in_training(script: str, arguments: list[str], output: Path, iterations: int) -> tuple[int, str]:
    """Press Ctrl-C, which reaches the script and all processes that it started; returns exit status and stderr."""
    process = start(script, arguments, output, iterations)
    with ended_with_the_test(process):
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, said


def run_on_two_processes(script: str, arguments: list[str], output: Path) -> None:
    """Train to the end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "scripts" / script), *arguments, "--output", str(output)]
    settings = dict(env=environment(1), start_new_session=True, text=True)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **settings)
    with ended_with_the_test(process):
        _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, said
