"""Reads a prepared folder: its cases by split, and their labels."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

from hf_binaryformer.pipelines.volumes import Volume, read_volume

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


class PreparedFolder:
    """What ``binaryformer prepare`` wrote: the manifest's cases and label names.

    Raises:
        FileNotFoundError: the folder has no manifest.
    """

    def __init__(self, folder: Path) -> None:
        manifest = folder / "manifest.json"
        if not manifest.is_file():
            raise FileNotFoundError(f"{folder} has no manifest.json: write it with `binaryformer prepare`")
        self.manifest = json.loads(manifest.read_text())
        self.label_names = {int(k): str(v) for k, v in self.manifest["label_names"].items()}
        self.cases = [
            Case(
                c["case"],
                str(c["group"]),
                c["split"],
                folder / c["image"],
                folder / c["label"] if "label" in c else None,
            )
            for c in self.manifest["cases"]
        ]

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
