"""python scripts/experiments/table.py scripts/experiments/copying.yaml --runs runs/experiments --workers 2

One table of the evidence: trains every form of attention with every seed by the training scripts themselves, and writes
``runs.csv`` (a row a run, trials too), ``README.md`` (mean and standard deviation, and differences from the reference form paired
by seed) and ``table.png`` into ``model_cards/evidence/<name>``. Each run has a folder of its own under ``--runs``; what is
finished is not run again, what was interrupted goes on from its checkpoint. Rows of ``runs.csv`` are written as runs end, and
count on any machine (``table_record.py``), so that a table can be made in parts.

A table's file says:

- ``title`` and ``question``; ``source``: what people call the folder {data}; ``prepare``: commands that make the data, once;
- ``script`` and ``arguments`` of the training; ``settings`` of every run (``section.key: value``); ``scales``: those of each
  ``--scale``, iterations and warm-up among them;
- ``forms``: names in ``forms.yaml``, or ``standard`` for its list of that name, or forms of its own, with attention's fields in
  the section ``network`` and those of the training in ``section``; ``seeds``;
- ``reference``: the form that others are compared with; ``controls``: those that must do worse, or the table is no evidence;
- ``tuning``: the learning ``rates`` that every form tries, the same for all, in trials with a ``seed`` of their own, a ``share``
  of the iterations and of the warm-up, and ``arguments`` or a ``measure`` (else the first) that judge them on other data; for one
  rate there are no trials, nor for the forms whose rates ``rates_of`` says (``form: rate``);
- ``measures`` (``name: {file, key, better}``, or with ``below`` the step of the log's first record whose key is below it, or its
  last); ``then``: commands that follow each training but trials, with its folder as
  ``{folder}``; ``profile`` (``file``, ``key``, ``x``, ``y``): many figures y of a run by a number x, drawn into ``profile.png``;
  ``curves``: keys of ``log.jsonl``, drawn over the training into ``curves.png``;
- ``first``: trainings that others need (``form``, ``seed``, ``rate``);
- ``like``: another table, whose words count where the file has none; ``runs``: one whose trainings it shares, as runs with the
  same settings are the same.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from table_record import Finished, Record, digest
from table_report import draw, draw_curves, markdown, profile

ROOT = Path(__file__).parent.parent.parent
# Other scales have folders of their own.
DEFAULT_SCALE = "small"
EVIDENCE = ROOT / "model_cards" / "evidence"
# The setting that has a form trained by with_variant.py.
VARIANT = "variant"
FORMS = Path(__file__).with_name("forms.yaml")
# In the folder of a run: what was asked for, and that it is done.
SETTINGS, FINISHED = "settings.json", "finished"
# Ends the name of a file beside the data: the command that made them.
MADE_BY = ".made_by.json"


@dataclass(frozen=True)
class Run:
    """One training of a table."""

    form: str
    seed: int
    rate: float
    settings: dict[str, Any] = field(compare=False)

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.form}-rate{self.rate:g}-seed{self.seed}"


def number(value: float | None) -> float:
    """Of a record, in which None stands for what is not a number."""
    return math.nan if value is None else float(value)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A log's records."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_recipe(name: str, section: str) -> dict[str, Any]:
    """What a recipe says of a training (``section.key: value``), and not of others in its file; read without its checks."""
    (path,) = (ROOT / "scripts" / "recipes").rglob(f"{name}.yaml")
    words = yaml.safe_load(path.read_text())
    return {
        f"{part}.{key}": value
        for part, fields in words.items()
        if part == section or "iterations" not in fields
        for key, value in fields.items()
    }


class Table:
    """A table's file, at one of its scales."""

    def __init__(self, path: Path, scale: str) -> None:
        self.name, self.path, self.scale = path.stem, path, scale
        words: dict[str, Any] = yaml.safe_load(path.read_text())
        if "like" in words:
            words = yaml.safe_load(path.with_name(f"{words['like']}.yaml").read_text()) | words
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
        """All that decides what a training gives, but the code: its data, its settings, and what is done with it afterwards."""
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
        """What a record has of a run, if it has all that the table shows."""
        found = record.finished.get(digest(self.asked(run)))
        series = [] if self.is_trial(run) else self.words.get("curves", []) + [p["key"] for p in self.profiles]
        complete = found and {*self.wanted(run)} <= {*found.figures} and {*series} <= {*found.series}
        return found if complete else None

    @property
    def profiles(self) -> list[dict[str, str]]:
        """The profile, if the table has one."""
        return [self.words["profile"]] if "profile" in self.words else []

    def gave(self, run: Run, folder: Path) -> Finished:
        """What a finished run left in its folder."""
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


def filled(words: list[str], runs: Path, data: Path | None, folder: Path | None = None) -> list[str]:
    """A command's words with the places of {runs}, {data} and, of a run, its {folder} and where all {trainings} are."""
    if data is None and any("{data}" in word for word in words):
        raise typer.BadParameter("this table reads a folder of data: give --data")
    return [word.format(runs=runs, data=data, folder=folder, trainings=folder and folder.parent) for word in words]


def train(table: Table, run: Run, runs: Path, data: Path | None, threads: int) -> Path:
    """Train in a process of its own, or go on with it; returns the run's folder.

    Raises:
        RuntimeError: the training failed, or the folder holds one with other settings.
    """
    folder = runs / table.words.get("runs", table.name) / table.scale / run.name
    folder.mkdir(parents=True, exist_ok=True)
    asked = table.asked(run)
    written = folder / SETTINGS
    if written.is_file() and json.loads(written.read_text()) != asked:
        raise RuntimeError(f"{folder} holds a training with other settings: remove it, or give other --runs")
    written.write_text(json.dumps(asked, indent=2))
    if (folder / FINISHED).is_file():
        return folder
    settings, scripts = dict(run.settings), ROOT / "scripts"
    command = [sys.executable, str(scripts / table.words["script"]), *filled(asked["arguments"], runs, data)]
    command += ["--output", str(folder)]
    if variant := settings.pop(VARIANT, None):
        command[1:1] = [str(scripts / "experiments" / "with_variant.py"), *filled([variant], runs, data, folder)]
    for key, value in settings.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    if any((folder / "checkpoints").glob("step_????????")):
        command.append("--resume")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts")]),
    }
    then = [] if table.is_trial(run) else table.words.get("then", [])
    after = [[sys.executable, *filled(step, runs, data, folder)] for step in then]
    with (folder / "output.txt").open("a") as output:
        for step in (command, *after):
            done = subprocess.run(step, env=environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
            if done.returncode:
                raise RuntimeError(f"{run.name} ended with status {done.returncode}: see {folder / 'output.txt'}")
    (folder / FINISHED).touch()
    return folder


def prepare(makes: Path, command: list[str], runs: Path, data: Path | None) -> None:
    """Make a table's data, unless they are there.

    Raises:
        RuntimeError: those that are there were made by another command.
    """
    note, words = makes.with_name(makes.name + MADE_BY), json.dumps(command)
    if not makes.exists():
        subprocess.run([sys.executable, *filled(command, runs, data)], cwd=ROOT, check=True)
        note.write_text(words)
    elif note.is_file() and note.read_text() != words:
        raise RuntimeError(f"{makes} was made by another command than the table has now: remove it")


@dataclass(frozen=True)
class Work:
    """Where a table's trainings are, and where what they gave is kept.

    Args:
        table: whose trainings.
        record: of what is finished, in the evidence.
        shared: that of the table whose runs it shares, or of none.
        runs: folder of data and trainings.
        data: what the table's commands call {data}.
        workers: trainings at one time.
    """

    table: Table
    record: Record
    shared: Record
    runs: Path
    data: Path | None
    workers: int

    def train_all(self, wanted: list[Run]) -> dict[Run, Finished]:
        """All of these trainings; those that are recorded are not run."""
        table = self.table
        threads = max(1, (os.cpu_count() or 1) // self.workers)
        found = {run: table.kept(self.record, run) or table.kept(self.shared, run) for run in wanted}
        if not all(found.values()):
            for step in table.words.get("prepare", []):
                prepare(self.runs / step["makes"], step["command"], self.runs, self.data)
            for first in table.words.get("first", []):
                train(table, table.run(**first), self.runs, self.data, threads)

        def finish(run: Run) -> Finished:
            one = found[run] or table.gave(run, train(table, run, self.runs, self.data, threads))
            self.record.add(one)
            return one

        with ThreadPoolExecutor(self.workers) as pool:
            return dict(zip(wanted, pool.map(finish, wanted), strict=True))

    def choose_rates(self) -> tuple[dict[str, float], list[Run]]:
        """The rate of each form, the best by the trials' measure on a seed that the table does not count; and the trials."""
        table = self.table
        rates = table.tuning["rates"]
        said = dict.fromkeys(table.forms if len(rates) == 1 else [], rates[0]) | table.tuning.get("rates_of", {})
        tried = [
            table.run(form, table.tuning["seed"], rate) for form in table.forms if form not in said for rate in rates
        ]
        if not tried:
            return said, []
        (measure,) = table.wanted(tried[0])
        best: dict[str, tuple[float, float]] = {}
        for run, one in self.train_all(tried).items():
            value = one.figures[measure]
            if not math.isfinite(value):
                continue
            if run.form not in best or table.better(measure, value, best[run.form][0]):
                best[run.form] = value, run.rate
        if diverged := [form for form in table.forms if form not in {*best, *said}]:
            raise RuntimeError(f"no trial of {', '.join(diverged)} has a finite {measure}: give lower rates")
        return {form: rate for form, (_, rate) in best.items()} | said, tried


def trained_on(folder: Path) -> str:
    """The device and the version of torch that a run's record names; empty if it names none."""
    path = folder / "training.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    return f"on {record['device']} with torch {record['torch']}" if {"device", "torch"} <= record.keys() else ""


def main(
    path: Annotated[Path, typer.Argument(help="The table's .yaml file.")],
    runs: Annotated[Path, typer.Option(help="Folder for data and trainings.")],
    data: Annotated[
        Path | None,
        typer.Option(help="The folder that the table's commands call {data}; records do not tell one from another."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Trainings at one time.")] = 1,
    scale: Annotated[str, typer.Option(help="One of the table's scales.")] = DEFAULT_SCALE,
    evidence: Annotated[Path, typer.Option(help="Where the table goes, in a folder of its name.")] = EVIDENCE,
) -> None:
    """Run a table."""
    table = Table(path, scale)
    record, shared = (
        Record(evidence / (name if scale == DEFAULT_SCALE else f"{name}-{scale}"))
        for name in (table.name, table.words.get("runs", table.name))
    )
    work = Work(table, record, shared, runs.resolve(), data and data.resolve(), workers)
    rates, tried = work.choose_rates()
    per_form = {form: [table.run(form, seed, rates[form]) for seed in table.seeds] for form in table.forms}
    by_seed = [run for seed in zip(*per_form.values(), strict=True) for run in seed]
    finished = work.train_all(by_seed)
    record.keep([digest(table.asked(run)) for run in (*sum(per_form.values(), []), *tried)])
    ended = {form: [finished[run] for run in runs_of_it] for form, runs_of_it in per_form.items()}
    figures = {
        name: {form: [one.figures[name] for one in of_form] for form, of_form in ended.items()}
        for name in table.words["measures"]
    }
    target = record.folder
    command = f"python scripts/experiments/table.py scripts/experiments/{path.name} --runs runs --scale {scale}"
    if "source" in table.words:
        command += f" --data {table.words['source']}"
    trained = {one.about["trained"] for one in finished.values()}
    known = " and ".join(sorted(trained - {""}))
    more = profile(table, ended, target / "profile.png") if "profile" in table.words else []
    more += [f"Trained {known}{'; some runs have no record of it' if '' in trained else ''}.", ""] if known else []
    (target / "README.md").write_text(markdown(table, figures, rates, command, more))
    draw(table, figures, target / "table.png")
    if "curves" in table.words:
        draw_curves(table, ended, target / "curves.png")
    print(f"wrote {target}")


if __name__ == "__main__":
    typer.run(main)
