"""python scripts/reliability/disk.py --record model_cards/evidence/reliability/disk.json

Runs each job against a full disk (a small file system in memory, of many sizes), against a target that is read-only from
the start or becomes so, with inputs that are overwritten, truncated, appended to or removed while it reads, and twice at
once on one output. Jobs run as commands, in copies of this process. After each: every result under its final name is
whole or absent, and all results are of one run; an error is told in one line; nothing hidden stays behind; and a run
without the disturbance gives the same as if there had been none. Where mounting is not allowed, a limit on the size of
files stands for the full disk, and file modes for the read-only target, unless this is root.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from command_lines import command_line, run_command
from inputs import CHANGES, Change, files_read, set_up_other
from jobs import JOBS, PARTIAL, Job, faults, results
from processes import Copy, Ending, limit_files, load_same_modules
from records import write_record
from targets import PAGE, Target, can_mount, modes_count

# A change of an input follows so many seconds, at most, after the job has opened a file.
SOON = 0.03


class Trial:
    """Everything about one job: its inputs, its undisturbed results, and what was found.

    Args:
        job: what runs.
        folder: an empty folder to work in.
        mounts: whether targets are file systems of their own.
        seed: of the moments.
    """

    def __init__(self, job: Job, folder: Path, mounts: bool, seed: int) -> None:
        self.job, self.mounts, self.rng = job, mounts, random.Random(seed)
        self.inputs, self.other, self.said = folder / "inputs", folder / "other", folder / "said"
        # The place is the same for all runs, because some results name it.
        self.place = folder / "target"
        self.out = self.place / "out"
        self.figures: dict[str, dict[str, Any]] = {}
        self.messages: Counter[str] = Counter()
        self.inputs.mkdir()
        for work in (lambda: job.set_up(self.inputs), lambda: set_up_other(job, self.other)):
            self._succeed(work)
        self._warm_up(folder / "modules")
        # The first run loads what only a run loads.
        for _ in range(2):
            with Target(self.place, mounts) as target:
                started = time.monotonic()
                copy = self.start(self.inputs, tell_at=-1)
                self._check(copy.end(target.measure if mounts else lambda: None))
                self.seconds, self.events = time.monotonic() - started, copy.events
                self.undisturbed, self.bytes = results(self.out), target.largest
                sizes = [path.stat().st_size for path in self.out.rglob("*") if path.is_file()]
                self.largest_file = max(sizes)

    def _warm_up(self, names: Path) -> None:
        def work() -> None:
            # The command line ends by SystemExit.
            with suppress(SystemExit):
                run_command(self.job, self.inputs, self.out)
            names.write_text("\n".join(sys.modules))

        with Target(self.place, self.mounts):
            self._succeed(work)
        load_same_modules(names.read_text().splitlines())

    def start(self, inputs: Path, again: bool = False, **options: Any) -> Copy:
        """Start the job."""
        return Copy(lambda: run_command(self.job, inputs, self.out, again), self.said, self.inputs, **options)

    def _succeed(self, work: Callable[[], None]) -> None:
        self._check(Copy(work, self.said, self.inputs).end())

    def _check(self, ending: Ending) -> None:
        if ending.code:
            raise RuntimeError(f"{self.job.name} fails without any disturbance: {ending.said}")

    def results_of(self, inputs: Path) -> dict[str, Any]:
        """What the job makes of other inputs, or {} if it fails."""
        with Target(self.place, self.mounts):
            ending = self.start(inputs).end()
            return {} if ending.code else results(self.out)

    def judge(self, kind: str, when: str, ending: Ending, allowed: list[dict[str, Any]], clean: bool = True) -> None:
        """Note what is wrong after a disturbed run.

        Args:
            kind: of the disturbance.
            when: for the messages.
            ending: of the run.
            allowed: results of which those in place must be a part, all of the same.
            clean: whether nothing hidden may be left.
        """
        figures = self.figures_of(kind)
        wrong = min((faults(self.job, self.out, one) for one in allowed), key=len)
        if ending.code == 0 and results(self.out) not in allowed:
            wrong.append("reports success, but results are missing")
        if ending.problem:
            wrong.append(ending.problem)
        if ending.code > 0 and clean:
            wrong += [f"{name} stays behind" for name in leftovers(self.place)]
        figures["faults"] += [f"{when}: {fault}" for fault in wrong]
        if ending.code:
            self.messages[f"{kind}: {plain(ending.message, self.place.parent)}"] += 1

    def run_again(self, kind: str, when: str) -> None:
        """The run without the disturbance, into the same folder."""
        ending = self.start(self.inputs, again=True).end()
        if ending.code:
            self.figures_of(kind)["reruns_that_differ"].append(f"{when}: {ending.message}")
            return
        found = results(self.out)
        if found != self.undisturbed:
            names = [n for n in {**found, **self.undisturbed} if found.get(n) != self.undisturbed.get(n)]
            self.figures_of(kind)["reruns_that_differ"].append(f"{when}: {', '.join(sorted(names))}")

    def figures_of(self, kind: str) -> dict[str, Any]:
        """Where a kind of disturbance is counted."""
        return self.figures.setdefault(kind, {"tried": 0, "disturbed": 0, "faults": [], "reruns_that_differ": []})

    def count(self, kind: str, disturbed: bool) -> None:
        """One more try, which met the job or did not."""
        figures = self.figures_of(kind)
        figures["tried"] += 1
        figures["disturbed"] += disturbed

    def fill_disk(self, tries: int) -> None:
        """Disks of sizes from one page to what the job needs; every second one holds the results of an earlier run."""
        for number in range(tries):
            share = (number + self.rng.random()) / tries
            size = max(PAGE, round(share * self.bytes / PAGE) * PAGE) if self.mounts else None
            limit = None if self.mounts else round(share * self.largest_file)
            with Target(self.place, self.mounts) as target:
                older = self.put_older(number)
                if size is not None:
                    target.limit(size)
                ending = self.start(self.inputs, file_limit=limit).end()
                when = f"{size or limit} of {self.bytes or self.largest_file} bytes"
                self.judge("disk_full", when, ending, [self.undisturbed, *older])
                self.count("disk_full", ending.code != 0)
                target.make_room()
                self.run_again("disk_full", when)

    def put_older(self, number: int) -> list[dict[str, Any]]:
        """Put the results of the other inputs in place before every second run, if the job replaces results."""
        if number % 2 == 0 or self.job.is_folder or self.job.name == "train":
            return []
        self._check(self.start(self.other).end())
        return [results(self.out)]

    def protect(self, tries: int) -> None:
        """A target that is read-only from the start, or becomes so at a random moment."""
        for number in range(tries if self.mounts or modes_count() else 0):
            at_start = number < 2 or not self.mounts
            with Target(self.place, self.mounts) as target:
                older = self.put_older(number)
                if not self.job.is_folder:
                    self.out.mkdir(exist_ok=True)
                if at_start:
                    self.protect_now(target)
                copy = self.start(self.inputs)
                delay = self.rng.uniform(0, self.seconds)
                when = "from the start" if at_start else f"after {delay:.3f} of {self.seconds:.3f} s"
                if not at_start:
                    time.sleep(delay)
                    while not copy.has_ended() and not target.protect():
                        time.sleep(0.0005)
                ending = copy.end()
                # What became read-only cannot be cleaned.
                self.judge("read_only", when, ending, [self.undisturbed, *older], clean=at_start)
                self.count("read_only", ending.code != 0)
                self.unprotect(target)
                self.run_again("read_only", when)

    def protect_now(self, target: Target) -> None:
        """Nothing is being written: this cannot fail."""
        if not self.mounts and self.out.exists():
            self.out.chmod(0o555)
        if not target.protect():
            raise RuntimeError(f"{self.place} cannot be made read-only")

    def change_inputs(self, tries: int) -> None:
        """Change one input at a time: at a random moment, or soon after the job has opened a random one."""
        files, kinds = files_read(self.job, self.inputs), len(CHANGES)
        for number in range(tries * kinds if files else 0):
            kind, by_event = CHANGES[number % kinds], number // kinds % 2 == 1
            event, chosen = self.rng.randrange(self.events) if by_event else None, self.rng.choice(files)
            # Soon after a file is opened, it is that file in every second case.
            delay = SOON * self.rng.random() ** 3 if by_event else self.rng.uniform(0, self.seconds)
            with Target(self.place, self.mounts):
                copy = self.start(self.inputs, tell_at=event)
                opened = copy.wait_for_event() if by_event else None
                if opened in files and self.rng.random() < 0.5:
                    chosen = opened
                change = Change(chosen, kind, self.rng)
                time.sleep(delay)
                met = not copy.has_ended()
                change.do()
                name = chosen.relative_to(self.inputs)
                when = f"{name}, {delay:.3f} s after {f'opening file {event}' if by_event else 'the start'}"
                ending = copy.end()
                same = results(self.out) == self.undisturbed if ending.code == 0 else False
                allowed = [self.undisturbed]
                if ending.code == 0 and not same:
                    kept = self.place.parent / "kept"
                    shutil.copytree(self.out, kept)
                    allowed = [self.undisturbed, self.with_this_input(kept)]
                self.judge(kind, when, ending, allowed)
                self.count(kind, met and not same)
                change.undo()
                if ending.code:
                    self.run_again(kind, when)

    def with_this_input(self, kept: Path) -> dict[str, Any]:
        """What an undisturbed run makes of the inputs as they are now; the results in place stay."""
        shutil.rmtree(self.out)
        ending = self.start(self.inputs).end()
        found = {} if ending.code else results(self.out)
        shutil.rmtree(self.out, ignore_errors=True)
        kept.rename(self.out) if not self.mounts else shutil.move(kept, self.out)
        return found

    def run_twice(self, tries: int) -> None:
        """Two runs with different inputs on one output, at once or one after the other has begun."""
        theirs = self.results_of(self.other)
        second_said = self.said.with_name("said2")
        for number in range(tries):
            delay = 0.0 if number % 2 == 0 else self.rng.uniform(0, self.seconds)
            when = f"{delay:.3f} s apart"
            with Target(self.place, self.mounts):
                first = self.start(self.inputs)
                time.sleep(delay)
                met = not first.has_ended()
                second = Copy(lambda: run_command(self.job, self.other, self.out), second_said, self.inputs)
                endings = [first.end(), second.end()]
                best = min(endings, key=lambda ending: abs(ending.code))
                self.judge("two_runs", when, best, [self.undisturbed, theirs], clean=False)
                for ending in endings:
                    if ending is not best:
                        self.judge("two_runs", when, ending, [self.undisturbed, theirs], clean=True)
                self.count("two_runs", met)
                if best.code:
                    self.run_again("two_runs", when)

    def run_command_lines(self) -> None:
        """The command in a new process, as it is typed, with a disk that gets full and with one that is read-only."""
        words = command_line(self.job, self.inputs, self.out, False)
        if words is None:
            return
        command = [sys.executable, "-m", "hf_binaryformer", *words]
        limit = self.largest_file // 2
        for protected in (False, True) if self.mounts or modes_count() else (False,):
            with Target(self.place, self.mounts) as target:
                if not self.job.is_folder:
                    self.out.mkdir()
                if protected:
                    self.protect_now(target)
                elif self.mounts:
                    target.limit(self.bytes // 2)
                restrict = None if self.mounts or protected else lambda: limit_files(limit)
                done = subprocess.run(command, capture_output=True, text=True, preexec_fn=restrict)
                ending = Ending(done.returncode, done.stdout + done.stderr)
                self.judge("command_line", "read-only" if protected else "full", ending, [self.undisturbed])
                self.count("command_line", ending.code != 0)
                self.unprotect(target)

    def unprotect(self, target: Target) -> None:
        """Undo :meth:`protect_now`."""
        target.unprotect()
        if not self.mounts and self.out.exists():
            self.out.chmod(0o755)


def leftovers(place: Path) -> list[str]:
    """Hidden files and unfinished checkpoints."""
    found = (path.relative_to(place) for path in sorted(place.rglob("*")))
    return [str(p) for p in found if p.name.startswith(".") or p.suffix == PARTIAL]


def plain(message: str, folder: Path) -> str:
    """A message without what differs from run to run."""
    message = message.replace(str(folder), "")
    return re.sub(r"(?<![\w.])\d+(\.\d+)?(?![\w])", "N", re.sub(r"\.[0-9a-f]{8}-|-[0-9a-f]{8}\b", "", message))


def attack(
    job: Job, folder: Path, *, tries: int, changes: int, seed: int, mounts: bool, command_lines: bool = True
) -> dict[str, Any]:
    """All disturbances of one job."""
    trial = Trial(job, folder, mounts, seed)
    trial.fill_disk(tries)
    trial.protect(max(2, tries // 2))
    trial.change_inputs(changes)
    trial.run_twice(tries)
    if command_lines:
        trial.run_command_lines()
    return {
        **trial.figures,
        "messages": dict(trial.messages.most_common()),
        "seconds": round(trial.seconds, 3),
        "bytes": trial.bytes,
    }


def main(
    tries: Annotated[int, typer.Option(min=1, help="Sizes of the disk, and pairs of runs, for each job.")] = 20,
    changes: Annotated[int, typer.Option(min=0, help="Of each kind, for each job.")] = 12,
    job: Annotated[list[str] | None, typer.Option(help=f"{', '.join(JOBS)}.  [default: all]")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    mounts: Annotated[bool | None, typer.Option(help="Small file systems.  [default: if allowed]")] = None,
    command_lines: Annotated[bool, typer.Option(help="Commands in processes of their own, too.")] = True,
    record: Annotated[
        Path | None, typer.Option(help="Figures to write: .json; with --job, other jobs in it stay.")
    ] = None,
) -> None:
    """Disturb, look, run again."""
    # A copy of a process has none of its threads.
    torch.set_num_threads(1)
    mounts = can_mount() if mounts is None else mounts
    figures, bad = {}, False
    for name in job or JOBS:
        with tempfile.TemporaryDirectory() as folder:
            # Resolved, because the jobs open their inputs by such names.
            figures[name] = attack(
                JOBS[name],
                Path(folder).resolve(),
                tries=tries,
                changes=changes,
                seed=seed,
                mounts=mounts,
                command_lines=command_lines,
            )
        for kind, found in figures[name].items():
            if not isinstance(found, dict) or kind == "messages":
                continue
            typer.echo(
                f"{name}, {kind}: disturbed {found['disturbed']} of {found['tried']}, {len(found['faults'])} faults, "
                f"{len(found['reruns_that_differ'])} reruns that differ"
            )
            for text in found["faults"] + found["reruns_that_differ"]:
                bad = True
                typer.echo(f"  {text}")
        for message, times in figures[name]["messages"].items():
            typer.echo(f"  said {times} times: {message}")
    command = f"python scripts/reliability/disk.py --tries {tries} --changes {changes} --seed {seed}"
    if job and record and record.is_file():
        figures = json.loads(record.read_text())["jobs"] | figures
    write_record(record, seed, {"command": command, "mounts": mounts, "jobs": figures})
    if bad:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
