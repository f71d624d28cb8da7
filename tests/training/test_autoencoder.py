"""Training the autoencoder and encoding volumes, on volumes of a few voxels: recipes, samples, resume, two processes."""

from __future__ import annotations

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

from hf_binaryformer.data.patches import NestedDropout, PatchSamples, image_paths, load_scaled, mirrored, window
from hf_binaryformer.modeling.vq_autoencoder import BinaryVQModel
from hf_binaryformer.modeling.vq_networks import ResidualConv3d
from hf_binaryformer.training import autoencoder, encode_tokens
from hf_binaryformer.training.loop import start
from hf_binaryformer.training.recipes import VQ_RECIPES, load_recipe
from hf_binaryformer.training.run_log import read_log

ROOT = Path(__file__).parent.parent.parent
RECIPES = sorted(VQ_RECIPES.glob("*.yaml"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    return toys.write_balls(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return toys.write_autoencoder_recipe(tmp_path_factory.mktemp("recipe") / "toy.yaml")


def run(recipe: Path, data: list[Path], output: Path, **options) -> dict[str, torch.Tensor]:
    options = {"resume": False, "stop_after": None, "overrides": [], **options}
    autoencoder.main(str(recipe), data, output, **options)
    return load_file(output / "vqmodel" / "diffusion_pytorch_model.safetensors")


def log(output: Path) -> list[dict]:
    return read_log(output / "log.jsonl")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_fits_itself(path):
    settings = load_recipe(path.stem, [], VQ_RECIPES)
    with torch.device("meta"):
        model = BinaryVQModel(**settings["vqmodel"])
    for name in ("volume_shape", "crop"):
        assert all(n % model.downsample == 0 for n in settings["data"][name]), name
    grid = [n // model.downsample for n in settings["data"]["volume_shape"]]
    assert settings["transformer"]["grid_size"] == grid
    for name in ("num_codebooks", "codebook_size"):
        assert settings["transformer"].get(name, model.config[name]) == model.config[name]
    assert 0 <= settings["vqae"]["quantize_after"] < settings["vqae"]["iterations"]
    assert settings["vqae"]["perceptual_loss"] in ("none", "lpips", "monai")


def test_the_small_recipe_is_small_and_the_papers_is_the_papers():
    with torch.device("meta"):
        small, paper = (BinaryVQModel(**load_recipe(n, [], VQ_RECIPES)["vqmodel"]) for n in ("brain-small", "oasis"))
    assert sum(p.numel() for p in small.parameters()) < 1e6
    settings = load_recipe("oasis", [], VQ_RECIPES)
    assert (settings["vqae"]["batch_size"], settings["vqae"]["iterations"]) == (64, 8000)
    assert settings["data"]["volume_shape"] == [160, 224, 192] and settings["data"]["crop"] == [32] * 3
    assert paper.downsample == 16


def test_it_learns_and_reports_the_psnr_of_held_out_volumes(recipe, prepared, tmp_path):
    overrides = ["vqae.iterations=80", "vqae.learning_rate=0.003", "vqae.checkpoint_every=80", "vqae.quantize_after=20"]
    run(recipe, [prepared, prepared], tmp_path, overrides=overrides)
    records = log(tmp_path)
    assert np.mean([r["reconstruction"] for r in records[-5:]]) < 0.5 * records[0]["reconstruction"]
    assert all(r["commitment"] == 0 for r in records[:20]) and all(r["commitment"] > 0 for r in records[20:])
    assert records[-1]["usage"] > 0.5 and 2 < records[-1]["perplexity"] <= 8
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["volumes"] == 1 and results["psnr"] > 12 and results["psnr_foreground"] < results["psnr"]

    settings = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    model = BinaryVQModel.from_pretrained(tmp_path / "vqmodel").eval()
    held_out = autoencoder.load_sources(settings, [prepared], "validation", show=False)[0]
    assert autoencoder.evaluate(model, held_out, settings) == results


def test_resumed_equals_uninterrupted(recipe, prepared, tmp_path):
    whole = run(recipe, [prepared], tmp_path / "whole")
    run(recipe, [prepared], tmp_path / "cut", stop_after=4)
    resumed = run(recipe, [prepared], tmp_path / "cut", resume=True)
    assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())
    losses = [[r["loss"] for r in log(tmp_path / name)] for name in ("cut", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_killed_at_a_random_step_and_resumed_equals_uninterrupted(recipe, prepared, tmp_path):
    overrides = ["vqae.iterations=12"]
    whole = run(recipe, [prepared], tmp_path / "whole", overrides=overrides)
    arguments = command_line(overrides, recipe=recipe, data=prepared)
    resume = kill_in_training("train_vqae.py", arguments, tmp_path / "cut", 12)
    resumed = run(recipe, [prepared], tmp_path / "cut", overrides=overrides, resume=resume)
    assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())


def test_nested_dropout_depends_on_the_sample_alone():
    class Crops:
        def __len__(self):
            return 3000

        def __getitem__(self, number):
            return number

    samples = NestedDropout(Crops(), 0.5, 3, 0)
    kept = [samples[n][1] for n in range(3000)]
    assert len(samples) == 3000 and kept[:9] == [samples[n][1] for n in range(9)] and samples[7][0] == 7
    np.testing.assert_allclose(np.bincount(kept, minlength=4) / 3000, [0, 0.25, 0.25, 0.5], atol=0.03)
    assert {NestedDropout(Crops(), share, 3, 0)[n][1] for share in (0.0,) for n in range(50)} == {3}
    assert {NestedDropout(Crops(), 1.0, 1, 0)[n][1] for n in range(50)} == {1}


def test_gradient_checkpointing_computes_stages_twice_and_changes_nothing(recipe, prepared, tmp_path, monkeypatch):
    forward, calls = ResidualConv3d.forward, []
    monkeypatch.setattr(
        ResidualConv3d, "forward", lambda self, x: calls.append(torch.is_grad_enabled()) or forward(self, x)
    )
    weights, seen = [], []
    for value in ("false", "true"):
        overrides = [f"vqae.gradient_checkpointing={value}"]
        weights.append(run(recipe, [prepared], tmp_path / value, overrides=overrides))
        seen.append(sum(calls))
        calls.clear()
    assert seen[1] == 2 * seen[0] > 0
    assert all(torch.equal(weights[1][key], tensor) for key, tensor in weights[0].items())


def test_two_processes_see_one_process_batches(recipe, prepared, tmp_path):
    overrides = ["vqae.iterations=8", "vqae.quantize_after=3"]
    run(recipe, [prepared], tmp_path / "one", overrides=overrides)
    arguments = command_line(overrides, recipe=recipe, data=prepared)
    run_on_two_processes("train_vqae.py", arguments, tmp_path / "two")
    ours, theirs = log(tmp_path / "one"), log(tmp_path / "two")
    assert theirs[0]["processes"] == 2
    # Codebooks start in the fourth step.
    for key in ("loss", "commitment"):
        np.testing.assert_allclose([r[key] for r in theirs], [r[key] for r in ours], rtol=1e-3, err_msg=key)
    assert theirs[3]["commitment"] > 0 and theirs[3]["usage"] > 0
    assert (tmp_path / "two" / "results.json").is_file()


def test_a_perceptual_loss_by_name_joins_in(recipe, prepared, tmp_path):
    overrides = ["vqae.perceptual_loss=torch.nn.functional:l1_loss", "vqae.perceptual_weight=2", "vqae.iterations=2"]
    run(recipe, [prepared], tmp_path, overrides=overrides)
    for record in log(tmp_path):
        parts = record["reconstruction"] + record["commitment"] + record["perceptual"]
        assert record["perceptual"] > 0 and record["loss"] == pytest.approx(parts, rel=1e-5)


def samples(recipe: Path, volumes: list[list[np.ndarray]], seed: int = 0, **data) -> PatchSamples:
    settings = yaml.safe_load(recipe.read_text())
    return PatchSamples(volumes, settings["data"] | data, 1.5, seed, 400)


def test_samples_depend_on_their_number_alone(recipe):
    volumes = [np.random.default_rng(0).random((24, 20, 22)).astype(np.float16)]
    one, other = samples(recipe, [volumes]), samples(recipe, [volumes])
    backwards = [other[n] for n in reversed(range(5))][::-1]
    assert all(torch.equal(one[n], backwards[n]) for n in range(5))
    assert one[0].shape == (1, 16, 16, 16) and one[0].dtype == torch.float32
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], samples(recipe, [volumes], seed=1)[0])


def test_samples_come_from_the_sources_in_their_shares(recipe):
    made = samples(recipe, [[np.full((16, 16, 16), v, np.float16)] for v in (0.25, 0.75)], max_gain=0.0)
    patches = [made[n] for n in range(400)]
    values = [float(patch.max()) for patch in patches]
    assert set(values) == {0.25, 0.75}
    assert abs(values.count(0.25) / 400 - 0.75) < 0.08
    # Only the first source lets crops reach beyond its volumes, where all is 0.
    assert {float(p.max()) for p in patches if p.min() == 0} == {0.25}


def test_samples_are_crops_flipped_and_scaled(recipe):
    volume = np.random.default_rng(0).random((20, 20, 20)).astype(np.float16)
    made = samples(recipe, [[volume]], sources=[{"share": 1.0, "margin": 0}], max_gain=0.1)
    windows = np.lib.stride_tricks.sliding_window_view(volume.astype(np.float32), (16, 16, 16)).reshape(-1, 16, 16, 16)
    flipped, gains = 0, []
    for number in range(20):
        patch = made[number][0].numpy()
        for mirror in (False, True):
            candidates = windows[:, ::-1] if mirror else windows
            gain = (patch * candidates).sum((1, 2, 3)) / (candidates**2).sum((1, 2, 3))
            error = np.abs(candidates * gain[:, None, None, None] - patch).max((1, 2, 3))
            if error.min() < 1e-5:
                flipped += mirror
                gains.append(gain[error.argmin()])
    assert len(gains) == 20 and 3 < flipped < 17
    assert 0.9 <= min(gains) < 0.97 and 1.03 < max(gains) <= 1.1


def test_samples_hold_some_foreground(recipe):
    volume = np.zeros((64, 16, 16), np.float16)
    volume[:16] = 1
    sources = [{"share": 1.0, "margin": 0}]
    shares = []
    for least in (0.5, 0.0):
        made = samples(recipe, [[volume]], sources=sources, min_foreground=least)
        shares.append([(made[n] > 0.1).float().mean() for n in range(60)])
    assert np.mean([s >= 0.5 for s in shares[0]]) > 0.8
    assert np.mean([s >= 0.5 for s in shares[1]]) < 0.5


def test_windows_and_mirrors():
    volume = np.arange(24).reshape(2, 3, 4)
    cut = window(volume, np.array([-1, 1, 2]), np.array([3, 3, 3]))
    assert cut.shape == (3, 3, 3) and not cut[0].any() and not cut[:, 2].any() and not cut[..., 2].any()
    np.testing.assert_array_equal(cut[1:, :2, :2], volume[:, 1:, 2:])
    wide = mirrored(volume, np.array([2, 5, 4]))
    np.testing.assert_array_equal(wide[:, :, 0], volume[:, [0, 0, 1, 2, 2], 0])


def test_volumes_are_resampled_scaled_and_cut(recipe, tmp_path):
    toys.write_ball(tmp_path / "ball.nii.gz", np.random.default_rng(0), spacing=0.5)
    settings = yaml.safe_load(recipe.read_text())["vqmodel"]
    scaled = load_scaled(tmp_path / "ball.nii.gz", settings)
    assert scaled.dtype == np.float16
    assert all(abs(n - m / 2) <= 1 for n, m in zip(scaled.shape, (26, 30, 28), strict=True))
    assert scaled.min() == 0 and 0.95 < scaled.max() < 1.1


def test_any_folder_of_nifti_has_a_held_out_share(tmp_path):
    for number in range(10):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / f"t1_{number}.nii.gz").touch()
    parts = [image_paths(tmp_path, split, 0.2, 0) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [8, 2, 0]
    assert not set(parts[0]) & set(parts[1])
    assert parts == [image_paths(tmp_path, split, 0.2, 0) for split in ("train", "validation", "test")]
    with pytest.raises(FileNotFoundError, match=r"neither manifest\.json nor files that end in \.nii"):
        image_paths(tmp_path / "0" / "t1_0.nii.gz", "train", 0.2, 0)


def test_wrong_options_say_what_is_expected(recipe, prepared, tmp_path):
    settings = load_recipe(str(recipe), [])
    with pytest.raises(typer.BadParameter, match=r"3 --data, but data\.sources in the recipe has 2"):
        autoencoder.load_sources(settings, [prepared] * 3, "train", show=False)
    for override in ("vqae.accumulation=2", "vqae.ema_decay=0.9"):
        with pytest.raises(typer.BadParameter, match="codebooks need accumulation 1 and ema_decay 0"):
            autoencoder.main("brain-small", overrides=[override])
    with pytest.raises(typer.BadParameter, match="known are brain-small, oasis"):
        load_recipe("nothing", [], VQ_RECIPES)
    with pytest.raises(typer.BadParameter, match="must be divisible"):
        settings["vqae"]["batch_size"] = 0.5
        start(settings["vqae"], tmp_path)


def test_tokens_of_every_split(recipe, prepared, tmp_path):
    run(recipe, [prepared], tmp_path)
    encode_tokens.main(str(recipe), tmp_path / "vqmodel", prepared, tmp_path / "tokens", "cpu", [])
    tokens = {path.stem: load_file(path)["tokens"] for path in (tmp_path / "tokens").glob("*.safetensors")}
    assert {split: tuple(t.shape) for split, t in tokens.items()} == {
        "train": (9, 2, 3, 4, 3),
        "validation": (1, 2, 3, 4, 3),
        "test": (1, 2, 3, 4, 3),
    }
    assert all(t.dtype == torch.uint8 for t in tokens.values())

    settings = yaml.safe_load(recipe.read_text())
    model = BinaryVQModel.from_pretrained(tmp_path / "vqmodel").eval()
    volume = load_scaled(prepared / "images" / "c1.nii.gz", settings["vqmodel"])
    x = torch.from_numpy(encode_tokens.placed_copy(volume, settings["data"], None))[None, None]
    assert torch.equal(model.encode(x).tokens[0], tokens["train"][3].long())
    assert not torch.equal(tokens["train"][3], tokens["train"][4])


def test_copies_are_flips_shifts_and_gains(recipe):
    data = yaml.safe_load(recipe.read_text())["data"] | {"max_gain": 0.0}
    volume = np.zeros((24, 32, 24), np.float16)
    volume[8:16, 8:24, 6:18] = np.random.default_rng(1).random((8, 16, 12)) + 0.2
    plain = encode_tokens.placed_copy(volume, data, None)
    seen = set()
    for seed in range(12):
        copy = encode_tokens.placed_copy(volume, data, np.random.default_rng(seed))
        shifts = [
            (mirror, i, j, k)
            for mirror in (False, True)
            for i in range(-2, 3)
            for j in range(-2, 3)
            for k in range(-2, 3)
            if np.array_equal(np.roll(plain[::-1] if mirror else plain, (i, j, k), (0, 1, 2)), copy)
        ]
        assert len(shifts) == 1
        seen.add(shifts[0])
    assert len(seen) > 8
