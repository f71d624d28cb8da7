"""Files and folders that are read or written as a whole: never half of one, whatever ends the process.

A result is finished under a hidden name beside its place and then renamed, which a file system does at once or not at
all. A process that is killed leaves at most the hidden file, ``.<8 digits>-<name>``. Names are random, because process
numbers repeat: in two containers that share a folder, both programs may be number 7.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from hf_binaryformer.modeling.at_rest import ChangedError, unchanged

__all__ = [
    "ChangedError",
    "WriteError",
    "all_or_nothing",
    "hidden_name",
    "unchanged",
    "whole_file",
    "whole_folder",
    "write_text",
    "writing",
]


# The disk, the quota, or what one file may hold.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
# What torch and safetensors say instead of an OSError.
FULL_TEXT = re.compile(r"StorageFull|FileTooLarge|QuotaExceeded|No space left|os error (28|122|27)\b")
WRITE_TEXT = re.compile(r"ReadOnlyFilesystem|Read-only file system|inline_container|PytorchStreamWriter|iostream error")
CHOOSE = "free some space, or choose another folder"
# So long one run waits while another puts its results in place.
PATIENCE_SECONDS = 2.0


class WriteError(OSError):
    """A result could not be written; the message says why, and what to do."""


@contextmanager
def writing(folder: Path, remedy: str = CHOOSE) -> Iterator[None]:
    """Turns whatever a library raises over a full disk, or over a folder that is read-only, into one message.

    Args:
        folder: where the block writes; it need not exist yet.
        remedy: what to do about a full disk.

    Raises:
        WriteError: the disk is full, or ``folder`` cannot be written to.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        there = next((path for path in (folder, *folder.absolute().parents) if path.is_dir()), Path())
        free = shutil.disk_usage(there).free / 1e6
        if number in FULL or FULL_TEXT.search(str(error)):
            reason = f"no space left for {folder} ({free:.1f} MB are free there, the results need more): {remedy}"
        elif number in FORBIDDEN and _is_in(error, there):
            reason = f"{folder} cannot be written to ({os.strerror(number or 0)}): make it writable, or choose another folder"
        elif number is None and WRITE_TEXT.search(str(error)):
            reason = f"{folder} could not be written completely ({free:.1f} MB are free there): {remedy}"
        else:
            raise
        raise WriteError(reason) from error


def _is_in(error: Exception, folder: Path) -> bool:
    """Whether a file in this folder, or none, is what an error is about: a job's inputs may be forbidden as well."""
    name = getattr(error, "filename", None)
    return name is None or Path(os.path.abspath(os.fsdecode(name))).is_relative_to(os.path.abspath(folder))


def hidden_name(path: Path) -> Path:
    """A new name beside ``path``, with the same suffix, by which writers choose the format."""
    return path.with_name(f".{secrets.token_hex(4)}-{path.name}")


@contextmanager
def all_or_nothing(targets: Sequence[Path]) -> Iterator[dict[Path, Path]]:
    """Hidden names beside the targets; put in place together when the block succeeds, deleted when it does not.

    Raises:
        WriteError: the disk is full, or a folder cannot be written to.
    """
    temporary = {target: hidden_name(target) for target in targets}
    with writing(targets[0].parent):
        try:
            yield temporary
            with _turn(targets[0].parent) if len(targets) > 1 else nullcontext():
                for target, path in temporary.items():
                    os.replace(path, target)
        finally:
            for path in temporary.values():
                path.unlink(missing_ok=True)


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Wait until no other run puts its results into the folder, so that all results in it are those of one run.

    A folder that is locked for longer belongs to a training; then, and where there are no locks, nothing is waited for.
    """
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # Windows has other locks; a folder may be written to and not read.
        yield
        return
    try:
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.001)
            except OSError:
                break
        yield
    finally:
        os.close(handle)


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

    Raises:
        WriteError: the disk is full, or the folder cannot be written to.
    """
    temporary, old = hidden_name(path), hidden_name(path)
    with writing(path.parent):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            with suppress(FileNotFoundError):
                os.rename(path, old)
            os.rename(temporary, path)
        finally:
            for folder in (temporary, old):
                shutil.rmtree(folder, ignore_errors=True)
