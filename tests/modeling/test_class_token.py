"""The class token, the paper's default, which both shipped networks leave out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.networks import (
    BinaryFormerForImageClassification,
    BinaryFormerForSemanticSegmentation,
    BinaryFormerModel,
)

TYPES = ["softmax", "sign", "hamming", "hamming_grouped", "hamming_bernoulli", "uniform"]
HEIGHT, WIDTH, PATCH = 24, 32, 8
ROWS, COLUMNS = HEIGHT // PATCH, WIDTH // PATCH


def config(**fields: Any) -> BinaryFormerConfig:
    sizes = {
        "image_size": [HEIGHT, WIDTH],
        "patch_size": PATCH,
        "num_channels": 1,
        "hidden_size": 48,
        "num_heads": 3,
        "value_head_dim": 4,
        "num_hidden_layers": 2,
        "decoder_hidden_size": 64,
        "num_labels": 4,
        "initializer_range": 0.2,
    }
    return BinaryFormerConfig(**{**sizes, **fields})


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 1, HEIGHT, WIDTH)


def blocks_that_do_nothing(model: nn.Module) -> None:
    """Only the residual connections are left, so that each token stays what it was at the start."""
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0].endswith(("attn.proj", "mlp.fc2")):
            nn.init.zeros_(parameter)


def test_it_is_the_papers_default() -> None:
    assert BinaryFormerConfig().class_token


@pytest.mark.parametrize("attention_type", TYPES)
def test_shapes(attention_type) -> None:
    x = images()
    encoder = BinaryFormerModel(config(attention_type=attention_type)).eval()
    assert encoder(x).last_hidden_state.shape == (2, 1 + ROWS * COLUMNS, 48)
    segmentation = BinaryFormerForSemanticSegmentation(config(attention_type=attention_type)).eval()
    assert segmentation(x).logits.shape == (2, 4, HEIGHT, WIDTH)
    # Other sizes resample the position table, in which the class token has no place.
    assert segmentation(torch.randn(1, 1, 16, 40)).logits.shape == (1, 4, 16, 40)


@pytest.mark.parametrize("attention_type", TYPES)
def test_it_takes_part_in_attention(attention_type) -> None:
    """What it starts as changes every patch, and each patch changes what it becomes."""
    model = BinaryFormerModel(config(attention_type=attention_type, num_hidden_layers=1)).eval()
    x = images(1)

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return model(x).last_hidden_state

    patches = run(x)[0, 1:]
    (to_class_token,) = torch.autograd.grad(patches[ROWS * COLUMNS // 2].square().sum(), model.encoder.cls_token)
    assert to_class_token.any()
    before = run(x)[0, 0]
    for row in range(ROWS):
        for column in range(COLUMNS):
            changed = x.clone()
            changed[..., row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] += 3
            assert not torch.equal(run(changed)[0, 0], before), (row, column)


def test_patches_keep_their_order() -> None:
    """Tokens by hand: the patch at (row, column), weighed by the embedding, plus its place in the position table."""
    model = BinaryFormerModel(config()).eval()
    blocks_that_do_nothing(model)
    nn.init.normal_(model.encoder.pos_embed)
    x, encoder = images(), model.encoder
    tokens = model(x).last_hidden_state
    weight, bias = encoder.patch_embed.proj.weight.flatten(1), encoder.patch_embed.proj.bias
    torch.testing.assert_close(
        tokens[:, 0], encoder.norm(encoder.cls_token[:, 0] + encoder.pos_embed[:, 0]).expand(2, -1)
    )
    for row in range(ROWS):
        for column in range(COLUMNS):
            pixels = x[:, 0, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH].flatten(1)
            place = 1 + row * COLUMNS + column
            expected = encoder.norm(pixels @ weight.T + bias + encoder.pos_embed[:, place])
            torch.testing.assert_close(tokens[:, place], expected)


def test_the_decoder_sees_the_patches_alone() -> None:
    """If the blocks do nothing, the network with a class token is the one without, at every pixel."""
    with_token = BinaryFormerForSemanticSegmentation(config()).eval()
    without = BinaryFormerForSemanticSegmentation(config(class_token=False)).eval()
    for model in (with_token, without):
        blocks_that_do_nothing(model)
    state = with_token.state_dict()
    del state["binaryformer.encoder.cls_token"]
    state["binaryformer.encoder.pos_embed"] = state["binaryformer.encoder.pos_embed"][:, 1:]
    without.load_state_dict(state)
    blocks_that_do_nothing(without)
    x = images()
    torch.testing.assert_close(with_token(x).logits, without(x).logits)


@pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
def test_pooling(pooling) -> None:
    model = BinaryFormerForImageClassification(config(pooling=pooling)).eval()
    x = images()
    tokens = model.binaryformer(x).last_hidden_state
    pooled = {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(1), "max": tokens[:, 1:].amax(1)}[pooling]
    torch.testing.assert_close(model(x).logits, model.classifier(pooled))


@pytest.mark.parametrize("cls", [BinaryFormerModel, BinaryFormerForSemanticSegmentation])
def test_saved_and_loaded(cls, tmp_path) -> None:
    model = cls(config()).eval()
    model.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    assert again.config.class_token
    x = images()
    assert torch.equal(again(x)[0], model(x)[0])
