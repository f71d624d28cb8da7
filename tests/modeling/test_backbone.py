"""The encoder as a backbone: its maps are the tokens of the encoder, and a saved choice comes back."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from transformers import AutoBackbone

import hf_binaryformer as bf

TINY = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "num_heads": 2, "num_hidden_layers": 3}
TINY |= {"value_head_dim": 4, "decoder_hidden_size": 32, "num_labels": 3, "attention_type": "sign"}


def tokens_as_map(model: bf.BinaryFormerModel, image: Tensor) -> Tensor:
    height, width = image.shape[2] // 4, image.shape[3] // 4
    return model(image).last_hidden_state[:, -height * width :].mT.unflatten(2, (height, width))


@pytest.mark.parametrize("class_token", [True, False])
def test_the_last_map_is_the_encoders_output(class_token, tmp_path):
    network = bf.BinaryFormerForSemanticSegmentation(bf.BinaryFormerConfig(**TINY, class_token=class_token)).eval()
    network.save_pretrained(tmp_path)
    backbone = bf.BinaryFormerBackbone.from_pretrained(tmp_path)
    image = torch.randn(2, 3, 24, 16)
    output = backbone(image)
    assert backbone.out_features == ["stage3"] and backbone.channels == [24] and output.hidden_states is None
    assert len(output.feature_maps) == 1
    torch.testing.assert_close(output.feature_maps[0], tokens_as_map(network.binaryformer, image))


def test_chosen_maps_and_hidden_states():
    config = bf.BinaryFormerConfig(**TINY, out_features=["stem", "stage2"])
    backbone = AutoBackbone.from_config(config).eval()
    assert isinstance(backbone, bf.BinaryFormerBackbone) and config.out_indices == [0, 2]
    image = torch.randn(1, 3, 16, 16)
    output = backbone(image, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    for found, index in zip(output.feature_maps, (0, 2), strict=True):
        expected = backbone.encoder.norm(output.hidden_states[index])[:, 1:].mT.unflatten(2, (4, 4))
        torch.testing.assert_close(found, expected)
    backbone.train()(image).feature_maps[1].sum().backward()
    assert backbone.encoder.blocks[1].attn.qkv.weight.grad.abs().sum() > 0
    assert backbone.encoder.blocks[2].attn.qkv.weight.grad is None


def test_the_choice_is_saved_and_what_was_not_chosen_is_not(tmp_path):
    bf.BinaryFormerConfig(**TINY).save_pretrained(tmp_path / "plain")
    saved = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not {"out_features", "out_indices", "_out_features", "_out_indices", "stage_names"} & saved.keys()
    bf.BinaryFormerBackbone(bf.BinaryFormerConfig(**TINY, out_indices=[1, 3])).save_pretrained(tmp_path / "chosen")
    assert bf.BinaryFormerBackbone.from_pretrained(tmp_path / "chosen").out_features == ["stage1", "stage3"]


def test_maps_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="stage4"):
        bf.BinaryFormerConfig(**TINY, out_features=["stage4"])
    with pytest.raises(ValueError, match="out_indices"):
        bf.BinaryFormerConfig(**TINY, out_indices=[9])
    with pytest.raises(ValueError, match="multiples of the patch size 4"):
        bf.BinaryFormerBackbone(bf.BinaryFormerConfig(**TINY))(torch.zeros(1, 3, 18, 16))


def test_the_encoder_of_a_network_with_a_head(tmp_path):
    network = bf.BinaryFormerForSemanticSegmentation(bf.BinaryFormerConfig(**TINY)).eval()
    network.save_pretrained(tmp_path)
    image = torch.randn(1, 3, 16, 16)
    encoder = bf.BinaryFormerModel.from_pretrained(tmp_path)
    assert torch.equal(encoder(image).last_hidden_state, network.binaryformer(image).last_hidden_state)
