"""Pixel-wise classification on images of a few pixels: the published file formats, samples, training, resume."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
import typer
import yaml
from launching import command_line, kill_in_training, run_on_two_processes
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor

import hf_binaryformer as bf
from hf_binaryformer.data.pixels import PixelSamples, load_images, load_splits, read_cifar, read_idx
from hf_binaryformer.training import classification
from hf_binaryformer.training.run_log import read_log


@pytest.fixture(scope="module")
def mnist(tmp_path_factory) -> Path:
    return toys.write_pixels(tmp_path_factory.mktemp("mnist"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return toys.write_pixel_recipe(tmp_path_factory.mktemp("recipe") / "toy.yaml")


def run(recipe: Path, data: Path, output: Path, overrides=(), **options) -> dict[str, torch.Tensor]:
    options = {"resume": False, "evaluate": "none", "stop_after": None, **options}
    classification.main(str(recipe), data, output, overrides=list(overrides), **options)
    return load_file(output / "model" / "model.safetensors")


@pytest.mark.parametrize("path", sorted(classification.PIXEL_RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_is_the_papers(path):
    settings = yaml.safe_load(path.read_text())
    config = bf.BinaryFormerConfig(image_size=8, num_channels=1, num_labels=10, **settings["model"])
    assert config.token_type == "pixel" and config.num_hidden_layers == 8 and config.hidden_size == 384
    assert config.num_heads * config.value_head_dim == 64 and config.num_heads == 4
    assert (settings["train"]["iterations"], settings["train"]["batch_size"]) == (3000, 32)


def test_idx_files_are_read_packed_and_plain(tmp_path):
    values = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    for name in ("a", "b.gz"):
        toys.write_idx(tmp_path / name, values)
        np.testing.assert_array_equal(read_idx(tmp_path / name), values)
    (tmp_path / "c").write_bytes((tmp_path / "a").read_bytes()[:-1])
    with pytest.raises(ValueError, match="holds 29 values, its header says 30"):
        read_idx(tmp_path / "c")
    (tmp_path / "d").write_bytes(b"P5 3 3 255 ...")
    with pytest.raises(ValueError, match="no IDX file"):
        read_idx(tmp_path / "d")
    (tmp_path / "e.gz").write_bytes(gzip.compress((tmp_path / "a").read_bytes())[:-9])
    with pytest.raises(ValueError, match=r"e\.gz cannot be unpacked .*: is it complete"):
        read_idx(tmp_path / "e.gz")


def test_cifar_records_are_label_red_green_blue(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in [*((f"data_batch_{number}.bin", 6 - number) for number in range(1, 6)), ("test_batch.bin", 1)]:
        labels, images = rng.integers(0, 10, count), rng.integers(0, 256, (count, 3, 32, 32))
        rows = [bytes([label]) + bytes(i.flatten().tolist()) for label, i in zip(labels, images, strict=True)]
        (tmp_path / name).write_bytes(b"".join(rows))
        if name == "data_batch_4.bin":
            with pytest.raises(FileNotFoundError, match=r"lacks data_batch_5\.bin of CIFAR-10"):
                load_images(tmp_path, "train")
        if name == "data_batch_5.bin":
            got_images, got_labels = (part[-1:] for part in load_images(tmp_path, "train"))
            np.testing.assert_array_equal(got_images, images)
            np.testing.assert_array_equal(got_labels, labels)
    assert len(load_images(tmp_path, "test")[0]) == 1
    (tmp_path / "bad.bin").write_bytes(bytes([11]) + bytes(3072))
    with pytest.raises(ValueError, match="has label 11"):
        read_cifar(tmp_path / "bad.bin")
    (tmp_path / "bad.bin").write_bytes(bytes(3072))
    with pytest.raises(ValueError, match="multiple of 3073"):
        read_cifar(tmp_path / "bad.bin")


def test_splits_share_no_image(mnist, recipe, tmp_path):
    splits = load_splits(mnist, yaml.safe_load(recipe.read_text())["data"])
    assert {name: len(images) for name, (images, _) in splits.items()} == {"train": 48, "validation": 12, "test": 20}
    seen = [image.tobytes() for images, _ in splits.values() for image in images]
    assert len(set(seen)) == 80
    with pytest.raises(ValueError, match="validation_images is 60"):
        load_splits(mnist, {"validation_images": 60})
    with pytest.raises(FileNotFoundError, match="neither train-images-idx3-ubyte"):
        load_images(tmp_path, "train")


def test_every_pass_takes_every_image_once_in_a_new_order():
    images = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1)
    data = {"mean": 0.0, "std": 1 / 255, "flip": False, "max_shift": 0}
    samples = PixelSamples(images, np.arange(10), data, seed=0, length=30)
    drawn = [samples[n] for n in range(30)]
    values = [round(float(sample["pixel_values"])) for sample in drawn]
    assert values == [int(sample["labels"]) for sample in drawn]
    passes = [tuple(values[n : n + 10]) for n in (0, 10, 20)]
    assert all(sorted(p) == list(range(10)) for p in passes) and len(set(passes)) == 3
    assert round(float(PixelSamples(images, np.arange(10), data, 0, 30)[17]["pixel_values"])) == values[17]


def test_shifts_and_flips_move_pixels_alone():
    image = np.arange(1, 26, dtype=np.uint8).reshape(1, 1, 5, 5)
    data = {"mean": 0.0, "std": 1 / 255, "flip": True, "max_shift": 1}
    samples = PixelSamples(image, np.zeros(1, int), data, seed=0, length=200)
    seen = {tuple(samples[n]["pixel_values"].round().int().flatten().tolist()) for n in range(200)}
    expected = set()
    for turned in (image[0, 0], image[0, 0, :, ::-1]):
        big = np.zeros((7, 7), int)
        big[1:6, 1:6] = turned
        expected |= {tuple(big[i : i + 5, j : j + 5].flatten().tolist()) for i in range(3) for j in range(3)}
    assert seen == expected


def test_it_learns_and_is_evaluated(recipe, mnist, tmp_path):
    overrides = ["train.iterations=400", "train.learning_rate=0.005", "train.validate_every=50"]
    overrides += ["train.checkpoint_every=400", "train.best_by=validation_accuracy"]
    run(recipe, mnist, tmp_path, overrides, evaluate="test")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["images"] == 20 and results["accuracy"] > 0.8
    model = bf.BinaryFormerForImageClassification.from_pretrained(tmp_path / "model").eval()
    images, labels = load_images(mnist, "test")
    settings = yaml.safe_load(recipe.read_text())["data"]
    x = torch.tensor((images / 255.0 - settings["mean"]) / settings["std"], dtype=torch.float32)
    with torch.no_grad():
        right = (model(x).logits.argmax(1).numpy() == labels).mean()
    assert right == pytest.approx(results["accuracy"], abs=1e-4)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    pictures = [Image.fromarray(image[0]) for image in images]
    torch.testing.assert_close(processor(pictures, return_tensors="pt")["pixel_values"], x)


def test_two_processes_see_one_process_batches_and_stay_in_sync(recipe, mnist, tmp_path):
    # No random draws in the network.
    overrides = ["model.attention_type=softmax", "model.bit_gradient=null", "train.best_by=validation_accuracy"]
    one = run(recipe, mnist, tmp_path / "one", overrides)
    arguments = command_line(overrides, recipe=recipe, data=mnist, evaluate="none")
    run_on_two_processes("train_pixels.py", arguments, tmp_path / "two")
    ours, theirs = (read_log(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    assert theirs[0]["processes"] == 2
    np.testing.assert_allclose([r["loss"] for r in theirs], [r["loss"] for r in ours], rtol=1e-4)
    two = load_file(tmp_path / "two" / "model" / "model.safetensors")
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-2, atol=2e-4, msg=key)


def test_a_split_that_there_is_not_is_said_before_the_training(recipe, mnist, tmp_path):
    with pytest.raises(typer.BadParameter, match="--evaluate tets: expected train, validation, test or none"):
        run(recipe, mnist, tmp_path / "run", evaluate="tets")
    assert not (tmp_path / "run").exists()


def test_killed_at_a_random_step_and_resumed_equals_uninterrupted(recipe, mnist, tmp_path):
    overrides = ["train.iterations=12"]
    whole = run(recipe, mnist, tmp_path / "whole", overrides)
    arguments = command_line(overrides, recipe=recipe, data=mnist, evaluate="none")
    resume = kill_in_training("train_pixels.py", arguments, tmp_path / "cut", 12)
    resumed = run(recipe, mnist, tmp_path / "cut", overrides, resume=resume)
    assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())
