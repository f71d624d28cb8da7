"""python scripts/experiments/table.py scripts/experiments/copying.yaml --runs runs/experiments --workers 2

Makes one table of the evidence. Trains every form of attention with every seed, using the training scripts themselves.
Writes ``runs.csv`` (one row per run, including trials), ``README.md`` (mean and standard deviation, and differences
from the reference form paired by seed) and ``table.png`` into ``model_cards/evidence/<name>``. Each run has its own
folder under ``--runs``. Finished runs are not repeated, and interrupted runs continue from their checkpoint. Rows of
``runs.csv`` are written as runs end and are valid on any machine (``table_record.py``), so that a table can be made in
parts. ``table_file.py`` describes a table's file.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from table_file import ROOT, VARIANT, Run, Table
from table_record import Finished, Record, digest
from table_report import draw, draw_curves, markdown, profile

# Tables at other scales have their own folders.
DEFAULT_SCALE = "small"
EVIDENCE = ROOT / "model_cards" / "evidence"
# Files in the folder of a run: its requested settings, and a mark that it is finished.
SETTINGS, FINISHED = "settings.json", "finished"
# Suffix of a file beside the data, which holds the command that made them.
MADE_BY = ".made_by.json"


def filled(words: list[str], runs: Path, data: Path | None, folder: Path | None = None) -> list[str]:
    """A command's words with paths for {runs}, {data} and, for a run, its {folder} and that of all {trainings}."""
    if data is None and any("{data}" in word for word in words):
        raise typer.BadParameter("this table reads a folder of data: give --data")
    return [word.format(runs=runs, data=data, folder=folder, trainings=folder and folder.parent) for word in words]


def train(table: Table, run: Run, runs: Path, data: Path | None, threads: int) -> Path:
    """Train in a separate process, or continue an interrupted training; returns the run's folder.

    Raises:
        RuntimeError: the training failed, or the folder holds a training with other settings.
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
        command[1:2] = [
            str(scripts / "experiments" / "train_variant.py"),
            "--variant",
            *filled([variant], runs, data, folder),
        ]
    for key, value in settings.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    if any((folder / "checkpoints").glob("step_????????")):
        command.append("--resume")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(ROOT),
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
    """Make a table's data, unless they exist.

    Raises:
        RuntimeError: the existing data were made by another command.
    """
    note, words = makes.with_name(makes.name + MADE_BY), json.dumps(command)
    if not makes.exists():
        subprocess.run([sys.executable, *filled(command, runs, data)], cwd=ROOT, check=True)
        note.write_text(words)
    elif note.is_file() and note.read_text() != words:
        raise RuntimeError(f"{makes} was made by another command than the table has now: remove it")


@dataclass(frozen=True)
class Work:
    """Where a table's trainings are, and where their results are kept.

    Args:
        table: the table.
        record: record of its finished trainings, in the evidence.
        shared: record of the table whose runs it shares; if there is none, that of the table itself.
        runs: folder of data and trainings.
        data: the folder that the table's commands call {data}.
        workers: number of trainings at one time.
    """

    table: Table
    record: Record
    shared: Record
    runs: Path
    data: Path | None
    workers: int

    def train_all(self, wanted: list[Run]) -> dict[Run, Finished]:
        """Results of all of these trainings; those that are recorded are not run."""
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
        """The learning rate of each form, and the trials.

        The best rate by the trials' measure is taken, on a seed that does not count in the table.
        """
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
