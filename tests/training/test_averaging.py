"""Averaged checkpoints, against means worked out tensor by tensor from the files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from typer import BadParameter

from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.image_processing import BinaryFormerImageProcessor
from hf_binaryformer.modeling.networks import BinaryFormerForSemanticSegmentation
from hf_binaryformer.pipelines.segmentation import VolumeSegmentationPipeline
from hf_binaryformer.training.averaging import main

QUALITY = {"all": [[0.5, 0.5]]}


def write_checkpoint(folder: Path, seed: int, extent: list[float] | None, blocks: int = 1) -> Path:
    torch.manual_seed(seed)
    sizes = {"image_size": 16, "num_channels": 3, "hidden_size": 48, "num_heads": 3, "num_hidden_layers": blocks}
    config = BinaryFormerConfig(**sizes, decoder_hidden_size=64, attention_type="sign", quality=QUALITY)
    BinaryFormerForSemanticSegmentation(config).save_pretrained(folder)
    BinaryFormerImageProcessor(image_size=(16, 16), foreground_extent=extent).save_pretrained(folder)
    return folder


def test_weights_are_means_and_what_was_measured_is_not_kept(tmp_path: Path) -> None:
    extents = [[55.0, 42.0, 38.0], [50.0, 60.0, 38.5], None]
    folders = [write_checkpoint(tmp_path / str(seed), seed, extent) for seed, extent in enumerate(extents)]
    main(folders, tmp_path / "mean", dtype="float32")
    given = [load_file(folder / "model.safetensors") for folder in folders]
    found = load_file(tmp_path / "mean" / "model.safetensors")
    assert found.keys() == given[0].keys()
    for key, tensor in found.items():
        np.testing.assert_allclose(tensor, np.mean([state[key] for state in given], axis=0), rtol=1e-6, atol=1e-8)
    assert any(np.ptp([state[key] for state in given], axis=0).max() > 0.1 for key in found)
    assert VolumeSegmentationPipeline.from_pretrained(tmp_path / "mean").model.config.quality is None
    processor = json.loads((tmp_path / "mean" / "preprocessor_config.json").read_text())
    assert processor["foreground_extent"] == [50.0, 42.0, 38.0]


def test_weights_are_stored_in_the_format_asked_for(tmp_path: Path) -> None:
    folders = [write_checkpoint(tmp_path / str(seed), seed, None) for seed in range(2)]
    main(folders, tmp_path / "mean")
    assert {tensor.dtype for tensor in load_file(tmp_path / "mean" / "model.safetensors").values()} == {
        np.dtype("float16")
    }


def test_other_networks_and_taken_folders_are_refused(tmp_path: Path) -> None:
    one, deeper = write_checkpoint(tmp_path / "one", 0, None), write_checkpoint(tmp_path / "deeper", 0, None, blocks=2)
    with pytest.raises(BadParameter, match="deeper is no checkpoint of .*one's network: num_hidden_layers differ"):
        main([one, deeper], tmp_path / "mean")
    with pytest.raises(BadParameter, match="give two or more"):
        main([one], tmp_path / "mean")
    with pytest.raises(BadParameter, match="exists: give a new folder"):
        main([one, one], deeper)
    assert not (tmp_path / "mean").exists()
