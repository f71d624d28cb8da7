"""Which prediction belongs to which truth. No file of a folder is left out without a word: scored, told, or refused."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from hf_binaryformer.data.file_pairs import SEPARATORS
from hf_binaryformer.pipelines.volumes import VOLUME_SUFFIXES

# What people's tools leave beside label volumes: text, tables, pictures, probabilities, and the voxels of an .mhd.
SIDE_SUFFIXES = (
    *(".json", ".txt", ".md", ".csv", ".tsv", ".xlsx", ".xml", ".yaml", ".yml", ".html", ".log", ".pdf"),
    *(".png", ".jpg", ".jpeg", ".npz", ".pkl", ".raw", ".zraw"),
)
# Words that make files of one person two.
SIDES = {"left", "right", "l", "r", "lh", "rh"}
# File names that a message lists before it says "...".
SHOWN = 3


def pair_volumes(pred: Path, truth: Path) -> tuple[list[tuple[str, Path, Path]], list[str]]:
    """The volumes of two files, or of two folders with all their subfolders, and notes on what is not scored.

    Names below the two folders are compared in full, except that an ending may be in capitals in one of them. If they
    differ, files are pairs if they differ only in the words that all names of a folder end with: ``P1_t1_labels`` and
    ``P1_t1_mask``. Hidden files, whose names start with a dot, are no part of a folder.

    Returns:
        (case, prediction, truth) for each pair, sorted; case is the prediction's name below its folder.

    Raises:
        FileNotFoundError: a file or folder does not exist.
        ValueError: a file against a folder, no volumes, names that only one folder has, one name twice, or a file that
            may be a volume but is of a kind that is not read here.
    """
    for path in (pred, truth):
        if not path.exists():
            raise FileNotFoundError(f"'{path}' does not exist")
    if pred.is_dir() != truth.is_dir():
        raise ValueError(f"prediction '{pred}' and truth '{truth}': give two files or two folders")
    if not pred.is_dir():
        return [(pred.name, pred, truth)], []
    (ours, our_notes), (theirs, their_notes) = find_volumes(pred), find_volumes(truth)
    if ours.keys() != theirs.keys():
        if alike := pairs_by_words(ours, theirs):
            first, partner = next(iter(alike.values()))
            note = f"names differ; taken for pairs, such as {below(first, pred)} and {below(partner, truth)}"
            cases = [(below(path, pred), path, other) for path, other in alike.values()]
            return cases, [note, *our_notes, *their_notes]
        only = "; ".join(
            f"{len(names)} only in '{folder}' ({shown([below(found[name], folder) for name in names])})"
            for folder, found, names in (
                (pred, ours, ours.keys() - theirs.keys()),
                (truth, theirs, theirs.keys() - ours.keys()),
            )
            if names
        )
        raise ValueError(f"every file needs one of the same name in the other folder; {only}")
    if not ours:
        raise ValueError(f"no volumes in '{pred}'; expected files that end in {', '.join(VOLUME_SUFFIXES)}")
    pairs = [(below(path, pred), path, theirs[name]) for name, path in sorted(ours.items())]
    return pairs, list(dict.fromkeys(our_notes + their_notes))


def pairs_by_words(ours: dict[str, Path], theirs: dict[str, Path]) -> dict[str, tuple[Path, Path]]:
    """Pairs of files whose names are equal but for the words that all names of their folder end with; none in doubt.

    One file alone leaves a doubt, and so do two files of one name, and endings that may say more than what kind of file it is:
    those with a side, and two with other numbers, such as those of two visits.
    """
    if min(len(ours), len(theirs)) < 2:
        return {}
    cut, ends = zip(*(_without_common_end(found) for found in (ours, theirs)), strict=True)
    words = [{*SEPARATORS.split(end.lower())} for end in ends]
    numbers = [{word for word in one if re.search(r"\d", word)} for one in words]
    other_numbers = numbers[0] - numbers[1] and numbers[1] - numbers[0]
    doubled = len(cut[0]) < len(ours) or len(cut[1]) < len(theirs)
    if doubled or SIDES & (words[0] | words[1]) or other_numbers:
        return {}
    return {name: (cut[0][name], cut[1][name]) for name in sorted(cut[0])} if cut[0].keys() == cut[1].keys() else {}


def _without_common_end(found: dict[str, Path]) -> tuple[dict[str, Path], str]:
    """Files by what is left of their names, and what was cut off: the last words, and the signs between them, of all."""
    stems = {name.removesuffix(next(s for s in VOLUME_SUFFIXES if name.endswith(s))): found[name] for name in found}
    words = [SEPARATORS.split(name) for name in stems]
    count = 0
    while all(len(one) > count + 1 and one[-1 - count] == words[0][-1 - count] for one in words):
        count += 1
    end = "".join(words[0][len(words[0]) - count :])
    return {name.removesuffix(end): path for name, path in stems.items()}, end


def find_volumes(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Volumes below a folder by their name with its ending in lower case, and a note on the files beside them.

    Raises:
        ValueError: see :func:`pair_volumes`.
    """
    found: dict[str, Path] = {}
    beside: list[str] = []
    unknown: list[str] = []
    for path in files_below(folder):
        name = below(path, folder)
        suffix = next((s for s in VOLUME_SUFFIXES if name.lower().endswith(s)), None)
        if suffix is not None and not path.is_dir():
            key = name[: -len(suffix)] + suffix
            if key in found:
                raise ValueError(f"'{found[key]}' and '{path}' have one name, expected one file: remove one of them")
            found[key] = path
        else:
            (beside if name.lower().endswith(SIDE_SUFFIXES) else unknown).append(name)
    if unknown:
        raise ValueError(
            f"{count(unknown)} in '{folder}' not scored ({shown(unknown)}), expected {', '.join(VOLUME_SUFFIXES)}: convert "
            f"what is a volume, give the folder that a link leads to, and move the rest elsewhere"
        )
    return found, [f"{count(beside)} in '{folder}' are not scored ({shown(beside)})"] if beside else []


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, and links to folders, which are not followed; without hidden ones."""

    def fail(error: OSError) -> None:
        raise error

    paths = []
    # Without `onerror`, a subfolder that cannot be read would count as empty.
    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if Path(place, name).is_symlink()]
        paths += [Path(place, name) for name in [*names, *links] if not name.startswith(".")]
    return paths


def below(path: Path, folder: Path) -> str:
    """A file's name below a folder."""
    return path.relative_to(folder).as_posix()


def count(names: Sequence[str]) -> str:
    """How many files, in words."""
    return f"{len(names)} file{'s' if len(names) != 1 else ''}"


def shown(names: Sequence[str]) -> str:
    """The first names, sorted."""
    return ", ".join(sorted(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
