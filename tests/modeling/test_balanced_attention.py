"""Centred and normalised queries and keys in the attention module, against floating-point attention written here."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import hf_binaryformer as bf
from hf_binaryformer.modeling import AttentionConfig, BinaryAttention
from hf_binaryformer.training.recipes import load_recipe

DIM, HEADS, VALUES, TOKENS = 24, 3, 4, 11
BALANCED = {"query_key_centering": "tokens", "query_key_norm": "rms"}
CHOICES = [{}, {"query_key_centering": "tokens"}, {"query_key_norm": "rms"}, BALANCED]


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * (ctx.saved_tensors[0].abs() <= 1)


def build(dtype: torch.dtype = torch.float64, **fields: Any) -> BinaryAttention:
    torch.manual_seed(1)
    config = AttentionConfig(value_head_dim=VALUES, learned_logit_scale=True, **fields)
    module = BinaryAttention(DIM, HEADS, qkv_bias=True, config=config, dtype=dtype)
    with torch.no_grad():
        module.qkv.bias.normal_()
        if module.log_scale is not None:
            module.log_scale.normal_(std=0.3)
    return module


def expected(module: BinaryAttention, x: Tensor, signs: bool) -> Tensor:
    """The formulas of the paper on projections that are cut up by hand."""
    batch, tokens, _ = x.shape
    d = module.config.query_key_head_dim or DIM // HEADS
    q, k, v = (x @ module.qkv.weight.T + module.qkv.bias).split([HEADS * d, HEADS * d, HEADS * VALUES], -1)
    q, k, v = (t.view(batch, tokens, HEADS, -1).transpose(1, 2) for t in (q, k, v))
    sides = []
    for t in (q, k):
        if module.config.query_key_centering == "tokens":
            t = t - t.mean(2, keepdim=True)
        if module.config.query_key_norm == "rms":
            t = t / (t.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        sides.append(Sign.apply(t) if signs else t)
    scores = sides[0] @ sides[1].mT * d**-0.5 * module.log_scale.exp()[:, None, None]
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, HEADS * VALUES)
    return out @ module.proj.weight.T + module.proj.bias


@pytest.mark.parametrize("head_dim", [None, 20, 64], ids=lambda d: f"d{d}")
@pytest.mark.parametrize("fields", CHOICES, ids=lambda f: "-".join(f) or "neither")
@pytest.mark.parametrize("kind", ["softmax", "sign"])
def test_output_and_every_gradient(kind, fields, head_dim) -> None:
    module = build(
        attention_type=kind, bit_gradient="ste" if kind == "sign" else None, query_key_head_dim=head_dim, **fields
    )
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    learned = [x, *module.parameters()]
    got, wanted = module(x), expected(module, x, kind == "sign")
    torch.testing.assert_close(got, wanted)
    for one, other in zip(*(torch.autograd.grad(out, learned, cotangent) for out in (got, wanted)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("fields", CHOICES, ids=lambda f: "-".join(f) or "neither")
def test_the_ternary_gradient_has_the_straight_through_one_as_mean(fields) -> None:
    fields = {"attention_type": "sign", **fields}
    ste, ternary = (build(torch.float32, bit_gradient=kind, **fields) for kind in ("ste", "ternary"))
    x, cotangent = torch.randn(2, TOKENS, DIM), torch.randn(2, TOKENS, DIM)
    (wanted,) = torch.autograd.grad(ste(x), ste.qkv.weight, cotangent)
    drawn = torch.stack([torch.autograd.grad(ternary(x), ternary.qkv.weight, cotangent)[0] for _ in range(400)])
    error = drawn.std(0) / 20 + 1e-5
    assert ((drawn.mean(0) - wanted).abs() / error).max() < 5.5
    assert drawn.std(0)[: 2 * DIM].max() > 0


@pytest.mark.parametrize("kind", ["hamming", "hamming_grouped", "hamming_bernoulli", "sign_stopgrad", "uniform"])
def test_every_form_takes_them(kind) -> None:
    results = []
    for fields in ({}, BALANCED):
        module = build(torch.float32, attention_type=kind, **fields)
        module.generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, TOKENS, DIM, generator=torch.Generator().manual_seed(5), requires_grad=True)
        out = module(x)
        out.square().sum().backward()
        assert torch.isfinite(x.grad).all()
        results.append(out.detach())
    assert torch.equal(*results) == (kind == "uniform")


def test_weights_of_hamming_read_balanced_tokens() -> None:
    module = build(attention_type="hamming", **BALANCED).double()
    seen = []
    module.query_theta.register_forward_hook(lambda m, inputs, output: seen.append(inputs[0]))
    module(torch.randn(1, TOKENS, DIM, dtype=torch.float64))
    torch.testing.assert_close(seen[0].mean(2), torch.zeros(1, HEADS, DIM // HEADS).double(), rtol=0, atol=0.3)
    torch.testing.assert_close(seen[0].square().mean(-1), torch.ones(1, HEADS, TOKENS).double(), rtol=0, atol=1e-3)


def test_a_shift_of_all_keys_changes_nothing() -> None:
    # That softmax does not see it is why its keys need no centring; bits do.
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    for fields, same in ((BALANCED, True), ({}, False)):
        module = build(attention_type="sign", **fields)
        before = module(x)
        with torch.no_grad():
            module.qkv.bias[DIM : 2 * DIM] += 2.0
        assert torch.allclose(module(x), before) == same


def test_more_bits_than_channels_in_a_pretrained_transformer() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=1)
    old = {key: t.clone() for key, t in vit.state_dict().items()}
    config = bf.BinaryFormerConfig(attention_type="sign", value_head_dim=None, query_key_head_dim=96, **BALANCED)
    attention = bf.binarize_attention(vit, config).blocks[0].attn
    assert attention.qkv.weight.shape == (2 * 3 * 96 + 192, 192)
    # Queries and keys of another size start anew; values and the output's projection stay.
    torch.testing.assert_close(attention.qkv.weight[-192:], old["blocks.0.attn.qkv.weight"][-192:])
    torch.testing.assert_close(attention.qkv.bias[-192:], old["blocks.0.attn.qkv.bias"][-192:])
    torch.testing.assert_close(attention.proj.weight, old["blocks.0.attn.proj.weight"])
    assert vit(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)


def test_networks_and_recipes_take_them(tmp_path) -> None:
    fields = dict(attention_type="sign", bit_gradient="ternary", query_key_head_dim=16, **BALANCED)
    denoiser = bf.BinaryVQTransformer3DModel(grid_size=(1, 2, 3), num_layers=1, **fields)
    denoiser.save_pretrained(tmp_path / "denoiser")
    again = bf.from_pretrained(tmp_path / "denoiser")
    assert again.config.query_key_norm == "rms" and again.blocks[0].attn.head_dim == 16
    config = bf.BinaryFormerConfig(image_size=16, hidden_size=24, num_heads=2, num_hidden_layers=1, **fields)
    bf.BinaryFormerModel(config).save_pretrained(tmp_path / "model")
    assert bf.from_pretrained(tmp_path / "model").config.query_key_centering == "tokens" and config.head_dim == 16
    recipe = load_recipe("hippocampus", ["model.query_key_norm=rms", "model.query_key_centering=tokens"])
    assert recipe["model"]["query_key_norm"] == "rms"
    with pytest.raises(Exception, match="query_key_norm"):
        bf.BinaryFormerConfig(query_key_norm="batch")


def test_autocast_keeps_the_balance_in_bfloat16() -> None:
    module = build(torch.float32, attention_type="sign", bit_gradient="ternary", **BALANCED)
    x = torch.randn(2, 70, DIM, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16 and torch.isfinite(module.qkv.weight.grad).all()
    # Few bits lie so near to 0 that bfloat16 turns them.
    assert (module(x) - out.float()).abs().mean() < 0.1 * module(x).abs().mean()
