"""The record of finished trainings, kept beside a table, so that no machine repeats the trainings of another one.

``runs.csv`` has one row per training: its form, seed, rate and scale, a digest of all its settings, the device, and its
figures. ``series.csv`` has a training's results along an axis, one row per number. Rows are valid as long as the
settings that they were made with are those of the table. To train again, remove the rows.
"""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

RUNS, SERIES = "runs.csv", "series.csv"
ABOUT = ["form", "seed", "rate", "scale", "settings", "trained"]
AXES = ["form", "seed", "settings", "series", "x", "value"]


def digest(asked: dict[str, Any]) -> str:
    """Digest of the requested settings: the same for the same settings, on any machine."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Finished:
    """The results of one training.

    Args:
        about: form, seed, rate, scale, digest of the settings, and what it was trained on.
        figures: its measures by name.
        series: its results along an axis: name -> x -> value.
    """

    about: dict[str, str]
    figures: dict[str, float]
    series: dict[str, dict[str, float]] = field(default_factory=dict)


class Record:
    """The finished trainings in a folder of the evidence, by the digest of their settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.finished: dict[str, Finished] = {}
        self._lock = Lock()
        for row in _rows(folder / RUNS):
            about = {key: row.pop(key) for key in ABOUT}
            figures = {name: float(value) for name, value in row.items() if value}
            self.finished[about["settings"]] = Finished(about, figures)
        for row in _rows(folder / SERIES):
            if row["settings"] in self.finished:
                series = self.finished[row["settings"]].series
                series.setdefault(row["series"], {})[row["x"]] = float(row["value"])

    def add(self, one: Finished) -> None:
        """Add the results of a training, and write them to disk at once."""
        with self._lock:
            self.finished[one.about["settings"]] = one
            self._write()

    def keep(self, settings: list[str]) -> None:
        """Keep only the trainings with these digests, in this order."""
        with self._lock:
            self.finished = {key: self.finished[key] for key in settings}
            self._write()

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        names = list(dict.fromkeys(name for one in self.finished.values() for name in one.figures))
        rows = [{**one.about, **one.figures} for one in self.finished.values()]
        _write_rows(self.folder / RUNS, [*ABOUT, *names], rows)
        points = [
            {**{key: one.about[key] for key in AXES[:3]}, "series": name, "x": x, "value": value}
            for one in self.finished.values()
            for name, values in one.series.items()
            for x, value in values.items()
        ]
        if points or (self.folder / SERIES).exists():
            _write_rows(self.folder / SERIES, AXES, points)


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _write_rows(path: Path, names: list[str], rows: list[dict[str, Any]]) -> None:
    """All rows, at once or not at all."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)
