"""Files that must not change while they are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

State = dict[str, tuple[int, ...]]


class ChangedError(ValueError):
    """A file changed while it was read."""


@contextmanager
def unchanged(*paths: Path) -> Iterator[None]:
    """Refuse what the block has read from files or folders if one of them was written to meanwhile.

    Raises:
        ChangedError: size, time of change or identity of a file, or of a file in a folder, is another afterwards.
    """
    before = state_of(paths)
    yield
    check_state(before, paths)


def state_of(paths: Iterable[Path]) -> State:
    """Identity, size and time of change of files, and of the files in folders."""
    found: State = {}
    for path in paths:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            with suppress(FileNotFoundError):
                status = file.stat()
                found[str(file)] = status.st_ino, status.st_size, status.st_mtime_ns
    return found


def check_state(before: State, paths: Iterable[Path]) -> None:
    """Refuse files or folders that are not as they were.

    Raises:
        ChangedError: names one that differs.
    """
    for path in paths:
        now = state_of([path])
        names = {name for name in before if name == str(path) or Path(name).parent == path} | now.keys()
        if any(before.get(name) != now.get(name) for name in names):
            raise ChangedError(
                f"{path} changed while it was read, expected a file at rest: wait until it is complete, then start again"
            )
