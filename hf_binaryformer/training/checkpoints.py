"""Checkpoints of a training run: written completely or not at all, checked before reading, saved on interruption."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from types import FrameType
from typing import Any

import torch
import typer
from accelerate import Accelerator

from hf_binaryformer.data.claims import claim
from hf_binaryformer.data.hashing import file_hash
from hf_binaryformer.modeling.file_names import stays_below
from hf_binaryformer.pipelines.whole_files import writing

# Written last: lists every file of a checkpoint with its hash.
MANIFEST = "files.json"
PARTIAL = ".partial"
# The weights of the best validation, beside the checkpoints, and the key of its figures in their metadata.
BEST_WEIGHTS, VALIDATION = "best.safetensors", "validation"
FOLDER = "checkpoints"
FREE_AND_RESUME = "free some space, then start again, with --resume if there is a checkpoint"

# Of the objects that Accelerate does not know: the progress, the learning-rate schedule, the averages of the weights.
STATE = "state_{}.pt"
# Accelerate's own name for them, under which it loads pickles that may run any code.
UNSAFE = "custom_checkpoint_*"


class Progress:
    """The state of a training apart from weights and optimizer; it is saved in the checkpoints.

    Attributes:
        step: number of finished iterations.
        seconds: time that they took.
        best: the best validation so far.
        name: name of the run, with which trackers continue it.
        sums: sums of the losses since the last record of the log.
        parts: number of values in each sum.
    """

    def __init__(self) -> None:
        self.step, self.seconds, self.parts = 0, 0.0, 0
        self.best: float | None = None
        self.name = secrets.token_hex(4)
        self.sums: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        """For Accelerate."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """For Accelerate."""
        vars(self).update(state)


class Checkpoints:
    """The folder ``output/checkpoints``, with one folder ``step_<number>`` for each checkpoint.

    A checkpoint is written under a temporary name and renamed when it is complete. A process that is killed meanwhile
    therefore leaves no incomplete checkpoint.

    Args:
        accelerator: its state is saved: network, optimizer and random-number state.
        output: folder of the run.
        kept: number of checkpoints to keep; older ones are deleted.
        others: further objects with ``state_dict`` and ``load_state_dict``. They are not registered with Accelerate, which
            would load them as pickles that may run any code.
    """

    def __init__(self, accelerator: Accelerator, output: Path, kept: int, others: Sequence[Any] = ()) -> None:
        self._accelerator, self._output, self._kept, self._others = accelerator, output, kept, others
        self._folder = output / FOLDER

    def save(self, step: int) -> None:
        """Write the state after ``step`` iterations; all processes call this.

        Raises:
            WriteError: the disk is full, or the folder cannot be written to; older checkpoints stay as they are.
        """
        place = self._folder / f"step_{step:08d}"
        with writing(self._folder, FREE_AND_RESUME):
            try:
                self._write(place)
            finally:
                if self._accelerator.is_main_process:
                    shutil.rmtree(place.with_suffix(PARTIAL), ignore_errors=True)

    def _write(self, place: Path) -> None:
        partial = place.with_suffix(PARTIAL)
        main = self._accelerator.is_main_process
        if main:
            # Also what killed runs have left.
            for left in self._folder.glob(f"step_*{PARTIAL}"):
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir(parents=True)
        self._accelerator.wait_for_everyone()
        self._accelerator.save_state(str(partial))
        self._accelerator.wait_for_everyone()
        if main:
            for number, other in enumerate(self._others):
                torch.save(other.state_dict(), partial / STATE.format(number))
            hashes = {str(p.relative_to(partial)): file_hash(p) for p in sorted(partial.rglob("*")) if p.is_file()}
            (partial / MANIFEST).write_text(json.dumps(hashes, indent=2))
            remove_whole(place)
            os.replace(partial, place)
            there = checkpoints_of(self._output)
            damaged = [old for old in there if old.name > place.name]  # skipped by `restore`
            for old in damaged + there[len(damaged) + self._kept :]:
                remove_whole(old)
        self._accelerator.wait_for_everyone()

    def restore(self) -> None:
        """Load the newest checkpoint that is not damaged; a warning names those that are skipped.

        Raises:
            FileNotFoundError: there is none; the message names the damaged ones.
            typer.BadParameter: it holds pickles that could run any code.
        """
        passed = checkpoints_of(self._output)
        for checkpoint in passed:
            damage = find_damage(checkpoint)
            if not damage:
                if any(checkpoint.glob(UNSAFE)):
                    raise typer.BadParameter(
                        f"{checkpoint} holds {UNSAFE}, pickles of an earlier version, which could run any code; expected "
                        f"{STATE.format(0)}: go on with the version that began the run, or start again"
                    )
                try:
                    self._accelerator.load_state(str(checkpoint))
                    for number, other in enumerate(self._others):
                        other.load_state_dict(torch.load(checkpoint / STATE.format(number), "cpu", weights_only=True))
                except UnpicklingError as error:
                    raise typer.BadParameter(
                        f"{checkpoint} holds a pickle of more than numbers, which could run any code, expected what a training "
                        f"saved: remove it"
                    ) from error
                return
            if self._accelerator.is_main_process:
                warnings.warn(f"{checkpoint} is damaged ({damage}): taking the one before it", stacklevel=2)
        if passed:
            names = ", ".join(checkpoint.name for checkpoint in passed)
            raise FileNotFoundError(
                f"all checkpoints of {self._folder} are damaged ({names}): remove it and start again"
            )
        raise FileNotFoundError(f"{self._folder} has no checkpoint to go on from: start without --resume")


def remove_whole(checkpoint: Path) -> None:
    """Delete a checkpoint, if it is there; a process that is killed meanwhile leaves no part of it under its name."""
    if checkpoint.is_dir():
        partial = checkpoint.with_suffix(f".old{PARTIAL}")
        shutil.rmtree(partial, ignore_errors=True)
        os.replace(checkpoint, partial)
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def only_run_in(output: Path, writes: bool) -> Iterator[None]:
    """Hold the run's folder for the length of the block, so that no second run writes into it.

    Args:
        output: the run's folder.
        writes: whether this process is the main one, which writes; others hold nothing.

    Raises:
        typer.BadParameter: another process holds it.
    """
    if not writes:
        yield
        return
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    with claim(output) as state:
        if state is False:
            raise typer.BadParameter(f"another training writes to {output}: wait for its end, or give another folder")
        yield


def refuse_other_run(output: Path) -> None:
    """Make sure that a run which is not resumed has a folder of its own.

    Raises:
        typer.BadParameter: there are checkpoints.
    """
    if checkpoints_of(output):
        raise typer.BadParameter(f"{output} holds checkpoints of another run: --resume it, or give another folder")


def checkpoints_of(output: Path) -> list[Path]:
    """All checkpoints of a run, complete or not, the newest first."""
    return sorted((p for p in (output / FOLDER).glob("step_*") if p.suffix != PARTIAL), reverse=True)


def find_damage(checkpoint: Path) -> str:
    """Describe the damage to a checkpoint's files; the text is empty if they are as they were written."""
    try:
        hashes = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or unreadable"
    if not isinstance(hashes, dict) or not all(map(stays_below, hashes)):
        return f"{MANIFEST} is no list of the files in its folder"
    for name, expected in hashes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if file_hash(path) != expected:
            return f"{name} has changed"
    return ""


class Interruption:
    """Context in which Ctrl-C (and SIGTERM) only sets ``asked``, so that the current iteration ends and is saved.

    A second signal stops the program at once.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
