"""python scripts/reliability/kill.py --moments 100 --record model_cards/evidence/reliability/kill.json

Kills each job with SIGKILL at random moments and looks at what is left: every result under its final name must be whole
or absent. Then the job runs again, a training with ``--resume``, and must give the same as a run that nothing disturbed.
Half of the moments are points in time, uniform over the job. The other half are file operations (open for writing,
rename, remove, make a folder), of which the process kills itself just before a random one: most faults can only happen
there, and time alone rarely meets them.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from jobs import JOBS, Job, faults, results
from records import write_record

FILE_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink")
PATIENCE_SECONDS = 300


def is_file_event(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an audit event of Python changes files."""
    if event != "open":
        return event in FILE_EVENTS
    mode, flags = arguments[1], arguments[2]
    return any(letter in str(mode or "") for letter in "wax+") or bool(flags & (os.O_WRONLY | os.O_RDWR))


def fork(work: Callable[[], None], said: Path, fatal: int | None = None) -> int:
    """Start ``work`` in a copy of this process; it kills itself before file event ``fatal`` (None: never).

    A run without ``fatal`` appends the number of its file events to ``said``; an error is written there as well.
    """
    process = os.fork()
    if process:
        return process
    seen = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if is_file_event(event, arguments):
            if seen == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    code = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        sys.addaudithook(count)
        work()
        events = seen
        said.write_text(str(events))
        code = 0
    except BaseException:
        said.write_text(traceback.format_exc())
    finally:
        os._exit(code)


def wait(process: int, said: Path) -> None:
    """Wait for the end of a run that must succeed.

    Raises:
        RuntimeError: it failed, or does not end.
    """
    started = time.monotonic()
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            break
        if time.monotonic() - started > PATIENCE_SECONDS:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise RuntimeError("the job does not end")
        time.sleep(0.001)
    if status:
        raise RuntimeError(f"the job failed: {said.read_text() if said.is_file() else status}")


def attack(job: Job, moments: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill ``job`` at so many moments.

    Returns:
        ``moments``, of which ``killed`` met a running process; ``faults`` and ``reruns_that_differ``, as texts; and the
        job's ``seconds`` and ``file_events``.
    """
    inputs, said = folder / "inputs", folder / "said"
    inputs.mkdir()
    wait(fork(lambda: job.set_up(inputs), said), said)
    # The first run loads what only a run loads; the second is the measure.
    for name in ("first", "undisturbed"):
        out = folder / name
        started = time.monotonic()
        wait(fork(lambda out=out: job.run(inputs, out, False), said), said)  # type: ignore[misc]
        seconds = time.monotonic() - started
    events, undisturbed = int(said.read_text()), results(folder / "undisturbed")
    if results(folder / "first") != undisturbed:
        raise RuntimeError(f"two runs of {job.name} that nothing disturbs differ: they cannot be compared")
    rng, wrong, differ, killed = random.Random(seed), [], [], 0
    for moment in range(moments):
        out = folder / f"out{moment}"
        by_event = moment % 2 == 1
        fatal = rng.randrange(events) if by_event else None
        delay = rng.uniform(0, seconds)
        process = fork(lambda out=out: job.run(inputs, out, False), said, fatal)  # type: ignore[misc]
        if not by_event:
            time.sleep(delay)
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        killed += os.WIFSIGNALED(status)
        when = f"before file event {fatal} of {events}" if by_event else f"after {delay:.3f} of {seconds:.3f} s"
        wrong += [f"{when}: {fault}" for fault in faults(job, out, undisturbed)]
        try:
            wait(fork(lambda out=out: job.run(inputs, out, True), said), said)  # type: ignore[misc]
            found = results(out)
            if found != undisturbed:
                names = [n for n in {**found, **undisturbed} if found.get(n) != undisturbed.get(n)]
                differ.append(f"{when}: {', '.join(sorted(names))}")
        except RuntimeError as error:
            differ.append(f"{when}: {str(error).strip().splitlines()[-1]}")
        shutil.rmtree(out, ignore_errors=True)
    return {
        "moments": moments,
        "killed": killed,
        "faults": wrong,
        "reruns_that_differ": differ,
        "seconds": round(seconds, 3),
        "file_events": events,
    }


def main(
    moments: Annotated[int, typer.Option(min=1, help="For each job.")] = 100,
    job: Annotated[list[str] | None, typer.Option(help=f"{', '.join(JOBS)}.  [default: all]")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    record: Annotated[Path | None, typer.Option(help="Figures to write: .json.")] = None,
) -> None:
    """Kill, look, run again."""
    # A copy of a process has none of its threads.
    torch.set_num_threads(1)
    figures = {}
    for name in job or JOBS:
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = attack(JOBS[name], moments, seed, Path(folder))
        found = figures[name]
        typer.echo(
            f"{name}: killed {found['killed']} of {moments}, {len(found['faults'])} faults, "
            f"{len(found['reruns_that_differ'])} reruns that differ"
        )
        for text in found["faults"] + found["reruns_that_differ"]:
            typer.echo(f"  {text}")
    command = f"python scripts/reliability/kill.py --moments {moments} --seed {seed}"
    write_record(record, seed, {"command": command, "jobs": figures})
    if any(found["faults"] or found["reruns_that_differ"] for found in figures.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
