"""Label schemes: names of labels, and how the labels of two tools are brought to the same numbers."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_binaryformer.pipelines.structure_names import without_side

FREESURFER = "freesurfer"
# The word for a mapping of the numbers in FreeSurfer's aseg.mgz and aparc+aseg.mgz, after its FreeSurferColorLUT.txt.
ASEG = "aseg"
# What is a part of a structure there, or beside the brain: vessels, chiasm, lesions outside white matter.
ASEG_PARTS = {31: 4, 63: 43, 72: 24, 78: 2, 79: 41, 30: 0, 62: 0, 80: 0, 81: 0, 82: 0, 85: 0}
# White matter that it gives no side: lesions, and the five parts of the corpus callosum.
ASEG_WITHOUT_SIDE = dict.fromkeys((77, 251, 252, 253, 254, 255), 2)
# Parcels of the cortex and of the white matter below it, 1000 or 3000 and more to the left.
ASEG_PARCELS = {
    **{first + n: 3 if first == 1000 else 42 for first in (1000, 2000) for n in range(36)},
    **{first + n: 2 if first == 3000 else 41 for first in (3000, 4000) for n in range(36)},
    **{5001: 2, 5002: 41},
}
# In a mapping, the source of all labels that it does not name.
OTHERS = "*"
# Labels up to here are looked up in a table of that length.
TABLE_LABELS = 2**22
EXPECTED = 'expected {"2": 1, "41": "white matter"} as JSON, or such pairs in two columns of a CSV'
Targets = dict[int | str, int]


@dataclass(frozen=True)
class Scheme:
    """What is done to both volumes before they are scored.

    Args:
        names: of the labels to score; None: those that occur.
        of_pred, of_truth: new label of each label; None leaves them as they are.
        merged: new label of a label, after that.
    """

    names: dict[int, str] | None
    of_pred: Targets | None
    of_truth: Targets | None
    merged: dict[int, int]

    def pred(self, labels: np.ndarray) -> np.ndarray:
        """The prediction's labels (I, J, K) in the common scheme.

        Raises:
            ValueError: a label occurs that the mapping does not name.
        """
        return self._apply(labels, self.of_pred, "map-pred")

    def truth(self, labels: np.ndarray) -> np.ndarray:
        """The truth's labels, likewise."""
        return self._apply(labels, self.of_truth, "map-truth")

    def _apply(self, labels: np.ndarray, targets: Targets | None, option: str) -> np.ndarray:
        if targets is None and not self.merged:
            return labels
        found, place = _occurring(labels)
        new = dict(zip(found, found, strict=True))
        if targets is not None:
            if unknown := [n for n in found if n and n not in targets and OTHERS not in targets]:
                raise ValueError(
                    f"labels {unknown} are not in the file of --{option}: add them, with 0 for background, or a line for '*', "
                    f"which stands for all others"
                )
            new = {n: targets.get(n, targets.get(OTHERS, 0) if n else 0) for n in found}
        return np.array([self.merged.get(new[n], new[n]) for n in found], dtype=np.int32)[place]


def read_label_names(path: Path) -> dict[int, str]:
    """Label names from JSON: {"1": "cortex", ...}, the report of `segment`, a data set's manifest, or a model's config.

    Args:
        path: the file; or the word "freesurfer", for the numbers of FreeSurfer's aseg and of SynthSeg.

    Raises:
        ValueError: the file holds none of these.
    """
    if str(path) == FREESURFER and not path.exists():
        from hf_binaryformer.data.synthesis.description import DESCRIPTIONS, load_description

        return dict(load_description(DESCRIPTIONS / "brain-sides.yaml").label_names)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = next((content[key] for key in ("labels", "label_names", "id2label") if key in content), content)
        if content.get("label_values") and names is content.get("id2label"):
            names = dict(zip(content["label_values"], (names[key] for key in sorted(names, key=int)), strict=True))
        if isinstance(names, list):
            names = {row["label"]: row["name"] for row in names}
        return {int(number): str(name) for number, name in names.items()}
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError(f'{path} does not hold label names ({error}); expected JSON like {{"1": "cortex"}}') from error


def read_mapping(path: Path) -> dict[int | str, int | str]:
    """New labels from a file: a number, or "*" for all that are not named, and the number or the name that it becomes.

    0, an empty text and "background" are the background. A line of titles in a CSV is passed over.

    Args:
        path: .json with one object, or .csv with two columns (a third and further ones are not read).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or one label twice.
    """
    text = path.read_text(encoding="utf-8-sig")
    try:
        if path.suffix.lower() == ".json":
            pairs = json.loads(text, object_pairs_hook=list)
            rows = [[str(source), str(target)] for source, target in pairs]
        else:
            rows = [row for row in csv.reader(text.splitlines()) if any(cell.strip() for cell in row)]
            if rows and not (_is_number(rows[0][0]) or rows[0][0].strip() == OTHERS):
                rows = rows[1:]
        mapping: dict[int | str, int | str] = {}
        for source, target in ((row[0].strip(), row[1].strip()) for row in rows):
            key = OTHERS if source == OTHERS else int(source)
            if key in mapping:
                raise ValueError(f"label {source} stands in two places")
            mapping[key] = int(target) if _is_number(target) else target
            if (isinstance(key, int) and key < 0) or (_is_number(target) and int(target) < 0):
                raise ValueError(f"{source}, {target} is negative")
    except (ValueError, TypeError, IndexError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path} does not hold labels and their new labels ({error}); {EXPECTED}") from error
    if not mapping:
        raise ValueError(f"{path} is empty; {EXPECTED}")
    return mapping


def common_scheme(
    names: Mapping[int, str] | None, map_pred: Path | None, map_truth: Path | None, *, merge_sides: bool = False
) -> Scheme:
    """The scheme that prediction and truth are scored in.

    A name in a mapping becomes the number that has this name. Without names, new numbers are given, which needs a mapping
    for both sides.

    Args:
        names: of label numbers; None: not known.
        map_pred, map_truth: see :func:`read_mapping`, or the word "aseg" for the numbers of FreeSurfer's own volumes.
        merge_sides: "left hippocampus" and "right hippocampus" become one label, "hippocampus".

    Raises:
        ValueError: a mapping has a name that no label has, there are no names to tell sides by, or aseg's structures without
            a side are to be scored by side.
    """
    read = [None if path is None else _mapping(path, merge_sides) for path in (map_pred, map_truth)]
    targets = [target for mapping in read if mapping is not None for target in mapping.values()]
    known = {name.casefold(): number for number, name in (names or {}).items()} | {"background": 0, "": 0}
    new_names = [target for target in targets if isinstance(target, str) and target.casefold() not in known]
    scored = None if names is None else dict(names)
    if new_names:
        if names is not None:
            raise ValueError(f"'{new_names[0]}' is the name of no label; there are {', '.join(sorted(names.values()))}")
        if None in read:
            raise ValueError(
                f"'{new_names[0]}' is a name, and which number the other volume has for it is not known: give --labels, or a "
                f"mapping for both"
            )
        scored = {number: f"label {number}" for number in targets if isinstance(number, int) and number}
        for name in new_names:
            if name.casefold() not in known:
                known[name.casefold()] = max(scored, default=0) + 1
                scored[known[name.casefold()]] = name
    of_pred, of_truth = (
        None if m is None else {k: known[t.casefold()] if isinstance(t, str) else t for k, t in m.items()} for m in read
    )
    merged: dict[int, int] = {}
    if merge_sides:
        if scored is None:
            raise ValueError("--merge-sides needs the names of labels: give --labels, for example --labels freesurfer")
        first: dict[str, int] = {}
        for number, name in sorted(scored.items()):
            merged[number] = first.setdefault(without_side(name).casefold(), number)
        scored = {number: without_side(scored[number]) for number in first.values()}
    return Scheme(scored, of_pred, of_truth, merged)


def _mapping(path: Path, merge_sides: bool) -> Mapping[int | str, int | str]:
    if str(path) != ASEG or path.exists():
        return read_mapping(path)
    if not merge_sides:
        raise ValueError("aseg has white matter without a side (corpus callosum, lesions): add --merge-sides")
    own = {number: number for number in read_label_names(Path(FREESURFER))}
    return dict((own | ASEG_PARTS | ASEG_WITHOUT_SIDE | ASEG_PARCELS).items())


def _occurring(labels: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Labels that occur, ascending, and for each voxel the place of its label among them."""
    if int(labels.max()) > TABLE_LABELS:
        found, place = np.unique(labels, return_inverse=True)
        return found.tolist(), place.reshape(labels.shape)
    present = np.flatnonzero(np.bincount(labels.ravel()))
    table = np.zeros(present[-1] + 1, dtype=np.int32)
    table[present] = np.arange(len(present))
    return present.tolist(), table[labels]


def _is_number(text: str) -> bool:
    try:
        int(text)
    except ValueError:
        return False
    return True
