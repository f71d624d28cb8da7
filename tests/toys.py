"""Data, recipes and networks of toy size, which several tests of the scripts share."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import yaml
from safetensors.torch import save_file

import hf_binaryformer as bf
from hf_binaryformer.training.recipes import PIXEL_RECIPES, RECIPES, VQ_RECIPES

GRID = (2, 3, 2)
PIXEL_SIDE = 4
# A training of six iterations that is validated and saved halfway.
SHORT = {
    "iterations": 6,
    "batch_size": 4,
    "warmup": 2,
    "log_every": 1,
    "validate_every": 3,
    "checkpoint_every": 3,
    "mixed_precision": "no",
}
DIFFUSERS_FILES = ("config.json", "diffusion_pytorch_model.safetensors")


def write_segmentation_data(folder: Path) -> Path:
    """A folder in prepare_data.py's layout: a bright ball (label 1) with a brighter core (label 2) in noise."""
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    rng = np.random.default_rng(0)
    cases = []
    for number, split in enumerate(["train"] * 4 + ["validation", "test"]):
        shape = (20, 22, 24)
        centre = np.array(shape) / 2 + rng.uniform(-2, 2, 3)
        distance = np.linalg.norm(np.moveaxis(np.indices(shape), 0, -1) - centre, axis=-1)
        label = (distance < 8).astype(np.uint8) + (distance < 4)
        image = (label * 80 + rng.normal(20, 5, shape)).astype(np.float32)
        case = {"case": f"c{number}", "group": f"g{number}", "split": split}
        for kind, array in (("image", image), ("label", label)):
            case[kind] = f"{kind}s/c{number}.nii.gz"
            nib.save(nib.Nifti1Image(array, np.eye(4)), folder / case[kind])
        cases.append(case)
    names = {"0": "background", "1": "shell", "2": "core"}
    manifest = {"name": "toy-balls", "licence": "CC0-1.0", "label_names": names, "cases": cases}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def write_segmentation_recipe(path: Path) -> Path:
    """The hippocampus recipe at toy size."""
    settings = yaml.safe_load((RECIPES / "hippocampus.yaml").read_text())
    settings["model"] |= {
        "hidden_size": 24,
        "num_heads": 2,
        "num_hidden_layers": 2,
        "value_head_dim": 4,
        "decoder_hidden_size": 32,
    }
    settings["processor"] |= {"image_size": [24, 24], "spacing": None}
    settings["augment"]["max_shift"] = 2
    settings["train"] |= {
        "iterations": 6,
        "batch_size": 4,
        "workers": 0,
        "checkpoint_every": 3,
        "log_every": 1,
        "warmup": 2,
        "mixed_precision": "no",
        "save_dtype": "float32",
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def write_ball(path: Path, rng: np.random.Generator, spacing: float = 1.0) -> None:
    """A ball with two shades in a black background."""
    shape = (26, 30, 28)
    distance = np.linalg.norm(np.moveaxis(np.indices(shape), 0, -1) - (13, 15, 14) + rng.uniform(-1, 1, 3), axis=-1)
    image = (distance < 11) * 60.0 + (distance < 6) * 40 + rng.normal(0, 1, shape) * (distance < 11)
    nib.save(nib.Nifti1Image(image.astype(np.float32), np.diag([spacing] * 3 + [1])), path)


def write_balls(folder: Path) -> Path:
    """A folder in prepare_data.py's layout."""
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    cases = []
    for number, split in enumerate(["train"] * 3 + ["validation", "test"]):
        write_ball(folder / "images" / f"c{number}.nii.gz", rng)
        files = {"image": f"images/c{number}.nii.gz", "label": f"labels/c{number}.nii.gz"}
        cases.append({"case": f"c{number}", "group": f"g{number}", "split": split, **files})
    (folder / "manifest.json").write_text(json.dumps({"label_names": {"0": "background"}, "cases": cases}))
    return folder


def write_autoencoder_recipe(path: Path) -> Path:
    """The small recipe at toy size."""
    settings = yaml.safe_load((VQ_RECIPES / "brain-small.yaml").read_text())
    settings["data"] |= {"volume_shape": [24, 32, 24], "crop": [16, 16, 16], "token_copies": 3, "token_max_shift": 2}
    settings["data"]["sources"] = [{"share": 0.75, "margin": 4}, {"share": 0.25, "margin": 0}]
    settings["vqmodel"] |= {
        "num_codebooks": 2,
        "codebook_size": 8,
        "codebook_dim": 4,
        "encoder_channels": [8, 8, 16],
        "decoder_channels": [16, 16, 16, 8],
        "spacing": [1.0, 1.0, 1.0],
        "tile_size": 2,
    }
    settings["vqae"] |= {
        "iterations": 6,
        "batch_size": 4,
        "quantize_after": 2,
        "warmup": 2,
        "log_every": 1,
        "checkpoint_every": 3,
        "mixed_precision": "no",
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def write_tokens(folder: Path) -> Path:
    """Tokens in encode_tokens.py's layout: each sample is one of two patterns, so that one known token tells all."""
    patterns = torch.randint(6, (2, 2, *GRID), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for split, count in (("train", 12), ("validation", 4)):
        save_file({"tokens": patterns[torch.arange(count) % 2]}, folder / f"{split}.safetensors")
    return folder


def write_sampler_recipe(path: Path) -> Path:
    """The brain-small recipe at toy size."""
    settings = yaml.safe_load((VQ_RECIPES / "brain-small.yaml").read_text())
    settings["transformer"] |= {
        "grid_size": list(GRID),
        "num_codebooks": 2,
        "codebook_size": 6,
        "embedding_dim": 8,
        "num_layers": 2,
        "num_heads": 2,
        "value_head_dim": 4,
        "dropout": 0.1,
    }
    settings["scheduler"] |= {"num_codebooks": 2, "mask_token_id": 6, "num_train_timesteps": 16}
    settings["sampler"] |= SHORT | {"save_dtype": "float32", "learning_rate": 3e-3}
    path.write_text(yaml.safe_dump(settings))
    return path


def write_autoencoder(folder: Path) -> None:
    """The autoencoder of :func:`write_tokens`, untrained."""
    # Two stages of stride 2, so that a token is 4 voxels wide.
    autoencoder = bf.BinaryVQModel(
        num_codebooks=2,
        codebook_size=6,
        codebook_dim=4,
        encoder_channels=[8, 8],
        decoder_channels=[16, 16, 8],
    )
    autoencoder.save_pretrained(folder)


def write_idx(path: Path, values: np.ndarray) -> None:
    """A file as MNIST's are, packed if its name ends in .gz."""
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim) + b"".join(struct.pack(">I", n) for n in values.shape)
    content = header + bytes(values.flatten().tolist())
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_pixels(folder: Path) -> Path:
    """Fashion-MNIST's layout with 4 x 4 pixels: the class is the quarter that is bright."""
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 60), ("t10k", 20)):
        labels = rng.integers(0, 4, count).astype(np.uint8)
        images = rng.integers(0, 60, (count, PIXEL_SIDE, PIXEL_SIDE)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * (label // 2) :, 2 * (label % 2) :][:2, :2] += 180
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)
    return folder


def write_pixel_recipe(path: Path) -> Path:
    """The mnist-pixels recipe at toy size."""
    settings = yaml.safe_load((PIXEL_RECIPES / "mnist-pixels.yaml").read_text())
    settings["data"] |= {"classes": 4, "validation_images": 12}
    settings["model"] |= {"hidden_size": 16, "num_heads": 2, "num_hidden_layers": 2, "value_head_dim": 4}
    settings["train"] |= SHORT
    path.write_text(yaml.safe_dump(settings))
    return path
