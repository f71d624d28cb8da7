"""What the benchmarks share: subjects to measure, interleaved timing, peak memory in a child process, the machine."""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from hf_binaryformer.kernels.processor import processor_name

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# A runtime's threads keep spinning after their work (OpenBLAS: tens of milliseconds). They would take the cores of the
# next subject.
REST_SECONDS = 0.05
# Size of the run that loads libraries and starts threads before memory is measured.
WARM_UP_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One thing to measure. Plain data, so that it can be sent to a child process.

    Args:
        name: what computes it, as printed.
        family: what it may be compared with: ratios are taken within a family, tokens, dtype and pass.
        tokens: sequence length N.
        head_dim: query and key channels d of each head.
        value_dim: value channels d_v of each head; None where there are no values.
        dtype: name of the type of the values.
        step: forward and backward instead of forward alone.
        is_baseline: the SDPA (of d_v = d = 64) whose time is divided by those of the others in its family.
        is_float: float attention, which others are compared with at the same d_v.
        device: torch device that computes it.
    """

    name: str
    family: str
    tokens: int
    head_dim: int
    value_dim: int | None
    dtype: str = "float32"
    step: bool = False
    is_baseline: bool = False
    is_float: bool = False
    device: str = "cpu"

    @property
    def pass_name(self) -> str:
        """The name of the pass in the JSON."""
        return "forward_backward" if self.step else "forward"

    def prepare(self) -> Callable[[], object]:
        """Make the inputs; the returned function computes once on them."""
        raise NotImplementedError


@dataclass
class Result:
    """What was measured of a subject: milliseconds of each round, and bytes above the inputs."""

    subject: Subject
    samples: list[float]
    peak_bytes: int | None = None
    ratio_to_sdpa: float | None = None
    ratio_to_same_value_dim: float | None = None

    @property
    def milliseconds(self) -> float:
        """Median over rounds."""
        return statistics.median(self.samples)

    def row(self) -> dict[str, Any]:
        """The row of the JSON."""
        s = self.subject
        return {
            "name": s.name,
            "tokens": s.tokens,
            "head_dim": s.head_dim,
            "value_dim": s.value_dim,
            "dtype": s.dtype,
            "pass": s.pass_name,
            "milliseconds": round(self.milliseconds, 5),
            "ratio_to_sdpa": None if self.ratio_to_sdpa is None else round(self.ratio_to_sdpa, 3),
            "peak_bytes": self.peak_bytes,
        }


def one_pass(forward: Callable[[], Tensor], leaves: Sequence[Tensor], step: bool) -> Callable[[], object]:
    """``forward`` without autograd, or with a backward to every leaf (leaves that it does not reach are skipped)."""
    if not step:
        return torch.no_grad()(forward)
    for leaf in leaves:
        leaf.requires_grad_()
    with torch.no_grad():
        grad_output = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), leaves, grad_output, allow_unused=True)


def time_interleaved(
    subjects: Sequence[Subject], rounds: int, turn_seconds: float, label: str, least_seconds: float = 0
) -> list[Result]:
    """Time subjects in turns: each has one turn per round, so that a disturbance of the machine affects all equally.

    Args:
        subjects: what to time; all are prepared at once.
        rounds: number of turns of each subject.
        turn_seconds: a subject is called again within its turn until about this much time is filled.
        label: shown beside the progress bar.
        least_seconds: further rounds are added until this much time has passed. If calls are short, all the wanted
            rounds could otherwise fall into one disturbance of a shared machine.

    Returns:
        For each subject the mean milliseconds of a call in each round, and ratios to the SDPA of its family.
    """
    actions, calls = [], []
    for subject in subjects:
        action = subject.prepare()
        action()
        calls.append(max(1, math.ceil(turn_seconds / _seconds(action, 1, subject.device))))
        actions.append(action)
    results = [Result(subject, []) for subject in subjects]
    started = time.perf_counter()

    def wanted_rounds() -> Iterator[int]:
        yield from range(rounds)
        while time.perf_counter() - started < least_seconds:
            yield len(results[0].samples)

    shown = Console(stderr=True)
    for _ in track(wanted_rounds(), description=label, total=rounds, console=shown, transient=True):
        for result, action, count in zip(results, actions, calls, strict=True):
            time.sleep(REST_SECONDS)
            if count > 1:
                action()  # brings its data into the cache again; not needed if one call fills the turn
            result.samples.append(1e3 * _seconds(action, count, result.subject.device))
    return with_ratios(results)


def _seconds(action: Callable[[], object], count: int, device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    for _ in range(count):
        action()
    wait()
    return (time.perf_counter() - started) / count


def with_ratios(results: list[Result]) -> list[Result]:
    """Fill in two times for each result, both divided by the result's own time.

    The first is that of SDPA with d_v = d, the second that of the fastest float attention with the same d_v.
    """

    def setting(s: Subject) -> tuple[Any, ...]:
        return s.family, s.tokens, s.dtype, s.step

    for result in results:
        rivals = [r for r in results if setting(r.subject) == setting(result.subject)]
        baseline = [r.milliseconds for r in rivals if r.subject.is_baseline]
        same = [
            r.milliseconds for r in rivals if r.subject.is_float and r.subject.value_dim == result.subject.value_dim
        ]
        if baseline:
            result.ratio_to_sdpa = min(baseline) / result.milliseconds
        if same:
            result.ratio_to_same_value_dim = min(same) / result.milliseconds
    return results


def measure_peaks(results: Sequence[Result], threads: int) -> None:
    """Fill in ``peak_bytes`` of forward + backward, each subject in a child process of its own."""
    chosen = [result for result in results if result.subject.step]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        peaks = pool.map(extra_bytes, [result.subject for result in chosen], repeat(threads))
        shown = Console(stderr=True)
        for result, peak in zip(
            chosen, track(peaks, "peak memory", total=len(chosen), console=shown, transient=True), strict=True
        ):
            result.peak_bytes = peak


def memory_method() -> str:
    """How :func:`extra_bytes` measures on this system, in words."""
    if _reset_high_water():
        return "resident high-water mark (VmHWM, reset after inputs and a small warm-up) of a child process, minus its VmRSS"
    if sys.platform == "win32":
        return "not measured: this system has no high-water mark that Python can read"
    return "growth of ru_maxrss of a child process over its value after inputs and a small warm-up"


def extra_bytes(subject: Subject, threads: int) -> int | None:
    """Bytes that one call takes above its inputs (results included), to about a megabyte; see memory_method."""
    torch.set_num_threads(threads)
    warm_up = replace(subject, tokens=min(subject.tokens, WARM_UP_TOKENS)).prepare()
    warm_up()
    warm_up()
    action = subject.prepare()
    gc.collect()
    # Return freed pages to the system: if they were used again, the measurement would not see them.
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    if _reset_high_water():
        before = _status_bytes("VmRSS")
        action()
        return max(0, _status_bytes("VmHWM") - before)
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    action()
    return unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def describe_device() -> dict[str, Any]:
    """Name of the processor, number of cores, system; nothing that names the machine itself."""
    return {"cpu": processor_name(), "cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"}
