"""Copies of this process that run a job as the command line does, and how they end."""

from __future__ import annotations

import importlib
import os
import re
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 300
PAGE = 4096
# The part of a message that says what to do: the last, behind what was found.
REMEDY = (
    r"[:;,] (--\w+ it|or )?(free|choose|fetch|export|wait|give|check|prepare|repair|write|remove|start|make|go on)\b"
)


@dataclass(frozen=True)
class Ending:
    """How a process ended: exit code, or minus the number of the signal; and all that it printed."""

    code: int
    said: str

    @property
    def message(self) -> str:
        """The line of an error, without the frame around it; empty if there is none."""
        lines = [line.strip(" │") for line in self.said.replace("\r", "\n").splitlines()]
        box = [n for n, line in enumerate(lines) if line.startswith("╭")]
        if box:
            return " ".join(line for line in lines[box[-1] + 1 :] if line and not line.startswith("╰"))
        return next((line for line in reversed(lines) if line.lower().startswith("error:")), "")

    @property
    def problem(self) -> str:
        """What is wrong with the way that a failed process ended: it must tell in one line what to do."""
        if self.code < 0:
            return f"ended by signal {signal.Signals(-self.code).name}"
        if "Traceback" in self.said:
            lines = [line for line in self.said.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)]
            return f"ended with a traceback: {lines[-1] if lines else ''}"
        told = self.code == 0 or re.search(REMEDY, self.message)
        return "" if told else f"does not say what to do: {self.message or self.said.strip()[-200:]}"


class Copy:
    """A copy of this process that does ``work``.

    Args:
        work: what it does; SystemExit and typer.Exit give its exit code.
        said: file for all that it prints.
        inputs: folder; opening a file in it to read counts as an event.
        tell_at: the number of the event at which :meth:`wait_for_event` returns; None: no event; -1: all are counted in
            ``events``.
        file_limit: largest size of any file that it may write, in bytes.
    """

    def __init__(
        self,
        work: Callable[[], None],
        said: Path,
        inputs: Path,
        tell_at: int | None = None,
        file_limit: int | None = None,
    ) -> None:
        self._said, self.events = said, 0
        self._ending: Ending | None = None
        self._pipe, writer = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(writer)
            return
        code = 1
        try:
            os.close(self._pipe)
            handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.addaudithook(_teller(str(inputs), tell_at, writer))
            if file_limit is not None:
                limit_files(file_limit)
            work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException as error:
            code = getattr(error, "exit_code", 1)
            if not hasattr(error, "exit_code"):
                traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait_for_event(self) -> Path | None:
        """Wait until the event happens, and return the file that is opened; None if the process ends before."""
        while not select.select([self._pipe], [], [], 0.01)[0]:
            if self.has_ended():
                return None
        return Path(os.fsdecode(os.read(self._pipe, PAGE).rstrip(b"\n"))) if self._ending is None else None

    def has_ended(self) -> bool:
        """Whether it runs no longer."""
        if self._ending is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                # This process has no writing end left, so that this does not wait.
                self.events = os.read(self._pipe, 2**16).count(b"\n")
                os.close(self._pipe)
                self._ending = Ending(os.waitstatus_to_exitcode(status), self._said.read_text(errors="replace"))
        return self._ending is not None

    def end(self, watch: Callable[[], Any] = lambda: None) -> Ending:
        """Wait for its end, and call ``watch`` again and again meanwhile.

        Raises:
            RuntimeError: it does not end.
        """
        started = time.monotonic()
        while not self.has_ended():
            watch()
            if time.monotonic() - started > PATIENCE_SECONDS:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise RuntimeError(f"the job does not end: {self._said.read_text(errors='replace')}")
            time.sleep(0.002)
        assert self._ending is not None
        return self._ending


def load_same_modules(names: Iterable[str]) -> None:
    """Import what a copy had to import, so that the next ones need not."""
    for name in names:
        if name not in sys.modules:
            with suppress(Exception):
                importlib.import_module(name)


def limit_files(size: int) -> None:
    """Let this process write no file larger than this, in bytes; what is larger fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _teller(inputs: str, tell_at: int | None, writer: int) -> Callable[[str, tuple[Any, ...]], None]:
    """A hook that writes to a pipe at event ``tell_at``."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open" and str(arguments[0]).startswith(inputs):
            if tell_at in (seen, -1):
                os.write(writer, os.fsencode(arguments[0]) + b"\n")
            seen += 1

    return hook
