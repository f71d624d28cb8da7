"""Reads a table of the evidence from its YAML file, at one of its scales.

A table's file has these keys:

- ``title``, ``question``, and ``answer``: what was found, once it is known. ``source``: the usual name of the folder
  {data}. ``prepare``: commands that run once to make the data.
- ``script`` and ``arguments`` of the training. ``settings`` of every run (``section.key: value``). ``scales``: the
  settings of each ``--scale``, among them iterations and warm-up.
- ``forms``: names in ``forms.yaml``, or ``standard`` for its list of that name, or forms of its own. ``network`` is the
  section with attention's fields, ``section`` that of the training. ``seeds``: the random seeds.
- ``reference``: the form that others are compared with. ``controls``: forms that must do worse; otherwise the table is
  no evidence.
- ``tuning``: the learning ``rates`` that every form tries, the same for all. The trials have a ``seed`` of their own
  and a ``share`` of the iterations and of the warm-up. ``arguments`` or a ``measure`` (default: the first) judge them
  on other data. With one rate there are no trials. Forms whose rate is in ``rates_of`` (``form: rate``) have none
  either.
- ``measures`` (``name: {file, key, better}``). With ``below``, the measure is the step of the log's first record whose
  key is below that value, or else of its last record.
- ``then``: commands that follow each training except trials, with its folder as ``{folder}``.
- ``profile`` (``file``, ``key``, ``x``, ``y``): many figures y of a run by a number x, drawn into ``profile.png``.
  ``curves``: keys of ``log.jsonl``, drawn over the training into ``curves.png``.
- ``first``: trainings that others need (``form``, ``seed``, ``rate``).
- ``like``: another table, whose entries apply where the file has none; ``changes``: settings that differ from those of
  that table. ``runs``: a table whose trainings this one shares, because runs with the same settings are the same.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
import yaml

from hf_binaryformer.training.recipes import RECIPES
from table_record import Finished, Record, digest

ROOT = Path(__file__).parent.parent.parent
# Forms with this setting are trained by train_variant.py.
VARIANT = "variant"
FORMS = Path(__file__).with_name("forms.yaml")


@dataclass(frozen=True)
class Run:
    """One training of a table."""

    form: str
    seed: int
    rate: float
    settings: dict[str, Any] = field(compare=False)

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return f"{self.form}-rate{self.rate:g}-seed{self.seed}"


def number(value: float | None) -> float:
    """A number of a record, in which None stands for NaN."""
    return math.nan if value is None else float(value)


def read_words(path: Path) -> dict[str, Any]:
    """A table's entries, together with those of the table that it is like."""
    words: dict[str, Any] = yaml.safe_load(path.read_text())
    if "like" in words:
        words = {"answer": None} | words  # that of the other table is no answer to this one's question
        words = read_words(path.with_name(f"{words['like']}.yaml")) | words
        words["settings"] = words["settings"] | words.pop("changes", {})
    return words


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A log's records."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_recipe(name: str, section: str) -> dict[str, Any]:
    """A recipe's settings of one training (``section.key: value``), without others in its file; read without checks."""
    (path,) = RECIPES.rglob(f"{name}.yaml")
    words = yaml.safe_load(path.read_text())
    return {
        f"{part}.{key}": value
        for part, fields in words.items()
        if part == section or "iterations" not in fields
        for key, value in fields.items()
    }


def trained_on(folder: Path) -> str:
    """The device and the version of torch that a run's record names; empty if it names none."""
    path = folder / "training.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    return f"on {record['device']} with torch {record['torch']}" if {"device", "torch"} <= record.keys() else ""


class Table:
    """A table's file, at one of its scales."""

    def __init__(self, path: Path, scale: str) -> None:
        self.name, self.path, self.scale = path.stem, path, scale
        words = read_words(path)
        if scale not in words["scales"]:
            raise typer.BadParameter(f"--scale {scale}: {path.name} has {', '.join(words['scales'])}")
        self.words = words
        self.seeds: list[int] = words["seeds"]
        self.tuning: dict[str, Any] = words["tuning"]
        self.section: str = words["section"]
        known = yaml.safe_load(FORMS.read_text())
        self.forms = self._forms(known)
        self.pairs = [pair for pair in known["compare"] if {*pair} <= {*self.forms}]
        for name in (words["reference"], *words["controls"]):
            if name not in self.forms:
                raise typer.BadParameter(f"{path.name} names {name}, but its forms are {', '.join(self.forms)}")

    def _forms(self, known: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Settings of each form, in the sections of this table."""
        names = known["standard"] if self.words["forms"] == "standard" else self.words["forms"]
        if isinstance(names, dict):
            known["forms"] |= names
        sections = {"network": self.words["network"], "train": self.section}
        forms = {}
        for name in names:
            if name not in known["forms"]:
                raise typer.BadParameter(f"{self.path.name}: no form '{name}' in {FORMS.name}")
            pairs = [(key.partition("."), value) for key, value in (known["common"] | known["forms"][name]).items()]
            forms[name] = {sections.get(head, head) + dot + field: value for (head, dot, field), value in pairs}
        return forms

    def run(self, form: str, seed: int, rate: float) -> Run:
        """The settings of a training: common ones, the scale's, the form's, those of trials, rate and seed."""
        settings = {**self.words["settings"], **self.words["scales"][self.scale], **self.forms[form]}
        settings[f"{self.section}.iterations"] *= settings.pop("times", 1)
        if seed == self.tuning["seed"]:  # a trial
            for key in (f"{self.section}.iterations", f"{self.section}.warmup"):
                settings[key] = math.ceil(self.tuning["share"] * settings[key])
        settings |= {f"{self.section}.learning_rate": rate, f"{self.section}.seed": seed}
        return Run(form, seed, rate, settings)

    def measure(self, name: str, folder: Path) -> float:
        """A figure of a finished run."""
        found = self.words["measures"][name]
        if "below" in found:
            records = read_lines(folder / found["file"])
            return float(next((r for r in records if number(r[found["key"]]) < found["below"]), records[-1])["step"])
        value: Any = json.loads((folder / found["file"]).read_text())
        for key in str(found["key"]).split("/"):
            value = value[key]
        return number(value)

    def asked(self, run: Run) -> dict[str, Any]:
        """What a training's results depend on, apart from the code: data, settings, and the commands that follow."""
        words = self.words["arguments"] + (self.tuning["arguments"] if self.is_trial(run) else [])
        recipe = words[words.index("--recipe") + 1] if "--recipe" in words else None
        return {
            "script": self.words["script"],
            "arguments": words,
            "settings": (read_recipe(recipe, self.section) if recipe else {}) | run.settings,
            "prepare": [step["command"] for step in self.words.get("prepare", [])],
            "then": [] if self.is_trial(run) else self.words.get("then", []),
        }

    def is_trial(self, run: Run) -> bool:
        """Whether a run only helps to choose a rate."""
        return run.seed == self.tuning["seed"]

    def wanted(self, run: Run) -> list[str]:
        """The measures that are taken of a run."""
        names = list(self.words["measures"])
        return [self.tuning.get("measure", names[0])] if self.is_trial(run) else names

    def kept(self, record: Record, run: Run) -> Finished | None:
        """The results of a run in a record, if they have everything that the table shows."""
        found = record.finished.get(digest(self.asked(run)))
        series = [] if self.is_trial(run) else self.words.get("curves", []) + [p["key"] for p in self.profiles]
        complete = found and {*self.wanted(run)} <= {*found.figures} and {*series} <= {*found.series}
        return found if complete else None

    @property
    def profiles(self) -> list[dict[str, str]]:
        """The profile, if the table has one."""
        return [self.words["profile"]] if "profile" in self.words else []

    def gave(self, run: Run, folder: Path) -> Finished:
        """The results that a finished run left in its folder."""
        about = {"form": run.form, "seed": run.seed, "rate": f"{run.rate:g}", "scale": self.scale}
        about |= {"settings": digest(self.asked(run)), "trained": trained_on(folder)}
        series = {}
        if not self.is_trial(run):
            log = read_lines(folder / "log.jsonl") if "curves" in self.words else []
            series = {
                key: {str(line["step"]): number(line[key]) for line in log} for key in self.words.get("curves", [])
            }
            for wanted in self.profiles:
                series[wanted["key"]] = json.loads((folder / wanted["file"]).read_text())[wanted["key"]]
        figures = {name: self.measure(name, folder) for name in self.wanted(run)}
        return Finished({key: str(value) for key, value in about.items()}, figures, series)

    def better(self, name: str, a: float, b: float) -> bool:
        """Whether figure a is better than b."""
        return a > b if self.words["measures"][name]["better"] == "higher" else a < b
