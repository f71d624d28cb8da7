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

ROOT = Path(__file__).parent.parent
PATIENCE_SECONDS = 240
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def environment(threads: int) -> dict[str, str]:
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}


def command_line(overrides: list[str], **values: object) -> list[str]:
    """Words of a command line: ``--name value`` of each, and ``--set`` before each override."""
    words = [(f"--{name}", str(value)) for name, value in values.items()] + [("--set", o) for o in overrides]
    return [word for pair in words for word in pair]


def launch(script: str, arguments: list[str], output: Path, processes: int) -> subprocess.Popen:
    """A script in a session of its own, on one process or on two."""
    command = [sys.executable, *(TWO_PROCESSES if processes == 2 else []), str(ROOT / "scripts" / script)]
    # One process adds up in the same order as the tests' own.
    threads = torch.get_num_threads() if processes == 1 else 1
    settings = dict(env=environment(threads), start_new_session=True, text=True)
    command += [*arguments, "--output", str(output)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **settings)


def start(script: str, arguments: list[str], output: Path, iterations: int, processes: int = 1) -> subprocess.Popen:
    """A script, once its log has so many iterations (it logs every one)."""
    log, started = output / "log.jsonl", time.monotonic()
    process = launch(script, arguments, output, processes)
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


def interrupt_in_training(
    script: str, arguments: list[str], output: Path, iterations: int, processes: int = 1, number: int = signal.SIGINT
) -> tuple[int, str]:
    """Press Ctrl-C, which reaches all processes of the script's session, or send another signal; exit status and stderr."""
    process = start(script, arguments, output, iterations, processes)
    with ended_with_the_test(process):
        os.killpg(process.pid, number)
        _, said = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, said


def run_on_two_processes(script: str, arguments: list[str], output: Path) -> None:
    """Train to the end."""
    process = launch(script, arguments, output, processes=2)
    with ended_with_the_test(process):
        _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, said
