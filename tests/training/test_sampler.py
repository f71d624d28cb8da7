"""The sampler's training on grids of a few tokens: recipes, resume, two processes, learning, files."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
import typer
import yaml
from launching import command_line, kill_in_training, run_on_two_processes
from safetensors.torch import load_file

import hf_binaryformer as bf
from hf_binaryformer.modeling.vq_transformer import BinaryVQTransformer3DModel
from hf_binaryformer.pipelines.absorbing_scheduler import AbsorbingScheduler
from hf_binaryformer.training import sampler as train_sampler
from hf_binaryformer.training.optimization import build_optimizer
from hf_binaryformer.training.recipes import VQ_RECIPES, load_recipe
from hf_binaryformer.training.run_log import read_log

ROOT = Path(__file__).parent.parent.parent
RECIPES = sorted(VQ_RECIPES.glob("*.yaml"))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return toys.write_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return toys.write_sampler_recipe(tmp_path_factory.mktemp("recipe") / "toy.yaml")


def run(recipe, tokens, output, overrides=(), **options) -> dict[str, torch.Tensor]:
    options = {"vqmodel": None, "resume": False, "stop_after": None, **options}
    train_sampler.main(str(recipe), tokens, output, overrides=list(overrides), **options)
    return load_file(output / "transformer" / "diffusion_pytorch_model.safetensors")


def log(output: Path, key: str) -> list[float]:
    records = read_log(output / "log.jsonl")
    return [record[key] for record in records if key in record]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_builds(path):
    settings = load_recipe(path.stem, [], VQ_RECIPES)
    transformer = BinaryVQTransformer3DModel(
        **settings["transformer"], train_block_sizes=settings["sampler"]["block_sizes"]
    )
    AbsorbingScheduler(**settings["scheduler"]).check_compatible(transformer.config)
    optimizer = build_optimizer(transformer, settings["sampler"])
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(transformer.parameters()))
    stage = 2 ** len(settings["vqmodel"]["encoder_channels"])
    shape = [side * stage for side in settings["transformer"]["grid_size"]]
    assert shape == list(settings["data"]["volume_shape"])
    for name in ("num_codebooks", "codebook_size"):
        assert settings["vqmodel"][name] == settings["transformer"][name]
    if path.stem == "brain-small":
        assert sum(p.numel() for p in transformer.parameters()) <= 2.7e6


def test_it_learns_and_what_it_saves_loads(recipe, tokens, tmp_path):
    overrides = ["sampler.iterations=300", "sampler.checkpoint_every=300", "sampler.validate_every=100"]
    overrides += ["sampler.learning_rate=0.01"]
    run(recipe, tokens, tmp_path, [*overrides, "sampler.ema_decay=0.9", "transformer.dropout=0.0"])
    # 12 positions with 2 of 6 values each; the two patterns are 1 bit, and what is left is parts of the bound.
    bits = log(tmp_path, "validation_bits_per_token")
    assert len(bits) == 3 and bits[-1] < 0.5 * bits[0]
    assert log(tmp_path, "validation_accuracy")[-1] > 0.7
    transformer = BinaryVQTransformer3DModel.from_pretrained(tmp_path / "transformer")
    scheduler = AbsorbingScheduler.from_pretrained(tmp_path / "scheduler")
    scheduler.check_compatible(transformer.config)
    truth = load_file(tokens / "train.safetensors")["tokens"][:2].long()
    start = truth.clone()
    start[:, :, 1:] = transformer.mask_token_id
    scheduler.set_timesteps(4, temperature=0)
    scheduler.prepare(start == transformer.mask_token_id)
    with torch.no_grad():
        for t in scheduler.timesteps:
            start = scheduler.step(transformer(start).logits, t, start).prev_sample
    assert (start == truth).double().mean() > 0.9
    summary = json.loads((tmp_path / "training.json").read_text())
    assert summary["iterations"] == 300 and summary["batch_size"] == 4
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["sampler"]["iterations"] == 300


def test_resumed_equals_uninterrupted(recipe, tokens, tmp_path):
    whole = run(recipe, tokens, tmp_path / "whole")
    run(recipe, tokens, tmp_path / "cut", stop_after=3)
    resumed = run(recipe, tokens, tmp_path / "cut", resume=True)
    assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())
    for key in ("loss", "validation_bits_per_token"):
        assert log(tmp_path / "cut", key) == log(tmp_path / "whole", key)


def test_killed_at_a_random_step_and_resumed_equals_uninterrupted(recipe, tokens, tmp_path):
    overrides = ["sampler.iterations=12"]
    whole = run(recipe, tokens, tmp_path / "whole", overrides)
    arguments = command_line(overrides, recipe=recipe, tokens=tokens)
    resume = kill_in_training("train_sampler.py", arguments, tmp_path / "cut", 12)
    resumed = run(recipe, tokens, tmp_path / "cut", overrides, resume=resume)
    assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())
    assert log(tmp_path / "cut", "loss") == log(tmp_path / "whole", "loss")


def test_with_its_autoencoder_it_is_saved_as_one_checkpoint(recipe, tokens, tmp_path):
    toys.write_autoencoder(tmp_path / "vqmodel")
    run(recipe, tokens, tmp_path, ["sampler.iterations=1"], vqmodel=str(tmp_path / "vqmodel"))
    pipeline = bf.BinaryVQPipeline.from_pretrained(tmp_path / "pipeline")
    saved = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[key], tensor) for key, tensor in pipeline.transformer.state_dict().items())
    assert pipeline.scheduler.config.num_codebooks == 2 and pipeline.vqmodel.config.codebook_size == 6
    saved = [path.read_text() for path in (tmp_path / "pipeline").rglob("*.json")]
    assert saved and not any(str(tmp_path) in text for text in saved), "a path of this machine in a published file"


def test_two_processes_see_one_process_batches_and_stay_in_sync(recipe, tokens, tmp_path):
    # A form that draws nothing.
    overrides = ["transformer.attention_type=sign", "transformer.bit_gradient=ste", "transformer.dropout=0.0"]
    one = run(recipe, tokens, tmp_path / "one", overrides)
    arguments = command_line(overrides, recipe=recipe, tokens=tokens)
    run_on_two_processes("train_sampler.py", arguments, tmp_path / "two")
    assert log(tmp_path / "two", "processes")[0] == 2
    np.testing.assert_allclose(log(tmp_path / "two", "loss"), log(tmp_path / "one", "loss"), rtol=1e-4)
    two = load_file(tmp_path / "two" / "transformer" / "diffusion_pytorch_model.safetensors")
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-2, atol=2e-4, msg=key)


def test_batches_depend_on_the_step_alone_and_mix_times_and_block_sizes(recipe, tokens):
    settings = yaml.safe_load(recipe.read_text())
    scheduler = AbsorbingScheduler(**settings["scheduler"])
    data = load_file(tokens / "train.safetensors")["tokens"]
    sampler = settings["sampler"] | {"batch_size": 8}
    first, again, other = (train_sampler.training_batch(data, scheduler, sampler, step) for step in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)) and not torch.equal(first[1], other[1])
    truth, noisy, masked, times, holes = first
    assert not (masked & ~holes).any()
    assert torch.equal(noisy, truth.masked_fill(masked, 6))
    # One time out of each eighth of 1 ... 16.
    assert sorted(((times - 1) // 2).tolist()) == list(range(8))
    shares = [float(m[h.expand_as(m)].double().mean()) for m, h in zip(masked, holes, strict=True)]
    assert shares[int(times.argmax())] > shares[int(times.argmin())]


def test_holes_are_boxes_of_the_wanted_sides_and_reach_everywhere():
    settings, grid = {"hole_share": 0.75, "hole_sides": [2, 4]}, (6, 7, 8)
    holes = train_sampler.draw_holes(2000, grid, settings, torch.Generator().manual_seed(0))[:, 0]
    whole = holes.flatten(1).all(1)
    assert abs(float(whole.double().mean()) - 0.25) < 0.04
    seen = torch.zeros(grid)
    for hole in holes[~whole]:
        places = hole.nonzero()
        low, high = places.amin(0), places.amax(0) + 1
        assert len(places) == int((high - low).prod()), "not a box"
        for a, side in enumerate((high - low).tolist()):
            assert 1 <= side <= 4
            assert side >= 2 or low[a] == 0 or high[a] == grid[a], "a small side away from the edge"
        seen += hole
    assert seen.min() > 0
    assert {tuple((h.nonzero().amax(0) + 1 - h.nonzero().amin(0)).tolist()) for h in holes[~whole]} >= {
        sides for sides in itertools.product((2, 3, 4), repeat=3)
    }
    flat = train_sampler.draw_holes(50, (1, 2, 9), settings | {"hole_sides": [1, 4]}, torch.Generator().manual_seed(0))
    assert flat.flatten(1).any(1).all() and not flat.all()


def test_tokens_that_do_not_fit(recipe, tokens, tmp_path):
    with pytest.raises(typer.BadParameter, match="encode_tokens"):
        run(recipe, tmp_path, tmp_path / "out")
    with pytest.raises(typer.BadParameter, match=r"holds tokens \(12, 2, 2, 3, 2\)"):
        run(recipe, tokens, tmp_path / "out", ["transformer.grid_size=[4, 3, 2]"])
    with pytest.raises(typer.BadParameter, match="known are .*brain-small"):
        run("nothing", tokens, tmp_path / "out")
    with pytest.raises(ValueError, match="block_size 7 is not in the transformer's train_block_sizes"):
        run(recipe, tokens, tmp_path / "out", ["scheduler.block_size=7"])
