"""Scans, a tiny network, and what a run over many scans leaves."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from typer.testing import CliRunner, Result

from hf_binaryformer import cli
from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.image_processing import BinaryFormerImageProcessor
from hf_binaryformer.modeling.networks import BinaryFormerForSemanticSegmentation

NAMES = {0: "background", 1: "left core", 2: "right core", 3: "shell <b>"}
SHAPE = (14, 12, 10)


def run(*arguments: Any) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["segment", *(str(a) for a in arguments)])


def save(path: Path, seed: int = 0) -> Path:
    """A scan with a blob whose brightness the seed changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    array = np.exp(-2 * sum(a**2 for a in axes)) + 0.05 * np.random.default_rng(seed).random(SHAPE)
    content = nib.Nifti1Image(array.astype(np.float32), np.diag([2.0, 2.0, 2.0, 1.0])).to_bytes()
    path.write_bytes(gzip.compress(content, mtime=0))
    return path


def checkpoint(folder: Path, seed: int = 0, **settings: Any) -> Path:
    torch.manual_seed(seed)
    sizes = {"image_size": 16, "hidden_size": 48, "num_heads": 3, "value_head_dim": 4, "num_hidden_layers": 1}
    config = BinaryFormerConfig(**sizes, decoder_hidden_size=64, attention_type="sign", id2label=NAMES)
    BinaryFormerForSemanticSegmentation(config).save_pretrained(folder)
    processor = {"num_slices": 3, "spacing": None, "image_size": (16, 16), "mirror": False, **settings}
    BinaryFormerImageProcessor(**processor).save_pretrained(folder)
    return folder


def table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "volumes.csv").open(encoding="utf-8", newline="") as file:
        return {row["scan"]: row for row in csv.DictReader(file)}


def all_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def results(*names: str) -> set[str]:
    return {f"{name}_labels{end}" for name in names for end in (".nii.gz", ".json", ".jpg")}
