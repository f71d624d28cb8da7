"""Output files: checked before the work; :mod:`hf_binaryformer.pipelines.whole_files` puts them in place."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Set to 1 in the environment, it has errors told with their traceback.
TRACEBACK_VARIABLE = "BINARYFORMER_TRACEBACK"


def check_outputs(wanted: Sequence[tuple[Path | None, Sequence[str]]], inputs: Sequence[Path]) -> list[Path]:
    """Fail before the work starts if one of its results could not be written.

    Args:
        wanted: files and the suffixes that each may have; None stands for a result that was not requested.
        inputs: files and folders that the job reads.

    Returns:
        The files without None.

    Raises:
        ValueError: wrong suffix, a file that is one of the inputs, or the same file twice.
        FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError: no file can be made at that place, or
            a link to nothing is there.
    """
    paths = [path for path, _ in wanted if path is not None]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"outputs {', '.join(map(str, paths))}: the same file was asked for twice")
    for path, suffixes in wanted:
        if path is None:
            continue
        folder = path.parent
        if not path.name.lower().endswith(tuple(suffixes)):
            raise ValueError(f"output is named '{path.name}'; expected an ending of {', '.join(suffixes)}")
        if not folder.exists():
            raise FileNotFoundError(f"folder '{folder}' for the output '{path.name}' does not exist: make it first")
        if not folder.is_dir():
            raise NotADirectoryError(f"'{folder}' for the output '{path.name}' is not a folder")
        if path.is_dir():
            raise IsADirectoryError(f"output '{path}' is a folder; expected the name of a file")
        if path.is_symlink() and not path.exists():
            raise FileNotFoundError(
                f"output '{path}' is a link to '{path.readlink()}', which does not exist: remove it"
            )
        if any(path.resolve() == source.resolve() for source in inputs):
            raise ValueError(f"output '{path}' is the job's own input, which stays untouched: choose another name")
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise PermissionError(
                f"folder '{folder}' cannot be written to ({error.strerror}): choose another"
            ) from error
    return paths


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write strict JSON; numbers that JSON cannot hold (NaN, infinity) are an error."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
