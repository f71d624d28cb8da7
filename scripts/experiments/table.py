"""python scripts/experiments/table.py scripts/experiments/copying.yaml --runs runs/experiments --workers 2

One table of the evidence: trains every form of attention with every seed by the training scripts themselves, and writes
``runs.csv`` (a row a run), ``README.md`` (mean and standard deviation, and differences from the reference form paired by
seed) and ``table.png`` into ``model_cards/evidence/<name>``. Each run has a folder of its own under ``--runs``; what is
finished is not run again, what was interrupted goes on from its checkpoint.

A table's file says:

- ``title`` and ``question``; ``prepare``: commands that make the data, once;
- ``script`` and ``arguments`` of the training; ``settings`` of every run (``section.key: value``); ``scales``: those of each
  ``--scale``, iterations and warm-up among them;
- ``forms``: names in ``forms.yaml``, or ``standard`` for its list of that name, or forms of its own, with attention's fields in
  the section ``network`` and those of the training in ``section``; ``seeds``;
- ``reference``: the form that others are compared with; ``controls``: those that must do worse, or the table is no evidence;
- ``tuning``: the learning ``rates`` that every form tries, the same for all, in trials with a ``seed`` of their own, a ``share``
  of the iterations and of the warm-up, and ``arguments`` or a ``measure`` (else the first) that judge them on other data;
- ``measures`` (``name: {file, key, better}``); ``then``: commands that follow each training but trials, with its folder as
  ``{folder}``; ``profile`` (``file``, ``key``, ``x``): many figures of a run by a number x, drawn into ``profile.png``;
  ``curves``: keys of ``log.jsonl``, drawn over the training into ``curves.png``;
- ``like``: another table, whose words count where the file has none; ``runs``: one whose folder of trainings it shares, as runs
  with the same settings are the same.
"""

from __future__ import annotations

import csv
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from scipy import stats

ROOT = Path(__file__).parent.parent.parent
# Other scales have folders of their own.
DEFAULT_SCALE = "small"
EVIDENCE = ROOT / "model_cards" / "evidence"
# Differences are given with their interval at this confidence.
CONFIDENCE = 0.95
# The setting that has a form trained by with_variant.py.
VARIANT = "variant"
FORMS = Path(__file__).with_name("forms.yaml")
# In the folder of a run: what was asked for, and that it is done.
SETTINGS, FINISHED = "settings.json", "finished"


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
        self.forms = self._forms()
        for name in (words["reference"], *words["controls"]):
            if name not in self.forms:
                raise typer.BadParameter(f"{path.name} names {name}, but its forms are {', '.join(self.forms)}")

    def _forms(self) -> dict[str, dict[str, Any]]:
        """Settings of each form, in the sections of this table."""
        known = yaml.safe_load(FORMS.read_text())
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
        if seed == self.tuning["seed"]:
            for key in (f"{self.section}.iterations", f"{self.section}.warmup"):
                settings[key] = math.ceil(self.tuning["share"] * settings[key])
        settings |= {f"{self.section}.learning_rate": rate, f"{self.section}.seed": seed}
        return Run(form, seed, rate, settings)

    def measure(self, name: str, folder: Path) -> float:
        """A figure of a finished run."""
        found = self.words["measures"][name]
        value: Any = json.loads((folder / found["file"]).read_text())
        for key in str(found["key"]).split("/"):
            value = value[key]
        return float(value)

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
    words = table.words["arguments"] + (table.tuning["arguments"] if run.seed == table.tuning["seed"] else [])
    asked = {"script": table.words["script"], "arguments": words, "settings": run.settings}
    written = folder / SETTINGS
    if written.is_file() and json.loads(written.read_text()) != asked:
        raise RuntimeError(f"{folder} holds a training with other settings: remove it, or give other --runs")
    written.write_text(json.dumps(asked, indent=2))
    if (folder / FINISHED).is_file():
        return folder
    settings, scripts = dict(run.settings), ROOT / "scripts"
    command = [sys.executable, str(scripts / table.words["script"]), *filled(words, runs, data)]
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
    then = table.words.get("then", []) if run.seed != table.tuning["seed"] else []
    after = [[sys.executable, *filled(step, runs, data, folder)] for step in then]
    with (folder / "output.txt").open("a") as output:
        for step in (command, *after):
            done = subprocess.run(step, env=environment, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
            if done.returncode:
                raise RuntimeError(f"{run.name} ended with status {done.returncode}: see {folder / 'output.txt'}")
    (folder / FINISHED).touch()
    return folder


def train_all(table: Table, wanted: list[Run], runs: Path, data: Path | None, workers: int) -> dict[Run, Path]:
    """All of these trainings, ``workers`` at a time."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ThreadPoolExecutor(workers) as pool:
        folders = pool.map(lambda run: train(table, run, runs, data, threads), wanted)
        return dict(zip(wanted, folders, strict=True))


def choose_rates(table: Table, runs: Path, data: Path | None, workers: int) -> dict[str, float]:
    """The rate of each form: the best by the trials' measure, on a seed that the table does not count."""
    rates = table.tuning["rates"]
    if len(rates) == 1:
        return dict.fromkeys(table.forms, rates[0])
    tried = [table.run(form, table.tuning["seed"], rate) for form in table.forms for rate in rates]
    first = table.tuning.get("measure", next(iter(table.words["measures"])))
    best: dict[str, tuple[float, float]] = {}
    for run, folder in train_all(table, tried, runs, data, workers).items():
        value = table.measure(first, folder)
        if not math.isfinite(value):
            continue
        if run.form not in best or table.better(first, value, best[run.form][0]):
            best[run.form] = value, run.rate
    if diverged := [form for form in table.forms if form not in best]:
        raise RuntimeError(f"no trial of {', '.join(diverged)} has a finite {first}: give lower rates")
    return {form: rate for form, (_, rate) in best.items()}


def paired(values: list[float], reference: list[float]) -> tuple[float, float]:
    """Mean difference from the reference by seed, and the half-width of its t-interval (NaN for one seed)."""
    differences = [a - b for a, b in zip(values, reference, strict=True)]
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return mean, math.nan
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, float(stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)) * error


def ties(table: Table, figures: dict[str, dict[str, list[float]]]) -> list[str]:
    """Controls that are not clearly worse than the reference by the first measure."""
    name, per_form = next(iter(figures.items()))
    reference, tied = per_form[table.words["reference"]], []
    for control in table.words["controls"]:
        difference, width = paired(per_form[control], reference)
        clearly = math.isfinite(width) and abs(difference) > width
        if not clearly or table.better(name, difference, 0.0):
            tied.append(control)
    return tied


def constants(figures: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """The measures but the first that are the same in every run."""
    seen = {name: {value for one in per_form.values() for value in one} for name, per_form in figures.items()}
    return {name: values.pop() for name, values in list(seen.items())[1:] if len(values) == 1}


def titled(table: Table, name: str) -> str:
    """A measure with the direction that is better, if one is."""
    better = table.words["measures"][name].get("better")
    return f"{name} ({better} is better)" if better else name


def markdown(
    table: Table,
    figures: dict[str, dict[str, list[float]]],
    rates: dict[str, float],
    command: str,
    more: list[str],
) -> str:
    """The table in words: ``figures`` are measure -> form -> one value a seed; ``more`` are lines that follow them."""
    reference, lines = table.words["reference"], [f"# {table.words['title']}", ""]
    tied = ties(table, figures)
    if tied:
        they = f"{' and '.join(tied)} {'is' if len(tied) == 1 else 'are'}"
        lines += [f"**No evidence about attention: {they} not worse than {reference}.**", ""]
    lines += [table.words["question"].strip(), ""]
    seeds, tried = (", ".join(map(str, numbers)) for numbers in (table.seeds, table.tuning["rates"]))
    lines += [
        f"Seeds {seeds}, scale `{table.scale}`; mean ± standard deviation over seeds; differences from {reference} are paired by "
        f"seed, with their {CONFIDENCE:.0%} t-interval.",
        "",
    ]
    if len(table.tuning["rates"]) > 1:
        lines[-1:] = [
            f"Each form tried the learning rates {tried}, in trials of {table.tuning['share']:.0%} of the iterations with "
            "another seed and other data; * is the end of the range.",
            "",
        ]
    constant = constants(figures)
    for name, value in constant.items():
        lines += [f"{name}: {value:.4g}.", ""]
    for name, per_form in figures.items():
        if name in constant:
            continue
        lines += [
            f"## {titled(table, name)}",
            "",
            f"| form | rate | mean ± sd | less {reference} |",
            "| --- | ---: | ---: | ---: |",
        ]
        for form, values in per_form.items():
            spread = statistics.stdev(values) if len(values) > 1 else math.nan
            difference, width = paired(values, per_form[reference])
            cell = "" if form == reference else f"{difference:+.4g} ± {width:.2g}"
            tried_rates = table.tuning["rates"]
            ends = "*" if len(tried_rates) > 1 and rates[form] in (min(tried_rates), max(tried_rates)) else ""
            label = f"{form} (control)" if form in table.words["controls"] else form
            lines.append(f"| {label} | {rates[form]:g}{ends} | {statistics.mean(values):.4g} ± {spread:.2g} | {cell} |")
        lines.append("")
    return "\n".join([*lines, *more, "```", command, "```", ""])


def draw(table: Table, figures: dict[str, dict[str, list[float]]], path: Path) -> None:
    """One panel a measure: a dot a seed, a bar at the mean."""
    from matplotlib.figure import Figure

    constant = constants(figures)
    figures = {name: per_form for name, per_form in figures.items() if name not in constant}
    figure = Figure(figsize=(1.5 + 4 * len(figures), 0.5 + 0.35 * len(table.forms)), layout="constrained")
    for axes, (name, per_form) in zip(figure.subplots(1, len(figures), squeeze=False)[0], figures.items(), strict=True):
        for row, values in enumerate(per_form.values()):
            axes.plot(values, [row] * len(values), "o", color="tab:blue", alpha=0.6)
            axes.plot([statistics.mean(values)], [row], "|", color="black", markersize=14)
        axes.set_yticks(range(len(per_form)), list(per_form))
        axes.invert_yaxis()
        axes.set_xlabel(titled(table, name))
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)


def draw_curves(table: Table, folders: dict[str, list[Path]], path: Path) -> None:
    """One panel a key of the logs: the mean over seeds of each form, over the iterations."""
    from matplotlib.figure import Figure

    keys = table.words["curves"]
    figure = Figure(figsize=(4.5 * len(keys), 4), layout="constrained")
    panels = figure.subplots(1, len(keys), squeeze=False)[0]
    for number, (form, places) in enumerate(folders.items()):
        logs = [[json.loads(line) for line in (p / "log.jsonl").read_text().splitlines()] for p in places]
        for axes, key in zip(panels, keys, strict=True):
            means = [statistics.mean(record[key] for record in records) for records in zip(*logs, strict=True)]
            style = dict(color=f"C{number % 10}", linestyle="-" if number < 10 else "--")
            axes.plot([record["step"] for record in logs[0]], means, label=form, **style)
    for axes, key in zip(panels, keys, strict=True):
        axes.set_xlabel("iteration")
        axes.set_title(key)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    panels[-1].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def profile(table: Table, folders: dict[str, list[Path]], path: Path) -> list[str]:
    """The many figures of each form's runs, drawn with their mean and standard deviation; returns their table in words."""
    from matplotlib.figure import Figure

    wanted = table.words["profile"]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    lines: list[str] = []
    for number, (form, places) in enumerate(folders.items()):
        found = [json.loads((p / wanted["file"]).read_text())[wanted["key"]] for p in places]
        means = {x: statistics.mean(one[x] for one in found) for x in found[0]}
        spread = [statistics.stdev([one[x] for one in found]) if len(found) > 1 else 0.0 for x in means]
        style = "-" if number < 10 else "--"
        axes.errorbar(
            [float(x) for x in means], list(means.values()), spread, ls=style, color=f"C{number % 10}", label=form
        )
        if not lines:
            lines = [f"| {wanted['x']} | {' | '.join(means)} |", "| --- |" + " ---: |" * len(means)]
        lines.append(f"| {form} | {' | '.join(f'{value:.3g}' for value in means.values())} |")
    axes.set_xlabel(wanted["x"])
    axes.set_ylabel(wanted["key"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    return [f"## {wanted['key']} by {wanted['x']}", "", *lines, ""]


def main(
    path: Annotated[Path, typer.Argument(help="The table's .yaml file.")],
    runs: Annotated[Path, typer.Option(help="Folder for data and trainings.")],
    data: Annotated[Path | None, typer.Option(help="The folder that the table's commands call {data}.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Trainings at one time.")] = 1,
    scale: Annotated[str, typer.Option(help="One of the table's scales.")] = DEFAULT_SCALE,
    evidence: Annotated[Path, typer.Option(help="Where the table goes, in a folder of its name.")] = EVIDENCE,
) -> None:
    """Run a table."""
    table = Table(path, scale)
    runs, data = runs.resolve(), data and data.resolve()
    for step in table.words.get("prepare", []):
        place = runs / step["makes"]
        if not place.exists():
            subprocess.run([sys.executable, *filled(step["command"], runs, data)], cwd=ROOT, check=True)
    rates = choose_rates(table, runs, data, workers)
    wanted = [table.run(form, seed, rates[form]) for seed in table.seeds for form in table.forms]
    folders = train_all(table, wanted, runs, data, workers)
    figures = {
        name: {
            form: [table.measure(name, folders[table.run(form, seed, rates[form])]) for seed in table.seeds]
            for form in table.forms
        }
        for name in table.words["measures"]
    }
    target = evidence / (table.name if scale == DEFAULT_SCALE else f"{table.name}-{scale}")
    target.mkdir(parents=True, exist_ok=True)
    with (target / "runs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["form", "seed", "rate", "scale", *figures])
        for form in table.forms:
            for place, seed in enumerate(table.seeds):
                row = [figures[name][form][place] for name in figures]
                writer.writerow([form, seed, rates[form], scale, *row])
    command = f"python scripts/experiments/table.py scripts/experiments/{path.name} --runs runs --scale {scale}"
    if data is not None:
        command += f" --data data/{data.name}"
    places = {form: [folders[table.run(form, s, rates[form])] for s in table.seeds] for form in table.forms}
    more = profile(table, places, target / "profile.png") if "profile" in table.words else []
    (target / "README.md").write_text(markdown(table, figures, rates, command, more))
    draw(table, figures, target / "table.png")
    if "curves" in table.words:
        draw_curves(table, places, target / "curves.png")
    print(f"wrote {target}")


if __name__ == "__main__":
    typer.run(main)
