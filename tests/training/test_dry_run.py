"""--dry-run: two steps without data; the recipes with the paper's figures take them at their true size."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toys
import typer
import yaml
from launching import command_line
from typer.testing import CliRunner

from hf_binaryformer.data.public_data import DATA_SETS
from hf_binaryformer.training import autoencoder, classification, sampler, segmentation
from hf_binaryformer.training.dry_run import RandomSamples
from hf_binaryformer.training.loop import start
from hf_binaryformer.training.recipes import VQ_RECIPES, load_recipe

ROOT = Path(__file__).parents[2]
TINY_PIXELS = ["model.hidden_size=16", "model.num_heads=2", "model.num_hidden_layers=1", "train.mixed_precision=no"]
KEYS = {
    "parameters",
    "batch_size",
    "processes",
    "device",
    "mixed_precision",
    "losses",
    "seconds_per_step",
    "minutes",
    "peak_gib",
}
# Parameters. The paper's encoder and decoder have 19 and 8 million; the networks of token weights, which the form of the recipes
# does not have, would come to these.
PAPER = {"vit": (26.5e6, 27.5e6), "pixels": (12e6, 13e6), "decoder": (11e6, 25e6), "sampler": (12e6, 16e6)}


def invoke(script, *arguments) -> str:
    app = typer.Typer()
    app.command()(script.main)
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_minutes_are_those_of_the_whole_training(tmp_path):
    path = toys.write_segmentation_recipe(tmp_path / "toy.yaml")
    said = invoke(segmentation, "--recipe", path, "--dry-run", "--set", "train.iterations=6000")
    report = json.loads(said.splitlines()[-1])
    assert report["minutes"] == pytest.approx(6000 * report["seconds_per_step"] / 60, abs=0.2)


def toy(script, folder: Path) -> tuple[str | Path, list[str]]:
    """A recipe at toy size, and overrides."""
    path = folder / "toy.yaml"
    if script is classification:
        return "mnist-pixels", [*TINY_PIXELS, "train.batch_size=2"]
    write = {
        segmentation: toys.write_segmentation_recipe,
        autoencoder: toys.write_autoencoder_recipe,
        sampler: toys.write_sampler_recipe,
    }
    return write[script](path), []


@pytest.mark.parametrize("script", [segmentation, classification, autoencoder, sampler], ids=lambda s: s.__name__)
def test_two_steps_without_data(script, tmp_path, monkeypatch):
    recipe, overrides = toy(script, tmp_path)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    printed = invoke(script, "--dry_run", *command_line(overrides, recipe=recipe))
    report = json.loads(printed.strip().splitlines()[-1])
    assert set(report) == KEYS
    assert len(report["losses"]) == 2 and all(math.isfinite(loss) for loss in report["losses"])
    assert report["parameters"] > 1000 and report["peak_gib"] > 0
    assert not list(here.iterdir())


@pytest.mark.parametrize("script", [segmentation, classification, autoencoder, sampler], ids=lambda s: s.__name__)
def test_without_data_and_dry_run_says_what_is_missing(script, tmp_path):
    recipe, _ = toy(script, tmp_path)
    option = "--tokens" if script is sampler else "--data"
    arguments = {"recipe": str(recipe), "output": tmp_path / "out"}
    with pytest.raises(typer.BadParameter, match=f"{option} and --output are needed"):
        script.main(**arguments)
    assert not (tmp_path / "out").exists()


def test_random_samples_have_all_labels_and_repeat():
    samples = RandomSamples((2, 3, 4), (3, 4), 3, 50)
    assert len(samples) == 50 and samples[7]["pixel_values"].shape == (2, 3, 4)
    assert {int(v) for n in range(50) for v in samples[n]["labels"].unique()} == {0, 1, 2}
    assert (samples[7]["pixel_values"] == samples[7]["pixel_values"]).all()
    assert (samples[7]["pixel_values"] != samples[8]["pixel_values"]).any()


def test_both_trainings_of_a_recipe_have_a_name():
    for part in ("vqae", "sampler"):
        assert load_recipe(f"oasis-{part}", [], VQ_RECIPES, part) == load_recipe("oasis", [], VQ_RECIPES)
    with pytest.raises(typer.BadParameter, match="no recipe 'oasis-vqae'"):
        load_recipe("oasis-vqae", [], VQ_RECIPES, "sampler")


def test_recipes_have_the_papers_figures():
    """Appendix A.1, A.2 and B."""
    for name, size in (("amos", 320), ("spine", 288), ("crossmoda", 224)):
        recipe = load_recipe(name, [])
        train = recipe["train"]
        assert recipe["processor"]["image_size"] == [size, size] and recipe["model"]["value_head_dim"] == 16
        assert (train["iterations"], train["batch_size"], train["learning_rate"]) == (12000, 12, 1e-4)
        schedule = (train["warmup"], train["warmup_start"], train["decay_factor"], train["decay_every"])
        assert schedule == (300, 0.01, 0.98, 12) and train["schedule"] == "step"
    oasis = load_recipe("oasis", [], VQ_RECIPES)
    assert oasis["data"]["volume_shape"] == [160, 224, 192] and oasis["transformer"]["grid_size"] == [10, 14, 12]
    assert (oasis["vqae"]["iterations"], oasis["vqae"]["batch_size"]) == (8000, 64)
    assert (oasis["sampler"]["iterations"], oasis["sampler"]["batch_size"]) == (21000, 12)
    assert oasis["scheduler"]["num_train_timesteps"] == 256
    for name in ("cifar10-pixels", "mnist-pixels"):
        recipe = load_recipe(name, [], classification.PIXEL_RECIPES)
        model, train = recipe["model"], recipe["train"]
        sizes = (model["hidden_size"], model["num_heads"], model["num_hidden_layers"], model["mlp_ratio"])
        assert sizes == (384, 4, 8, 4.0) and model["num_heads"] * model["value_head_dim"] == 64
        assert (train["iterations"], train["batch_size"]) == (3000, 32)


def test_best_weights_need_validation(tmp_path):
    train = load_recipe("hippocampus", ["train.best_by=validation_dice"])["train"]
    with pytest.raises(typer.BadParameter, match="validate_every is null"):
        start(train, tmp_path)


@pytest.mark.parametrize("name", ["amos", "spine", "crossmoda"])
def test_labels_of_a_dry_run_are_those_that_prepare_data_writes(name):
    data_set = {"spine": "spider"}.get(name, name)
    words = yaml.safe_load((DATA_SETS / f"{data_set}.yaml").read_text())
    recipe = load_recipe(name, [])
    assert recipe["data"]["classes"] == len(words["labels"])
    plane = [s for s in words["size"] if s is not None]
    assert recipe["processor"]["image_size"] == plane
    assert words["size"][recipe["processor"]["slice_axis"]] is None


# Without the instructions for it, a processor takes minutes for a step of these sizes in bfloat16.
FAST_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "recipe", "size", "overrides"),
    [
        ("finetune", "amos", "vit", ["train.batch_size=2"]),
        ("finetune", "spine", "vit", ["train.batch_size=2"]),
        ("finetune", "crossmoda", "vit", ["train.batch_size=2"]),
        ("train_pixels", "cifar10-pixels", "pixels", ["train.batch_size=2"]),
        ("train_pixels", "mnist-pixels", "pixels", ["train.batch_size=2"]),
        ("train_vqae", "oasis-vqae", "decoder", ["vqae.batch_size=2"]),
        ("train_sampler", "oasis-sampler", "sampler", ["sampler.batch_size=2"]),
    ],
)
def test_recipes_with_the_papers_figures_take_two_steps(script, recipe, size, overrides):
    if not FAST_BFLOAT16:
        overrides = [*overrides, f"{overrides[0].partition('.')[0]}.mixed_precision=no"]
    command = [sys.executable, ROOT / "scripts" / f"{script}.py", "--dry-run", *command_line(overrides, recipe=recipe)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    low, high = PAPER[size]
    assert low < report["parameters"] < high
    assert all(math.isfinite(loss) for loss in report["losses"])
