"""Where the files of a visitor lie: a folder of their own, which nobody else sees and which goes when they leave."""

from __future__ import annotations

import secrets
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_binaryformer.pipelines.volumes import Volume

# Folder of uploads under way, below the root of all workspaces.
UPLOADS = "uploads"
SESSION_ENDED = "there is no scan yet, or this session has ended: choose a scan first"


class CancelledError(Exception):
    """The visitor cancelled the job, left, or chose another scan."""


class Job:
    """One run of a network, in a folder of its own.

    Args:
        folder: made anew; gone as soon as the job is cancelled and has noticed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._cancelled = threading.Event()
        # Clear while it runs.
        self.idle = threading.Event()
        self.idle.set()

    def cancel(self) -> None:
        """Have it stop after the slices or the step at hand."""
        self._cancelled.set()

    def check(self) -> None:
        """Raise CancelledError if the job is no longer wanted."""
        if self._cancelled.is_set():
            raise CancelledError


class Workspace:
    """The files of one visitor: a scan, a hole, and the results of the last job of each kind.

    Args:
        folder: made when the first scan comes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # What may be fetched: names on the page, and the files that they stand for.
        self.published: dict[str, Path] = {}
        self.source: Path | None = None
        self.volume: Volume | None = None
        self.mask: Path | None = None
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()

    def new_scan_folder(self) -> Path:
        """An empty folder for another scan; the old one and its results are deleted, and running jobs stop."""
        self.clear()
        folder = self.folder / secrets.token_hex(8)
        folder.mkdir(parents=True)
        return folder

    def scan(self) -> tuple[Path, Volume]:
        """The scan that was chosen, as a path and as a volume.

        Raises:
            ValueError: there is none.
        """
        if self.source is None or self.volume is None:
            raise ValueError(SESSION_ENDED)
        return self.source, self.volume

    def new_mask_folder(self) -> Path:
        """An empty folder for another mask."""
        folder = self.folder / f"mask-{secrets.token_hex(8)}"
        folder.mkdir()
        return folder

    def set_mask(self, path: Path) -> Path:
        """Have a mask in a folder of :meth:`new_mask_folder` take the place of the one before, which is deleted."""
        if self.mask is not None:
            shutil.rmtree(self.mask.parent, ignore_errors=True)
        self.mask = path
        return path

    def announce(self, kind: str) -> None:
        """Prepare a job, before it waits for its turn: from now on it can be cancelled. An older one of its kind stops."""
        with self._lock:
            self._drop(kind)
            self._jobs[kind] = Job(self.folder / f"{kind}-{secrets.token_hex(8)}")

    @contextmanager
    def job(self, kind: str) -> Iterator[Job]:
        """The job that was announced; its folder stays if the block succeeds.

        Raises:
            ValueError: there is no scan.
            CancelledError: it was cancelled meanwhile.
        """
        self.scan()
        with self._lock:
            job = self._jobs.get(kind)
            if job is None:
                raise CancelledError
            job.check()
            job.folder.mkdir()
            job.idle.clear()
        try:
            yield job
            job.check()
        except BaseException:
            shutil.rmtree(job.folder, ignore_errors=True)
            raise
        finally:
            job.idle.set()

    def publish(self, path: Path) -> str:
        """Have a file fetched by a name that cannot be guessed; returns its address, relative to the page."""
        token = secrets.token_urlsafe(24)
        self.published[token] = path
        return f"results/{token}/{path.name}"

    def cancel(self) -> list[Job]:
        """Stop all jobs, also those that wait; returns them."""
        with self._lock:
            for job in self._jobs.values():
                job.cancel()
            return list(self._jobs.values())

    def clear(self) -> list[Job]:
        """Stop all jobs and delete all files; returns the jobs, some of which may not have noticed yet."""
        jobs = self.cancel()
        with self._lock:
            self._jobs.clear()
            self.published.clear()
            self.source = self.volume = self.mask = None
            shutil.rmtree(self.folder, ignore_errors=True)
        return jobs

    def _drop(self, kind: str) -> None:
        old = self._jobs.pop(kind, None)
        if old is not None:
            old.cancel()
            self.published = {t: path for t, path in self.published.items() if old.folder not in path.parents}
            shutil.rmtree(old.folder, ignore_errors=True)


class Workspaces:
    """The workspaces of all visitors.

    Args:
        root: folder that holds theirs.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._by_session: dict[str, Workspace] = {}
        self._lock = threading.Lock()

    def of(self, session: str) -> Workspace:
        """The workspace of a session; a new one has no folder yet."""
        with self._lock:
            if session not in self._by_session:
                self._by_session[session] = Workspace(self.root / secrets.token_hex(16))
            return self._by_session[session]

    def close(self, session: str) -> None:
        """The visitor left: stop their jobs and delete their files."""
        with self._lock:
            workspace = self._by_session.pop(session, None)
        if workspace is not None:
            workspace.clear()

    def close_all(self, seconds: float) -> None:
        """Everybody has to leave: as :meth:`close`, and wait up to ``seconds`` for each job to stop.

        A process that ends while a network runs in one of its threads would crash.
        """
        with self._lock:
            spaces = list(self._by_session.values())
            self._by_session.clear()
        for job in [job for space in spaces for job in space.clear()]:
            job.idle.wait(seconds)

    def find(self, token: str) -> Path | None:
        """The file that a token stands for; None if there is none, or no longer."""
        with self._lock:
            spaces = list(self._by_session.values())
        return next((path for space in spaces if (path := space.published.get(token)) and path.is_file()), None)
