"""`binaryformer train` and `binaryformer prepare`: the programs of data and training, for whoever has no clone."""

from __future__ import annotations

import json

import pytest
import toys
import yaml
from typer.testing import CliRunner

from hf_binaryformer import cli
from hf_binaryformer.training.recipes import RECIPES, known_recipes, trainings_of

# The first column of what a recipe is for, written here by hand.
EXPECTED = {
    "amos": ["segmentation"],
    "brain": ["segmentation"],
    "crossmoda": ["segmentation"],
    "hippocampus": ["segmentation"],
    "small": ["segmentation"],
    "spine": ["segmentation"],
    "tiny-abdomen": ["segmentation"],
    "tiny-brain": ["segmentation"],
    "vit-s8-amos-synthetic": ["segmentation"],
    "cifar10-pixels": ["classification"],
    "mnist-pixels": ["classification"],
    "brain-small": ["autoencoder", "sampler"],
    "oasis": ["autoencoder", "sampler"],
}


def run(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def test_every_recipe_has_its_training():
    assert {name: trainings_of(name) for name in known_recipes()} == EXPECTED


def test_the_help_lists_every_recipe():
    result = run("train", "--help")
    assert result.exit_code == 0
    lines = [line.split() for line in result.output.splitlines()]
    for name, trainings in EXPECTED.items():
        assert [name, *" and ".join(trainings).split()] in lines


def test_it_trains_and_scores(tmp_path):
    (tmp_path / "data").mkdir()
    recipe = toys.write_segmentation_recipe(tmp_path / "toy.yaml")
    data, output = toys.write_segmentation_data(tmp_path / "data"), tmp_path / "run"
    words = ["--data", data, "--output", output, "--set", "train.iterations=4", "--set", "train.workers=0"]
    result = run("train", "--recipe", recipe, *words)
    assert result.exit_code == 0, result.output
    assert json.loads((output / "training.json").read_text())["iterations"] == 4
    assert 0 <= json.loads((output / "results.json").read_text())["rows"]["network"]["mean"] <= 1
    assert (output / "model" / "model.safetensors").is_file()


def test_one_of_two_trainings_is_chosen(tmp_path):
    recipe = toys.write_autoencoder_recipe(tmp_path / "toy.yaml")
    result = run("train", "--training=autoencoder", f"--recipe={recipe}", "--dry-run")
    assert result.exit_code == 0, result.output
    (report,) = (line for line in result.stdout.splitlines() if line.startswith("{"))
    assert json.loads(report)["batch_size"] == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "somewhere"], "--recipe is missing"),
        (["--recipe", "nothing"], "no recipe 'nothing'"),
        (["--recipe", "oasis"], "for autoencoder and sampler"),
        (["--recipe", "hippocampus", "--training", "sampler"], "is for segmentation"),
        (["--recipe", "hippocampus", "--colour", "red"], "No such option"),
        (["--recipe", "hippocampus"], "--data and --output are needed"),
        (["--recipe", "hippocampus", "--data", "/nowhere", "--output", "o"], "has no manifest.json"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said(words, message):
    result = run("train", *words)
    assert result.exit_code != 0
    assert message in " ".join(result.output.replace("│", " ").split())


def test_a_recipe_without_a_training_is_refused(tmp_path):
    path = tmp_path / "odd.yaml"
    path.write_text(yaml.safe_dump({"data": {"classes": 2}}))
    assert "none of the sections" in " ".join(run("train", "--recipe", path).output.replace("│", " ").split())


def test_recipes_of_one_name_do_not_exist_twice():
    names = [path.stem for path in RECIPES.rglob("*.yaml")]
    assert len(names) == len({*names})


def test_prepare_is_the_same_program(tmp_path):
    result = run("prepare", "--help")
    assert result.exit_code == 0 and "synth-brain" in result.output and "binaryformer prepare" in result.output
    result = run("prepare", "hippocampus", "--source", tmp_path / "none", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "no imagesTr" in result.output
    assert not (tmp_path / "out").exists()
