"""Tables of the evidence, with a script that writes figures instead of training; probes and variants."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml
from safetensors.torch import load_file
from scipy.stats import ttest_rel

import table as tables
import table_file
import table_report
from make_twins import Kind
from make_twins import main as make_twins
from variants import CHANNEL_GROUPS

ROOT = Path(__file__).parents[2]
TRAINER = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--output", type=pathlib.Path)
parser.add_argument("--resume", action="store_true")
parser.add_argument("--evaluate", default="test")
parser.add_argument("--set", action="append")
a = parser.parse_args()
s = {k: json.loads(v) for k, v in (x.split("=", 1) for x in a.set)}
assert (a.evaluate == "validation") == (s["train.iterations"] == 5) == (s["train.seed"] == 9)
assert s["train.warmup"] == (1 if s["train.seed"] == 9 else 2) and s["model.grid"] == [1, 2]
with (a.output / "calls").open("a") as calls:
    calls.write("resumed\\n" if a.resume else "started\\n")
if s.get("train.dies") and not a.resume:
    (a.output / "checkpoints" / "step_00000001").mkdir(parents=True)
    raise SystemExit(3)
value = s["model.level"] + 0.1 * s["train.seed"] - abs(s["train.learning_rate"] - s["model.likes"])
levels = [{"step": step, "level": s["model.level"] - step} for step in (1, 2, 3)]
(a.output / "log.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in levels))
(a.output / "training.json").write_text(json.dumps({"device": "abacus", "torch": "9.9"}))
(a.output / "results.json").write_text(json.dumps({"rows": {"dice": value, "atlas": 0.5}}))
"""

TINY = {"train.iterations": 10, "train.warmup": 2}
ANY = {"file": "results.json", "key": "rows/dice"}
MEASURE = ANY | {"better": "higher"}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of three forms and two controls; values are level + seed / 10, less what the rate is off."""
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "toy.py").write_text(TRAINER)
    words = {
        "title": "Toy",
        "question": "Which?",
        "script": "toy.py",
        "arguments": [],
        "section": "train",
        "network": "model",
        "settings": {"model.likes": 0.1, "model.grid": [1, 2]},
        "scales": {"small": TINY, "smoke": TINY},
        "reference": "softmax",
        "controls": ["uniform"],
        "forms": {
            "softmax": {"model.level": 5.0},
            "hamming": {"model.level": 4.0, "model.likes": 0.2},
            "uniform": {"model.level": 1.0},
        },
        "seeds": [0, 1, 2],
        "tuning": {
            "seed": 9,
            "rates": [0.1, 0.2, 0.25],
            "share": 0.5,
            "arguments": ["--evaluate", "validation"],
        },
        "measures": {"dice": MEASURE, "prior atlas": {"file": "results.json", "key": "rows/atlas"}},
    }

    def write(**changes) -> Path:
        path = tmp_path / "toy.yaml"
        path.write_text(yaml.safe_dump(words | changes))
        return path

    return write


def run(path: Path, tmp_path: Path) -> str:
    tables.main(path, tmp_path / "runs", workers=2, scale="small", evidence=tmp_path / "evidence")
    return (tmp_path / "evidence" / "toy" / "README.md").read_text()


def test_every_form_gets_its_best_rate_and_the_same_seeds(table, tmp_path):
    text = run(table(), tmp_path)
    with (tmp_path / "evidence" / "toy" / "runs.csv").open() as file:
        found = list(csv.DictReader(file))
    rows = [row for row in found if row["seed"] != "9"]
    assert [row["dice"] != "" for row in found] == [True] * 18 and [row["seed"] for row in found[9:]] == ["9"] * 9
    got = {(r["form"], int(r["seed"])): (float(r["rate"]), float(r["dice"])) for r in rows}
    assert len(rows) == 9
    for form, level, rate in (("softmax", 5.0, 0.1), ("hamming", 4.0, 0.2), ("uniform", 1.0, 0.1)):
        for seed in range(3):
            assert got[form, seed] == (rate, pytest.approx(level + seed / 10))
    assert "| softmax | 0.1* | 5.1 ± 0.1 |  |" in text
    assert "| hamming | 0.2 | 4.1 ± 0.1 | -1 ± " in text
    assert "\nTrained on abacus with torch 9.9.\n" in text
    assert "uniform (control)" in text and "No evidence" not in text
    assert "\nprior atlas: 0.5.\n" in text and text.count("| softmax |") == 1
    assert (tmp_path / "evidence" / "toy" / "table.png").stat().st_size > 1000
    assert str(tmp_path) not in text


@pytest.mark.parametrize("rates", [[0.1], [0.1, 0.2]])
def test_a_form_whose_rate_is_said_has_no_trials(table, tmp_path, rates):
    tuning = {
        "seed": 9,
        "rates": rates,
        "rates_of": {"hamming": 0.35},
        "share": 0.5,
        "arguments": ["--evaluate", "validation"],
    }
    text = run(table(tuning=tuning), tmp_path)
    with (tmp_path / "evidence" / "toy" / "runs.csv").open() as file:
        rows = [(row["form"], row["rate"]) for row in csv.DictReader(file)]
    assert rows.count(("hamming", "0.35")) == 3 and sum(form == "hamming" for form, _ in rows) == 3
    assert rows.count(("softmax", "0.1")) == 3 + (len(rates) > 1)
    assert "| hamming | 0.35 | 3.95 ± 0.1 |" in text


def test_data_that_another_command_made_are_not_taken(table, tmp_path):
    (tmp_path / "scripts" / "make.py").write_text(
        "import pathlib, sys\npathlib.Path(sys.argv[1]).write_text(sys.argv[2])\n"
    )
    (tmp_path / "runs").mkdir()
    commands = [["scripts/make.py", "{runs}/data", word] for word in ("one", "two")]
    other = {"makes": "other", "command": ["scripts/make.py", "{runs}/other", "three"]}
    for _ in range(2):
        run(table(prepare=[{"makes": "data", "command": commands[0]}, other]), tmp_path)
        assert (tmp_path / "runs" / "data").read_text() == "one"
        (tmp_path / "evidence" / "toy" / "runs.csv").unlink()
    with pytest.raises(RuntimeError, match="was made by another command than the table has now: remove it"):
        run(table(prepare=[{"makes": "data", "command": commands[1]}]), tmp_path)


def test_a_control_that_ties_is_said_first(table, tmp_path):
    forms = {"softmax": {"model.level": 5.0}, "uniform": {"model.level": 5.0}}
    text = run(table(forms=forms), tmp_path)
    assert text.split("\n")[2] == "**No evidence about attention: uniform is not clearly worse than softmax.**"
    forms["uniform"] = {"model.level": 6.0}
    assert "uniform is not clearly worse than softmax" in run(table(forms=forms, seeds=[3, 4]), tmp_path / "other")


def test_what_is_finished_is_not_run_again_and_what_was_cut_goes_on(table, tmp_path):
    with pytest.raises(RuntimeError, match=r"ended with status 3: see .*output.txt"):
        run(table(scales={"small": TINY | {"train.dies": True}}), tmp_path)
    for _ in range(2):
        for _ in range(20):
            try:
                run(table(scales={"small": TINY | {"train.dies": True}}), tmp_path)
                break
            except RuntimeError:
                continue
    calls = [path.read_text().split() for path in (tmp_path / "runs").rglob("calls")]
    assert len(calls) == 9 + 9 and all(call == ["started", "resumed"] for call in calls)


LEVELS = {"softmax": {"model.level": 5.0}, "hamming": {"model.level": 4.0}, "uniform": {"model.level": 1.0}}


def test_what_is_recorded_is_not_run_again_on_another_machine(table, tmp_path):
    """Nor what another table has recorded; but what has other settings, or lacks what the table shows, is."""
    (tmp_path / "scripts" / "after.py").write_text(AFTER)
    profile = {"file": "many.json", "key": "bits", "x": "share", "y": "bits"}
    words = {"curves": ["level"], "profile": profile, "then": [["scripts/after.py", "{folder}"]]}
    path = table(forms=LEVELS, **words)
    text = run(path, tmp_path)
    evidence = tmp_path / "evidence" / "toy"
    csvs = {name: (evidence / name).read_text() for name in ("runs.csv", "series.csv")}

    def trained(path: Path) -> list[str]:
        runs = tmp_path / f"machine{len(list(tmp_path.iterdir()))}"
        tables.main(path, runs, workers=2, scale="small", evidence=tmp_path / "evidence")
        return sorted(folder.parent.name for folder in runs.rglob("calls"))

    assert trained(path) == []
    assert {name: (evidence / name).read_text() for name in csvs} == csvs
    (evidence / "runs.csv").write_text(
        "".join(line for line in csvs["runs.csv"].splitlines(keepends=True) if not line.startswith("hamming,1,"))
    )
    assert trained(path) == ["hamming-rate0.1-seed1"]
    (evidence / "series.csv").unlink()
    assert len(trained(path)) == 9, "all but the trials"
    assert (evidence / "README.md").read_text() == text
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({"like": "toy", "runs": "toy", "title": "Other", "seeds": [1, 2, 3]}))
    assert [name[-5:] for name in trained(other)] == ["seed3"] * 3
    path = table(forms=LEVELS | {"hamming": {"model.level": 3.0}}, **words)
    assert len(trained(path)) == 6 and "| hamming | 0.1* | 3.1 ± 0.1 |" in (evidence / "README.md").read_text()
    assert len((evidence / "runs.csv").read_text().splitlines()) == 1 + 18


def test_a_training_that_others_need_comes_first(table, tmp_path):
    path = table(first=[{"form": "softmax", "seed": 9, "rate": 0.7}])
    run(path, tmp_path)
    (folder,) = (tmp_path / "runs").rglob("softmax-rate0.7-seed9")
    assert (folder / "finished").is_file()
    assert "0.7" not in (tmp_path / "evidence" / "toy" / "runs.csv").read_text()


def test_a_training_with_other_settings_is_not_taken_for_the_tables(table, tmp_path):
    run(table(), tmp_path)
    with pytest.raises(RuntimeError, match="holds a training with other settings"):
        run(table(settings={"model.likes": 0.1, "model.grid": [1, 2], "model.new": 1}), tmp_path)
    # Another scale has folders of its own, and leaves the table in the repository as it is.
    before = (tmp_path / "evidence" / "toy" / "README.md").read_text()
    tables.main(table(), tmp_path / "runs", workers=2, scale="smoke", evidence=tmp_path / "evidence")
    assert (tmp_path / "evidence" / "toy" / "README.md").read_text() == before
    assert "scale `smoke`" in (tmp_path / "evidence" / "toy-smoke" / "README.md").read_text()


def test_paired_interval_is_the_t_tests():
    a, b = [0.3, 0.5, 0.45, 0.6], [0.2, 0.45, 0.5, 0.4]
    mean, width = table_report.paired(a, b)
    interval = ttest_rel(a, b).confidence_interval(0.95)
    assert (mean - width, mean + width) == pytest.approx((interval.low, interval.high))
    assert np.isnan(table_report.paired([1.0], [0.5])[1])


def test_what_is_not_a_number_and_uneven_logs_spoil_no_table():
    assert np.isnan(table_report.paired([0.3, np.nan], [0.2, 0.1])).all()
    assert np.isnan(table_report.deviation([np.inf, 1.0])) and table_report.deviation([1.0, 3.0]) == pytest.approx(
        2**0.5
    )
    assert table_report.means_by_x([{"20": 1.0, "33": 9.0, "40": 2.0}, {"20": 3.0, "40": 4.0}]) == {
        "20": 2.0,
        "40": 3.0,
    }


def test_when_a_figure_of_the_log_is_first_below(table, tmp_path):
    measures = {"dice": MEASURE, "steps": {"file": "log.jsonl", "key": "level", "below": 2.5, "better": "lower"}}
    forms = {"softmax": {"model.level": 5.0}, "hamming": {"model.level": 4.0}, "uniform": {"model.level": 1.0}}
    text = run(table(measures=measures, forms=forms), tmp_path)
    text = text[text.index("## steps") :]
    assert "| softmax | 0.1* | 3 ± 0 |" in text and "| hamming | 0.1* | 2 ± 0 |" in text
    assert "| uniform (control) | 0.1* | 1 ± 0 |" in text


def test_pairs_that_a_table_has_are_compared(table, tmp_path, monkeypatch):
    known = tmp_path / "forms.yaml"
    known.write_text(yaml.safe_dump({"common": {}, "forms": {}, "compare": [["hamming", "uniform"], ["hamming", "x"]]}))
    monkeypatch.setattr(table_file, "FORMS", known)
    text = run(table(), tmp_path)
    assert "| hamming minus uniform | +3 ± " in text and "minus x" not in text


def test_the_pairs_are_of_forms_that_are_known():
    known = yaml.safe_load(table_file.FORMS.read_text())
    assert {form for pair in known["compare"] for form in pair} <= {*known["forms"]}


def test_a_form_that_diverges_at_every_rate_is_named(table, tmp_path):
    forms = {"softmax": {"model.level": 5.0}, "hamming": {"model.level": float("nan")}, "uniform": {"model.level": 1.0}}
    with pytest.raises(RuntimeError, match="no trial of hamming has a finite dice"):
        run(table(forms=forms), tmp_path)


def test_names_that_do_not_fit(table, tmp_path):
    with pytest.raises(typer.BadParameter, match="names nobody, but its forms are"):
        table_file.Table(table(controls=["nobody"]), "small")
    with pytest.raises(typer.BadParameter, match="has small, smoke"):
        table_file.Table(table(), "paper")


@pytest.mark.slow
def test_the_probed_training_starts_as_tables_start_it(tmp_path):
    growth = table_file.Table(ROOT / "scripts" / "experiments" / "growth.yaml", "smoke")
    growth.forms = {"hamming": growth.forms["hamming"]}
    make_twins(tmp_path / "data" / "mirror", Kind.mirror, 64, 16, 8, 4, 0)
    folder = tables.train(growth, growth.run("hamming", 0, 1e-3), tmp_path, None, 1)
    assert {"start", "end", "same_tokens"} <= set(json.loads((folder / "probe.json").read_text()))


@pytest.mark.slow
def test_a_variant_starts_as_tables_start_it(tmp_path):
    closing = table_file.Table(ROOT / "scripts" / "experiments" / "closing.yaml", "smoke")
    make_twins(tmp_path / "data" / "mirror", Kind.mirror, 64, 16, 8, 4, 0)
    folder = tables.train(closing, closing.run("hamming-channel-groups", 0, 1e-3), tmp_path, None, 1)
    assert folder == tmp_path / "copying" / "smoke" / "hamming-channel-groups-rate0.001-seed0"
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert weights["blocks.0.attn.query_theta.fc2.bias"].shape == (4 * CHANNEL_GROUPS,)


def test_a_table_like_another_and_its_curves(table, tmp_path):
    table()
    (tmp_path / "other.yaml").write_text(
        yaml.safe_dump({"like": "toy", "title": "Other", "curves": ["level"], "measures": {"dice": MEASURE, "x": ANY}})
    )
    tables.main(tmp_path / "other.yaml", tmp_path / "runs", workers=2, scale="small", evidence=tmp_path / "evidence")
    text = (tmp_path / "evidence" / "other" / "README.md").read_text()
    assert text.startswith("# Other") and "## x\n" in text and "## dice (higher is better)" in text
    assert (tmp_path / "evidence" / "other" / "curves.png").stat().st_size > 1000


AFTER = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
value = json.loads((folder / "results.json").read_text())["rows"]["dice"]
(folder / "many.json").write_text(json.dumps({"bits": {"0.5": value, "1": value + 1}, "bound": -value}))
"""


def test_what_follows_a_training_and_a_measure_for_trials(table, tmp_path):
    (tmp_path / "scripts" / "after.py").write_text(AFTER)
    tuning = yaml.safe_load(table().read_text())["tuning"] | {"measure": "dice"}
    words = {
        "then": [["scripts/after.py", "{folder}"]],
        "profile": {"file": "many.json", "key": "bits", "x": "share", "y": "bits"},
        "measures": {"bound": {"file": "many.json", "key": "bound", "better": "lower"}, "dice": MEASURE},
    }
    text = run(table(**words, tuning=tuning), tmp_path)
    assert "| hamming | 0.2 |" in text and "| share | 0.5 | 1 |" in text and "| softmax | 5.1 | 6.1 |" in text
    assert "## bits by share" in text and (tmp_path / "evidence" / "toy" / "profile.png").stat().st_size > 1000
    followed = [path.parent.name for path in (tmp_path / "runs").rglob("many.json")]
    assert len(followed) == 9 and not any("seed9" in name for name in followed)
    # The other way round trials choose the other rate.
    opposite = {"measures": words["measures"] | {"dice": MEASURE | {"better": "lower"}}}
    assert "| hamming | 0.1* |" in run(table(**words | opposite, tuning=tuning), tmp_path)
