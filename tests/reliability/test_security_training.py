"""Trainings run no code: pickles are planted in the checkpoints that ``--resume`` reads, and among the data.

``len(STATES)`` names are planted in a checkpoint.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import vq_cases
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn
from toys import write_segmentation_data, write_segmentation_recipe

import hf_binaryformer as bf
from hf_binaryformer.data.hashing import file_hash
from hf_binaryformer.data.pixels import load_images
from hf_binaryformer.pipelines.volumes import VolumeError, read_volume
from hf_binaryformer.training import segmentation
from hf_binaryformer.training.checkpoints import FOLDER, MANIFEST, Checkpoints, Progress
from hf_binaryformer.training.sampler import load_tokens

# What a training's checkpoint consists of, and what Accelerate reads there in place of it.
STATES = ("optimizer.bin", "random_states_0.pkl", "state_0.pt", "state_1.pt", "model.safetensors", "pytorch_model.bin")
STATES = (*STATES, "scheduler.bin", "sampler.bin", "scaler.pt", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl")


def checkpoints(output: Path) -> Checkpoints:
    model = nn.Linear(2, 2)
    accelerator = Accelerator(cpu=True, project_dir=output)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    accelerator.prepare(model, optimizer)
    return Checkpoints(accelerator, output, 2, (Progress(), schedule))


def sign(checkpoint: Path) -> None:
    """List the files of a checkpoint as the one who planted some of them would."""
    found = {path.name: file_hash(path) for path in checkpoint.iterdir() if path.name != MANIFEST}
    (checkpoint / MANIFEST).write_text(json.dumps(found))


@pytest.mark.parametrize("name", STATES)
def test_no_state_of_a_training_runs_code(name, tmp_path, markers):
    run = checkpoints(tmp_path / "run")
    run.save(1)
    place = next((tmp_path / "run" / FOLDER).iterdir())
    run.restore()
    markers.plant(place / name)
    if name == "pytorch_model.bin":
        (place / "model.safetensors").unlink()
    sign(place)
    # These are not read, or read and passed over as Accelerate does it; a step's random numbers come from its seed.
    if name in ("random_states_0.pkl", "scheduler.bin", "sampler.bin", "scaler.pt"):
        run.restore()
    else:
        with pytest.raises((typer.BadParameter, SafetensorError)) as caught:
            run.restore()
        assert "\n" not in str(caught.value)


def test_a_resumed_training_runs_no_code(tmp_path, markers):
    data = tmp_path / "data"
    data.mkdir()
    write_segmentation_data(data)
    recipe = write_segmentation_recipe(tmp_path / "toy.yaml")
    options: dict[str, Any] = {"recipe": str(recipe), "data": data, "output": tmp_path / "run", "evaluate": "none"}
    segmentation.main(**options, stop_after=3)
    place = next((tmp_path / "run" / FOLDER).iterdir())
    whole = shutil.copytree(place, tmp_path / "whole")
    for name in ("random_states_0.pkl", "optimizer.bin", "custom_checkpoint_0.pkl"):
        shutil.rmtree(place)
        shutil.copytree(whole, place)
        markers.plant(place / name)
        sign(place)
        if name == "random_states_0.pkl":
            segmentation.main(**options, resume=True, stop_after=4)
            shutil.rmtree(next((tmp_path / "run" / FOLDER).glob("*4")))
        else:
            with pytest.raises(typer.BadParameter, match="which could run any code"):
                segmentation.main(**options, resume=True)


@pytest.mark.parametrize(
    "suffix", [".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".dcm", ".ima", ".npy", ".npz", ".pkl", ".pt"]
)
def test_no_volume_is_unpickled(suffix, tmp_path, markers):
    path = markers.plant(tmp_path / f"a{suffix}")
    with pytest.raises(VolumeError) as caught:
        read_volume(path)
    assert "\n" not in str(caught.value)


def test_no_training_data_is_unpickled(tmp_path, markers):
    names = (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "data_batch_1",
        "batches.meta",
        "train.npz",
        "train.pt",
    )
    for name in (*names, "train.safetensors"):
        markers.plant(tmp_path / name)
    with pytest.raises(ValueError, match="no IDX file"):
        load_images(tmp_path, "train")
    for name in names[:2]:
        (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match="holds neither"):
        load_images(tmp_path, "train")
    with pytest.raises(Exception, match="(?i)header"):
        load_tokens(
            tmp_path,
            "train",
            bf.BinaryVQTransformer3DModel.from_pretrained(vq_cases.save_checkpoint(tmp_path / "pipeline")),
        )
    vit = markers.plant(tmp_path / "vit.safetensors")
    for checkpoint in (vit, markers.plant(tmp_path / "vit.pth")):
        with pytest.raises(Exception, match="(?i)header|expected a .safetensors file"):
            bf.BinaryFormerForSemanticSegmentation.from_timm(
                "vit_tiny_patch16_224", checkpoint=checkpoint, num_labels=2
            )
