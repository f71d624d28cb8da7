"""The tables of the repository: complete, and the evidence has what they ask for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

import table as tables
import table_file
from hf_binaryformer.modeling.attention_configuration import AttentionConfig
from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.training.recipes import PIXEL_RECIPES, RECIPES, VQ_RECIPES, load_recipe, parse
from table_record import Record, digest

ROOT = Path(__file__).parents[2]
ATTENTION_FIELDS = {field.name for field in dataclasses.fields(AttentionConfig)} | {"num_heads"}


@pytest.mark.parametrize(
    "path", sorted({*table_file.FORMS.parent.glob("*.yaml")} - {table_file.FORMS}), ids=lambda p: p.stem
)
def test_every_table_in_the_repository_is_complete(path):
    words = table_file.Table(path, "small").words
    assert (ROOT / "scripts" / words["script"]).is_file()
    assert 0 < words["tuning"]["share"] <= 1
    assert {*words["scales"]} == {"small", "paper", "smoke"}
    for scale in words["scales"]:
        table = table_file.Table(path, scale)
        for form in table.forms:
            run, trial = (table.run(form, seed, 1e-3) for seed in (0, words["tuning"]["seed"]))
            steps = [r.settings[f"{table.section}.{k}"] for r in (run, trial) for k in ("iterations", "warmup")]
            assert steps[0] >= steps[2] >= steps[3] <= steps[1] < steps[0]
            for key, value in run.settings.items():
                assert parse(json.dumps(value)) == value and ("." in key) == (key != table_file.VARIANT)
            folder = {"sampler": VQ_RECIPES, "train": RECIPES}[words["section"]]
            folder = PIXEL_RECIPES if words["script"] == "train_pixels.py" else folder
            name = words["arguments"][words["arguments"].index("--recipe") + 1]
            load_recipe(name, [f"{k}={json.dumps(v)}" for k, v in run.settings.items() if "." in k], folder)
            fields = {k.removeprefix(f"{words['network']}."): v for k, v in run.settings.items()}
            BinaryFormerConfig(**{k: v for k, v in fields.items() if k in ATTENTION_FIELDS})
    assert len(words["seeds"]) >= 3 and words["tuning"]["seed"] not in words["seeds"]
    assert {"uniform", "frozen"} <= set(words["controls"])


RECORDED = [
    path
    for path in sorted(table_file.FORMS.parent.glob("*.yaml"))
    if (tables.EVIDENCE / path.stem / "runs.csv").is_file()
]


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_the_evidence_has_the_settings_that_its_table_has_now(path):
    table, record = table_file.Table(path, "small"), Record(tables.EVIDENCE / path.stem)
    assert record.finished
    for settings, one in record.finished.items():
        run = table.run(one.about["form"], int(one.about["seed"]), float(one.about["rate"]))
        assert settings == digest(table.asked(run)) and table.kept(record, run) is one


def test_what_decides_what_a_training_gives_is_in_its_digest(tmp_path, monkeypatch):
    path = table_file.FORMS.parent / "inpainting.yaml"
    words = yaml.safe_load(path.read_text())
    copy = tmp_path / path.name

    def of(words, seed=0):
        copy.write_text(yaml.safe_dump(words))
        table = table_file.Table(copy, "small")
        return digest(table.asked(table.run("softmax", seed, 1e-3)))

    before, trial = of(words), of(words, 100)
    assert before == of({**words, "title": "Other words"})
    other_data = {**words, "prepare": words["prepare"][:1]}
    other_end = {**words, "then": words["then"][:1]}
    assert len({before, of(other_data), of(other_end)}) == 3
    assert trial == of(other_end, 100) != of(other_data, 100)
    # A default of the recipe that the table does not set counts, one that it sets or of another training does not.
    root, recipe = tmp_path / "root", yaml.safe_load((VQ_RECIPES / "brain-small.yaml").read_text())
    place = root / "vq" / "brain-small.yaml"
    place.parent.mkdir(parents=True)
    monkeypatch.setattr(table_file, "RECIPES", root)
    for section, key, same in (
        ("sampler", "weight_decay", False),
        ("transformer", "num_layers", True),
        ("vqae", "iterations", True),
    ):
        place.write_text(yaml.safe_dump(recipe | {section: recipe[section] | {key: 7}}))
        assert (of(words) == before) == same, key
