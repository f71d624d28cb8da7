"""Files and folders that are read or written as a whole: never half of one, whatever ends the process.

A result is finished under a hidden name beside its place and then renamed, which a file system does at once or not at
all. A process that is killed leaves at most the hidden file, ``.<8 digits>-<name>``. Names are random, because process
numbers repeat: in two containers that share a folder, both programs may be number 7.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


class ChangedError(ValueError):
    """A file changed while it was read."""


def hidden_name(path: Path) -> Path:
    """A new name beside ``path``, with the same suffix, by which writers choose the format."""
    return path.with_name(f".{secrets.token_hex(4)}-{path.name}")


@contextmanager
def all_or_nothing(targets: Sequence[Path]) -> Iterator[dict[Path, Path]]:
    """Hidden names beside the targets; put in place together when the block succeeds, deleted when it does not."""
    temporary = {target: hidden_name(target) for target in targets}
    try:
        yield temporary
        for target, path in temporary.items():
            os.replace(path, target)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """:func:`all_or_nothing` for one file; yields its hidden name."""
    with all_or_nothing([path]) as temporary:
        yield temporary[path]


def write_text(path: Path, text: str) -> None:
    """Write a text file, UTF-8, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new hidden folder, which takes the place of ``path`` when the block succeeds.

    An older folder of that name makes room as a whole. Between the two renames the name is free: what is there is the
    old folder, nothing, or the new one.
    """
    temporary, old = hidden_name(path), hidden_name(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        with suppress(FileNotFoundError):
            os.rename(path, old)
        os.rename(temporary, path)
    finally:
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """Refuse what the block has read from a file or folder if it was written to meanwhile.

    Raises:
        ChangedError: size, time of change or identity of the file, or of a file in the folder, is another afterwards.
    """
    before = _state(path)
    yield
    if _state(path) != before:
        raise ChangedError(
            f"{path} changed while it was read, expected a file at rest: wait until it is complete, then start again"
        )


def _state(path: Path) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        with suppress(FileNotFoundError):
            status = file.stat()
            found[str(file)] = status.st_ino, status.st_size, status.st_mtime_ns
    return found
