"""Reads a prepared folder: its cases by split, and their labels."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_binaryformer.modeling.at_rest import check_state, state_of
from hf_binaryformer.modeling.file_names import stays_below
from hf_binaryformer.pipelines.volumes import Volume, read_volume

# What every case states as text, besides its group.
TEXTS = ("case", "split", "image")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Case:
    """One volume of a prepared folder."""

    name: str
    group: str
    split: str
    image: Path
    # None in a folder without labels; the autoencoder can be trained on such a folder.
    label: Path | None
    # Which kind of volume it is among those of a synthetic data set's validation and test.
    set: str | None = None


def read_manifest(path: Path) -> dict[str, Any]:
    """The content of a manifest.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON; its label names are not texts by whole number; or one of its cases lacks a name, a group,
            a split or an image, or names a file outside the folder.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no manifest.json: write it with `binaryformer prepare`")
    remedy = "expected what `binaryformer prepare` wrote: prepare the data anew"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}), {remedy}") from error
    names = manifest.get("label_names", {}) if isinstance(manifest, dict) else None
    cases = manifest.get("cases") if isinstance(manifest, dict) else None
    if not isinstance(names, dict) or not isinstance(cases, list):
        raise ValueError(f"{path} has no label_names by number or no list of cases, {remedy}")
    if wrong := [k for k, v in names.items() if not re.fullmatch(r"[0-9]{1,9}", k) or not isinstance(v, str)]:
        raise ValueError(f"{path} has label_names for {wrong[:5]}, which are no texts by whole number, {remedy}")
    for number, case in enumerate(cases):
        texts = [case.get(key, "") for key in (*TEXTS, "label")] if isinstance(case, dict) else []
        if not texts or not all(isinstance(text, str) for text in texts) or not {*TEXTS, "group"} <= case.keys():
            raise ValueError(f"{path}: case {number} lacks one of {', '.join(TEXTS)} and group as text, {remedy}")
        if wrong := [case[key] for key in ("image", "label") if key in case and not stays_below(case[key])]:
            raise ValueError(f"{path}: case {number} names '{wrong[0]}', which is not below its folder, {remedy}")
        if not stays_below(case["case"]) or "/" in case["case"]:
            raise ValueError(f"{path}: case {number} is named '{case['case']}', which is no name of a file, {remedy}")
    return manifest


class PreparedFolder:
    """What ``binaryformer prepare`` wrote: the manifest's cases and label names.

    Raises:
        FileNotFoundError: the folder has no manifest.
        ValueError: the manifest is damaged, or another kind of file.
    """

    def __init__(self, folder: Path) -> None:
        self.manifest = read_manifest(folder / "manifest.json")
        if "label_names" not in self.manifest:
            raise ValueError(f"{folder} has no label_names in its manifest.json: prepare the data anew")
        self.label_names = {int(k): str(v) for k, v in self.manifest["label_names"].items()}
        self.cases = [
            Case(
                c["case"],
                str(c["group"]),
                c["split"],
                folder / c["image"],
                folder / c["label"] if "label" in c else None,
                c.get("set"),
            )
            for c in self.manifest["cases"]
        ]
        self._files = [path for case in self.cases for path in (case.image, case.label) if path is not None]
        self._state = state_of(self._files)

    def check_unchanged(self) -> None:
        """Refuse figures of a run that has read some files before, and others after, they were changed.

        Raises:
            ChangedError: a file is not as it was when this object was made.
        """
        check_state(self._state, self._files)

    def split(self, name: str) -> list[Case]:
        """Cases of "train", "validation" or "test".

        Raises:
            ValueError: a group of the split is also in another split.
        """
        chosen = [case for case in self.cases if case.split == name]
        elsewhere = {case.group for case in self.cases if case.split != name}
        leaked = sorted({case.group for case in chosen} & elsewhere)
        if leaked:
            raise ValueError(
                f"groups {', '.join(leaked[:5])} of split '{name}' stand in other splits too: prepare the data anew"
            )
        return chosen


def read_labels(case: Case) -> Volume:
    """The labels of a case; a warning tells what had to be rounded.

    Raises:
        ValueError: it has none.
    """
    if case.label is None:
        raise ValueError(f"{case.name} has no labels: prepare the data from a source with labels")
    labels = read_volume(case.label, labels=True)
    for note in labels.notes:
        warnings.warn(note, stacklevel=2)
    return labels
