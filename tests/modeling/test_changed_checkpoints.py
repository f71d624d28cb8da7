"""Weights in memory do not follow their file, and a checkpoint that changes while it is loaded is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import hf_binaryformer as bf
from hf_binaryformer.modeling import pretrained
from hf_binaryformer.modeling.at_rest import ChangedError
from hf_binaryformer.modeling.image_processing import BinaryFormerImageProcessor
from hf_binaryformer.modeling.pretrained import PACKAGED, CheckpointError
from hf_binaryformer.modeling.vq_transformer import BinaryVQTransformer3DModel
from hf_binaryformer.pipelines.segmentation import VolumeSegmentationPipeline

NETWORK, VQ = "binaryformer-tiny-brain", "binaryvq-tiny-brain"


@pytest.fixture
def copy(tmp_path):
    return lambda name: Path(shutil.copytree(PACKAGED / name, tmp_path / name))


@pytest.mark.parametrize("name", [NETWORK, VQ])
def test_a_file_that_is_overwritten_changes_no_network_in_memory(name, copy):
    """If it were mapped, half a file would be a bus error."""
    folder = copy(name)
    loaded = bf.from_pretrained(folder)
    networks = [loaded] if name == NETWORK else [loaded.vqmodel, loaded.transformer]
    before = [tensor.clone() for network in networks for tensor in network.state_dict().values()]
    for path in folder.rglob("*.safetensors"):
        with path.open("r+b") as file:
            file.write(b"\1" * path.stat().st_size)
    after = [tensor for network in networks for tensor in network.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_checkpoint_that_changes_while_it_is_loaded_is_refused(copy, monkeypatch):
    check = pretrained.check_sizes

    def check_and_change(folder, *arguments):
        check(folder, *arguments)
        path = folder / "config.json"
        path.write_bytes(path.read_bytes() + b"\n")

    monkeypatch.setattr(pretrained, "check_sizes", check_and_change)
    with pytest.raises(CheckpointError, match="changed while it was read, expected a file at rest: wait"):
        bf.from_pretrained(copy(NETWORK))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        BinaryVQTransformer3DModel.from_pretrained(copy(VQ))


def test_network_and_settings_of_a_pipeline_are_of_one_checkpoint(copy, monkeypatch):
    folder, load = copy(NETWORK), BinaryFormerImageProcessor.from_pretrained
    (folder / "model.safetensors").touch()

    def change_and_load(name, **options):
        path = folder / "preprocessor_config.json"
        path.write_bytes(path.read_bytes() + b"\n")
        return load(name, **options)

    monkeypatch.setattr(BinaryFormerImageProcessor, "from_pretrained", change_and_load)
    with pytest.raises(ChangedError, match="changed while it was read"):
        VolumeSegmentationPipeline.from_pretrained(folder)


def test_components_of_a_pipeline_are_of_one_checkpoint(copy, monkeypatch):
    folder, load = copy(VQ), BinaryVQTransformer3DModel.from_pretrained

    def change_and_load(name, **options):
        for path in folder.glob("*/config.json"):
            path.write_bytes(path.read_bytes() + b"\n")
        return load(name, **options)

    monkeypatch.setattr(BinaryVQTransformer3DModel, "from_pretrained", change_and_load)
    with pytest.raises(ChangedError, match="changed while it was read"):
        bf.from_pretrained(folder)


def test_damaged_settings_are_told_with_the_remedy(copy):
    folder = copy(NETWORK)
    (folder / "preprocessor_config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match="fetch the checkpoint again"):
        VolumeSegmentationPipeline.from_pretrained(folder)
