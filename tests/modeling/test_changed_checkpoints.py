"""Weights in memory do not follow their file, and a checkpoint that changes while it is loaded is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import vq_cases

import hf_binaryformer as bf
from hf_binaryformer.modeling import pretrained
from hf_binaryformer.modeling.at_rest import ChangedError
from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.image_processing import BinaryFormerImageProcessor
from hf_binaryformer.modeling.networks import BinaryFormerForSemanticSegmentation
from hf_binaryformer.modeling.pretrained import CheckpointError
from hf_binaryformer.modeling.vq_transformer import BinaryVQTransformer3DModel
from hf_binaryformer.pipelines.segmentation import VolumeSegmentationPipeline


def save_network(folder: Path) -> Path:
    """A segmentation network of toy size with its settings."""
    config = BinaryFormerConfig(
        image_size=16, num_channels=1, hidden_size=24, num_heads=2, value_head_dim=4, num_hidden_layers=1,
        decoder_hidden_size=32, attention_type="sign", id2label={0: "background", 1: "one"},
    )  # fmt: skip
    BinaryFormerForSemanticSegmentation(config).save_pretrained(folder)
    processor = BinaryFormerImageProcessor(num_slices=1, slice_position=False, image_size=(16, 16))
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("save", [save_network, vq_cases.save_checkpoint])
def test_a_file_that_is_overwritten_changes_no_network_in_memory(save, tmp_path):
    """If it were mapped, half a file would be a bus error."""
    folder = save(tmp_path)
    loaded = bf.from_pretrained(folder)
    networks = [loaded] if save == save_network else [loaded.vqmodel, loaded.transformer]
    before = [tensor.clone() for network in networks for tensor in network.state_dict().values()]
    for path in folder.rglob("*.safetensors"):
        with path.open("r+b") as file:
            file.write(b"\1" * path.stat().st_size)
    after = [tensor for network in networks for tensor in network.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_checkpoint_that_changes_while_it_is_loaded_is_refused(tmp_path, monkeypatch):
    check = pretrained.check_sizes

    def check_and_change(folder, *arguments):
        check(folder, *arguments)
        path = folder / "config.json"
        path.write_bytes(path.read_bytes() + b"\n")

    monkeypatch.setattr(pretrained, "check_sizes", check_and_change)
    with pytest.raises(CheckpointError, match="changed while it was read, expected a file at rest: wait"):
        bf.from_pretrained(save_network(tmp_path / "network"))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        BinaryVQTransformer3DModel.from_pretrained(vq_cases.save_checkpoint(tmp_path / "vq"))


def test_network_and_settings_of_a_pipeline_are_of_one_checkpoint(tmp_path, monkeypatch):
    folder, load = save_network(tmp_path), BinaryFormerImageProcessor.from_pretrained

    def change_and_load(name, **options):
        path = folder / "preprocessor_config.json"
        path.write_bytes(path.read_bytes() + b"\n")
        return load(name, **options)

    monkeypatch.setattr(BinaryFormerImageProcessor, "from_pretrained", change_and_load)
    with pytest.raises(ChangedError, match="changed while it was read"):
        VolumeSegmentationPipeline.from_pretrained(folder)


def test_components_of_a_pipeline_are_of_one_checkpoint(tmp_path, monkeypatch):
    folder, load = vq_cases.save_checkpoint(tmp_path), BinaryVQTransformer3DModel.from_pretrained

    def change_and_load(name, **options):
        for path in folder.glob("*/config.json"):
            path.write_bytes(path.read_bytes() + b"\n")
        return load(name, **options)

    monkeypatch.setattr(BinaryVQTransformer3DModel, "from_pretrained", change_and_load)
    with pytest.raises(ChangedError, match="changed while it was read"):
        bf.from_pretrained(folder)


def test_damaged_settings_are_told_with_the_remedy(tmp_path):
    folder = save_network(tmp_path)
    (folder / "preprocessor_config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match="fetch the checkpoint again"):
        VolumeSegmentationPipeline.from_pretrained(folder)
