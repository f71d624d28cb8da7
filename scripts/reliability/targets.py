"""Places to write to that are small, become full or cannot be written to."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from pathlib import Path

PAGE = 4096
READ_ONLY, REMOUNT, DETACH = 1, 32, 2


def mount(place: Path, flags: int, options: str) -> bool:
    """Mount a folder in memory; returns whether that was possible."""
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", flags, options.encode()) == 0


def unmount(place: Path) -> None:
    """Unmount what :func:`mount` mounted, also while a process that is about to end uses it.

    Raises:
        OSError: it is not mounted.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(place), DETACH):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(place))


def can_mount() -> bool:
    """Whether this process may mount folders; only root may, and in many containers nobody."""
    if not hasattr(ctypes.CDLL(None), "mount"):
        return False
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        done = mount(place, 0, f"size={PAGE}")
        if done:
            unmount(place)
    return done


def modes_count() -> bool:
    """Whether a folder without the permission to write cannot be written to: root may write all the same."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "closed"
        place.mkdir(0o555)
        return not os.access(place, os.W_OK)


class Target:
    """A new empty folder ``place`` for the length of a block.

    Args:
        place: must not exist.
        mounted: whether it is a file system of its own, in memory; otherwise it cannot get full.
        size: of the file system in bytes; None: enough.
    """

    def __init__(self, place: Path, mounted: bool, size: int | None = None) -> None:
        self.place, self._mounted, self._size, self.largest = place, mounted, size, 0

    def __enter__(self) -> Target:
        self.place.mkdir()
        if self._mounted and not mount(self.place, 0, self._options()):
            raise OSError(f"{self.place} cannot be mounted")
        return self

    def __exit__(self, *_: object) -> None:
        if self._mounted:
            unmount(self.place)
        shutil.rmtree(self.place)

    def _options(self) -> str:
        return f"size={self._size or 2**30}"

    def limit(self, size: int) -> None:
        """Make it so small, or as small as what it holds allows."""
        held = os.statvfs(self.place)
        self._size = size + (held.f_blocks - held.f_bfree) * held.f_frsize
        mount(self.place, REMOUNT, self._options())

    def make_room(self) -> None:
        """Take the limit away."""
        self._size = None
        if self._mounted:
            mount(self.place, REMOUNT, self._options())

    def protect(self) -> bool:
        """Make it read-only; False if a file is being written at this moment."""
        if self._mounted:
            return mount(self.place, REMOUNT | READ_ONLY, self._options())
        self.place.chmod(0o555)
        return True

    def unprotect(self) -> None:
        """Make it writable again."""
        if self._mounted:
            mount(self.place, REMOUNT, self._options())
        else:
            self.place.chmod(0o755)

    def measure(self) -> None:
        """Note in ``largest`` how many bytes it holds, if they are the most so far."""
        status = os.statvfs(self.place)
        self.largest = max(self.largest, (status.f_blocks - status.f_bfree) * status.f_frsize)
