"""What a binarised timm network keeps of the old one: projections row by row, and its mode."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import Attention

import hf_binaryformer as bf


def vit(qkv_bias: bool = True) -> torch.nn.Module:
    torch.manual_seed(3)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=24, num_heads=3, depth=2, num_classes=4, qkv_bias=qkv_bias
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def old_attentions(model: torch.nn.Module) -> list[dict[str, torch.Tensor]]:
    found = [module for module in model.modules() if type(module) is Attention]
    return [{name: value.clone() for name, value in module.state_dict().items()} for module in found]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("value_head_dim", "query_key_head_dim"), [(None, None), (8, None), (4, None), (None, 16), (4, 16)]
)
def test_rows_of_equal_size_are_kept(bias: bool, value_head_dim: int | None, query_key_head_dim: int | None) -> None:
    model = vit(bias)
    before = old_attentions(model)
    fields = {} if query_key_head_dim is None else {"query_key_head_dim": query_key_head_dim}
    config = bf.BinaryFormerConfig(attention_type="sign", value_head_dim=value_head_dim, **fields)
    bf.binarize_attention(model, config)
    same_values, same_keys = value_head_dim in (None, 8), query_key_head_dim is None
    for old, block in zip(before, model.blocks, strict=True):
        new = block.attn
        for name in ("weight", "bias") if bias else ("weight",):
            mine, theirs = getattr(new.qkv, name), old[f"qkv.{name}"]
            keys = new.query_key_dim
            assert torch.equal(mine[: 2 * keys], theirs[:48]) if same_keys else mine.shape[0] > len(theirs[:48])
            if same_values:
                assert torch.equal(mine[2 * keys :], theirs[48:]) and len(mine) == 2 * keys + 24
                assert torch.equal(getattr(new.proj, name), old[f"proj.{name}"])
            else:
                assert len(mine) == 2 * keys + 3 * value_head_dim


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept(training: bool) -> None:
    model = vit().train(training)
    bf.binarize_attention(model)
    assert {module.training for module in model.modules()} == {training}
