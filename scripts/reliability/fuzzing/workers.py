"""Runs inputs in forked processes, so that a crash, a hang or a flood of memory is noticed and ends none of the others."""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from fuzzing.targets import Sample, Target

MB = 10**6
# A process of this many inputs; what a library leaks from input to input counts as memory of all of them.
BATCH = 250
# Address space above what a worker has when it starts. Threads reserve some of it without use.
ADDRESS_BYTES = 3 * 2**30
# Traces of failures that a summary keeps.
KEPT_FAILURES = 60
MEMORY_SIGNS = ("allocate memory", "bad_alloc", "out of memory", "unable to allocate")


@dataclass
class Limits:
    """What an input may cost: seconds, and MB of resident memory above a worker's own."""

    seconds: float = 5.0
    memory_mb: float = 512.0


@dataclass
class Summary:
    """Outcome of the inputs of one format; ``failures`` also counts hangs, crashes and excess of memory."""

    inputs: int = 0
    read: int = 0
    refused: int = 0
    failures: int = 0
    crashed: int = 0
    hung: int = 0
    slowest_seconds: float = 0.0
    peak_memory_mb: float = 0.0
    kinds: dict[str, int] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, number: int, outcome: str, detail: str = "") -> None:
        """Count an input; any outcome but "read" and "refused" is a failure."""
        self.inputs += 1
        if outcome in ("read", "refused"):
            setattr(self, outcome, getattr(self, outcome) + 1)
            return
        self.failures += 1
        self.kinds[outcome] = self.kinds.get(outcome, 0) + 1
        if len(self.examples) < KEPT_FAILURES and self.kinds[outcome] <= 4:
            self.examples.append({"number": number, "outcome": outcome, "detail": detail})

    def as_json(self) -> dict[str, Any]:
        """All figures; examples only where there are failures."""
        figures = asdict(self)
        figures["slowest_seconds"] = round(self.slowest_seconds, 3)
        figures["peak_memory_mb"] = round(self.peak_memory_mb, 1)
        return figures if self.failures else {k: v for k, v in figures.items() if k not in ("kinds", "examples")}


def make_input(target: Target, samples: Sequence[Sample], seed: int, number: int) -> tuple[Sample, bytes, Random]:
    """Input ``number`` of a format: the sample that it comes from, its bytes, and the generator for what is left."""
    rng = Random(f"{seed}/{target.name}/{number}")
    sample = samples[rng.randrange(len(samples))]
    data = sample.data
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = target.mutate(data, rng)
    return sample, data, rng


def run_input(target: Target, sample: Sample, data: bytes, rng: Random) -> tuple[str, str]:
    """Write and read one input: "read", "refused" or the kind of failure, and its trace."""
    sample.path.write_bytes(data)
    try:
        result = target.read(sample, rng)
    except Exception as error:
        trace = "".join(traceback.format_exception(error))
        chain: list[BaseException] = [error]
        while following := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(following)
        for link in chain:
            if isinstance(link, MemoryError) or any(sign in str(link).lower() for sign in MEMORY_SIGNS):
                return f"memory: {type(link).__name__}", trace
        # A subclass such as UnicodeDecodeError is not what a reader documents.
        if type(error) in target.refusals:
            return "refused", trace
        return type(error).__name__, trace
    return ("read", "") if (fault := target.fault_of(result)) is None else (f"not sane: {fault}", "")


def files_below(folder: Path) -> list[str]:
    """Names of all files, to find out what a reader has left behind."""
    return sorted(str(Path(where) / name) for where, _, names in os.walk(folder) for name in names)


def work(target: Target, folder: Path, numbers: Sequence[int], seed: int, limits: Limits, out: int, trace: int) -> None:
    """All of a worker's inputs; a line of JSON on ``out`` before each input, and one after it."""
    tempfile.tempdir = str(folder / "scratch")
    Path(tempfile.tempdir).mkdir(exist_ok=True)
    samples = target.samples(folder / "samples")
    for sample in samples:
        # Whatever libraries load or keep at the first use belongs to the worker, not to an input.
        for _ in range(2):
            run_input(target, sample, sample.data, Random(0))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_BYTES, resource.RLIM_INFINITY))
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before = files_below(folder)
    for number in numbers:
        sample, data, rng = make_input(target, samples, seed, number)
        os.write(out, f'{{"begin": {number}}}\n'.encode())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        faulthandler.dump_traceback_later(limits.seconds, exit=True, file=trace)
        start = time.perf_counter()
        outcome, detail = run_input(target, sample, data, rng)
        seconds = time.perf_counter() - start
        faulthandler.cancel_dump_traceback_later()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        megabytes = (after - own) * 1024 / MB
        if after > peak and megabytes > limits.memory_mb:
            outcome, detail = f"memory: {round(megabytes)} MB", detail
        if (left := files_below(folder)) != before:
            outcome, detail, before = "files left behind", str(sorted({*left} - {*before})), left
        line = {"end": number, "outcome": outcome, "detail": "" if outcome in ("read", "refused") else detail}
        os.write(out, (json.dumps({**line, "seconds": seconds, "mb": megabytes}) + "\n").encode())


def run_batch(target: Target, numbers: Sequence[int], seed: int, limits: Limits, summary: Summary) -> int:
    """Run inputs in a process of their own; returns how many were run until it ended."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        with (folder / "trace").open("w+") as trace, (folder / "outcomes").open("w+") as outcomes:
            pid = os.fork()
            if pid == 0:
                code = 3
                try:
                    with open(os.devnull, "w") as silent:
                        # What libraries print over damaged files.
                        os.dup2(silent.fileno(), 1)
                        os.dup2(silent.fileno() if not os.environ.get("FUZZ_VERBOSE") else 2, 2)
                    (folder / "work").mkdir()
                    work(target, folder / "work", numbers, seed, limits, outcomes.fileno(), trace.fileno())
                    code = 0
                except BaseException:
                    traceback.print_exc(file=trace)
                    trace.flush()
                finally:
                    os._exit(code)
            _, status = os.waitpid(pid, 0)
            code = os.waitstatus_to_exitcode(status)
            outcomes.seek(0)
            trace.seek(0)
            lines, seen = [json.loads(line) for line in outcomes], trace.read()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for line in lines:
        if "end" in line:
            summary.add(line["end"], line["outcome"], line["detail"])
            summary.slowest_seconds = max(summary.slowest_seconds, line["seconds"])
            summary.peak_memory_mb = max(summary.peak_memory_mb, line["mb"])
    if code == 0:
        return len(numbers)
    if not lines or "begin" not in lines[-1]:
        raise RuntimeError(f"a worker of '{target.name}' ended with {code} outside an input: {seen}")
    number = int(lines[-1]["begin"])
    if code == 1:
        summary.hung += 1
        summary.slowest_seconds = max(summary.slowest_seconds, limits.seconds)
        summary.add(number, "hang", seen)
    else:
        name = signal.Signals(-code).name if code < 0 else f"exit {code}"
        summary.crashed += 1
        summary.add(number, f"crash: {name}", seen)
    return list(numbers).index(number) + 1


def run_format(target: Target, numbers: Sequence[int], seed: int, limits: Limits) -> Summary:
    """Run inputs of a format, in as many processes as it takes."""
    summary = Summary()
    target.preload()
    done = 0
    while done < len(numbers):
        done += run_batch(target, numbers[done : done + BATCH], seed, limits, summary)
    return summary
