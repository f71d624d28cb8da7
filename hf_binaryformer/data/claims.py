"""Folders that a running process claims, so that the next one can tell its leftovers from another's work in progress.

The claim is a lock on the open folder, which the kernel releases when the process ends, even if it is killed. Where the
file system has no such locks, every folder counts as claimed and nothing is deleted.
"""

from __future__ import annotations

import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# A forked data worker may outlive its parent by seconds; it must not keep the parent's claims.
_held: set[int] = set()


def _drop_claims() -> None:
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_claims)


@contextmanager
def claim(path: Path) -> Iterator[bool | None]:
    """Claim a folder for the length of the block: True; or False if another has it, None if there are no locks here."""
    try:
        import fcntl
    except ImportError:  # Windows has other locks.
        yield None
        return
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        yield None
        return
    _held.add(handle)
    free: bool | None = True
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:
            free = None
        yield free
    finally:
        if handle in _held:
            _held.remove(handle)
            os.close(handle)


@contextmanager
def claimed_folder(place: Path, prefix: str) -> Iterator[Path]:
    """A new folder in ``place`` with a random name after ``prefix``; what is left of it at the end is deleted."""
    while True:
        folder = place / f"{prefix}{secrets.token_hex(4)}"
        folder.mkdir()
        with claim(folder):
            # Between the two lines above, another process may have taken it for a leftover.
            if not folder.is_dir():
                continue
            try:
                yield folder
            finally:
                remove(folder)
            return


def remove_left_behind(place: Path, prefix: str) -> bool:
    """Delete folders of :func:`claimed_folder` whose process is gone; returns whether there were any."""
    found = False
    for folder in place.glob(f"{glob.escape(prefix)}????????"):
        with claim(folder) as free:
            if free and folder.is_dir() and not folder.is_symlink():
                remove(folder)
                found = True
    return found


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            path.unlink()
