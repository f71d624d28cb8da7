"""`binarize_attention`: what of a timm model is kept, and that a refused model is left as it was."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from hf_binaryformer.modeling.attention import BinaryAttention, attention_modules
from hf_binaryformer.modeling.binarize import binarize_attention
from hf_binaryformer.modeling.configuration import BinaryFormerConfig

# The module keeps all its projections, its value projection is new, or its queries and keys are.
CONFIGS = {
    "same sizes": {"value_head_dim": None},
    "other values": {"value_head_dim": 8},
    "other bits": {"value_head_dim": None, "query_key_head_dim": 16},
    "sign": {"value_head_dim": None, "attention_type": "sign", "learned_logit_scale": True},
}
each_config = pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)


def config(**fields: Any) -> BinaryFormerConfig:
    return BinaryFormerConfig(**fields)


def tiny(**options: Any) -> VisionTransformer:
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=3, num_classes=5, **options)


def outputs(vit: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return vit(x)


IMAGE = (2, 3, 32, 32)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch8_224.dino", "vit_base_patch16_clip_224"])
def test_softmax_patch_of_timm_changes_nothing(name):
    vit = timm.create_model(name, pretrained=False, img_size=64, depth=2, num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = outputs(vit, x)
    same = binarize_attention(vit, config(attention_type="softmax", value_head_dim=None))
    assert same is vit and len(attention_modules(vit)) == 2
    torch.testing.assert_close(outputs(vit, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value_head_dim", [None, 8])
def test_patched_timm_keeps_queries_and_keys_and_trains(value_head_dim):
    vit = tiny()
    before = {k: t.clone() for k, t in vit.state_dict().items()}
    binarize_attention(vit, config(attention_type="sign", value_head_dim=value_head_dim))
    after = vit.state_dict()["blocks.1.attn.qkv.weight"]
    rows = 2 * 192 if value_head_dim else 3 * 192
    assert torch.equal(after[:rows], before["blocks.1.attn.qkv.weight"][:rows])
    vit(torch.randn(IMAGE)).sum().backward()
    assert vit.blocks[0].attn.qkv.weight.grad[:192].abs().sum() > 0


@each_config
def test_attention_that_blocks_share_stays_shared(fields):
    vit = tiny()
    vit.blocks[2].attn = vit.blocks[0].attn
    softmax = outputs(vit.eval(), torch.randn(IMAGE))
    binarize_attention(vit, config(**fields))
    first, second, third = (block.attn for block in vit.blocks)
    assert third is first and second is not first
    assert all(isinstance(attention, BinaryAttention) for attention in (first, second))
    assert not any(type(module) is Attention for module in vit.modules())
    assert outputs(vit, torch.randn(IMAGE)).shape == softmax.shape


def test_a_block_that_is_used_twice():
    vit = tiny()
    vit.blocks[1] = vit.blocks[0]
    binarize_attention(vit)
    assert vit.blocks[1].attn is vit.blocks[0].attn and len(attention_modules(vit)) == 2


@each_config
def test_what_was_frozen_stays_frozen(fields):
    vit = tiny().requires_grad_(False)
    binarize_attention(vit, config(**fields))
    assert [name for name, p in vit.named_parameters() if p.requires_grad] == []


@each_config
def test_partly_frozen_attention(fields):
    vit = tiny()
    vit.blocks[0].attn.qkv.requires_grad_(False)
    vit.blocks[1].requires_grad_(False)
    vit.blocks[2].attn.proj.bias.requires_grad_(False)
    before = {name: p.requires_grad for name, p in vit.named_parameters()}
    binarize_attention(vit, config(**fields))
    after = {name: p.requires_grad for name, p in vit.named_parameters()}
    assert {name: after[name] for name in before} == before
    # New parts learn where something of the attention that they belong to learns.
    new = {name: flag for name, flag in after.items() if name not in before}
    assert new and all(flag == (".1." not in name.partition("attn")[0]) for name, flag in new.items())


@each_config
def test_hooks_are_kept(fields):
    vit, seen = tiny().eval(), []

    def note(word):
        return lambda *args, **kwargs: seen.append(word)

    attention = vit.blocks[1].attn
    handles = [
        attention.register_forward_hook(note("after")),
        attention.register_forward_pre_hook(note("before"), with_kwargs=True),
        attention.register_full_backward_hook(note("backward")),
        attention.qkv.register_forward_hook(note("qkv"), always_call=True),
        attention.proj.register_forward_pre_hook(note("proj")),
        attention.proj_drop.register_forward_hook(note("drop")),
    ]
    binarize_attention(vit, config(**fields))
    vit(torch.randn(IMAGE)).sum().backward()
    assert seen == ["before", "qkv", "proj", "drop", "after", "backward"]
    for handle in handles:
        handle.remove()
    seen.clear()
    vit(torch.randn(IMAGE)).sum().backward()
    assert seen == [], "the handles that were given out still remove their hooks"


def test_parameters_that_keep_their_size_are_the_same_parameters():
    """An optimizer that already holds them goes on training them."""
    vit = tiny()
    before = dict(vit.named_parameters())
    binarize_attention(vit, config(value_head_dim=None))
    after = dict(vit.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())


@each_config
def test_mode_type_and_device_are_kept(fields):
    vit = tiny().to(torch.float64)
    vit.blocks[0].attn.train(False)
    vit.blocks[1].attn.proj_drop.train(False)
    vit.blocks[1].attn.qkv.train(False)
    vit.blocks[2].to("meta", torch.bfloat16)
    before = {name: module.training for name, module in vit.named_modules()}
    binarize_attention(vit, config(**fields))
    for name, module in vit.named_modules():
        owner = name if name in before else name.partition(".attn")[0] + ".attn"
        assert module.training == before[owner], name
    for name, parameter in vit.named_parameters():
        last = name.startswith("blocks.2.")
        assert parameter.dtype == (torch.bfloat16 if last else torch.float64), name
        assert parameter.device.type == ("meta" if last else "cpu"), name


@each_config
def test_norms_of_queries_and_keys(fields):
    """Kept where they fit, or else made anew, of the same kind."""
    vit = tiny(qk_norm=True, norm_layer=partial(nn.LayerNorm, eps=1e-3))
    norm = vit.blocks[1].attn.k_norm.requires_grad_(False)
    nn.init.constant_(norm.bias, 0.5)
    binarize_attention(vit, config(**fields))
    found, channels = vit.blocks[1].attn.k_norm, fields.get("query_key_head_dim", 64)
    assert (found is norm) == (channels == 64)
    assert type(found) is nn.LayerNorm and found.eps == 1e-3 and found.normalized_shape == (channels,)
    assert not found.weight.requires_grad and vit.blocks[0].attn.k_norm.weight.requires_grad
    assert outputs(vit, torch.randn(IMAGE)).isfinite().all()


class OwnAttention(Attention):
    """Another forward, for all that the conversion knows."""


def gated(attention: Attention) -> None:
    attention.gate = nn.Linear(192, 192)


def normalised(attention: Attention) -> None:
    attention.norm = nn.LayerNorm(192)


def wrapped(attention: Attention) -> None:
    nn.utils.parametrizations.weight_norm(attention.qkv)


def hook_on_the_probabilities(attention: Attention) -> None:
    attention.attn_drop.register_forward_hook(lambda *args: None)


def own_forward(attention: Attention) -> None:
    attention.forward = lambda x, **options: x


def own_class(attention: Attention) -> None:
    attention.__class__ = OwnAttention


REFUSED = [
    (gated, "normalises or gates its output"),
    (normalised, "normalises or gates its output"),
    (wrapped, r"qkv is a ParametrizedLinear, expected torch\.nn\.Linear"),
    (hook_on_the_probabilities, "attn_drop or norm has hooks"),
    (own_forward, "forward of its own"),
    (own_class, "OwnAttention"),
]


@pytest.mark.parametrize(("spoil", "message"), REFUSED, ids=[spoil.__name__ for spoil, _ in REFUSED])
def test_all_or_nothing(spoil, message):
    vit = tiny(attn_drop_rate=0.0).eval()
    spoil(vit.blocks[2].attn)
    modules, x = dict(vit.named_modules()), torch.randn(IMAGE)
    expected = outputs(vit, x)
    with pytest.raises(ValueError, match=rf"blocks\.2\.attn.*{message}"):
        binarize_attention(vit)
    assert all(modules[name] is module for name, module in vit.named_modules())
    assert torch.equal(outputs(vit, x), expected)


def test_attention_dropout_that_the_form_lacks_changes_nothing():
    vit = tiny(attn_drop_rate=0.1)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn.*attn_drop is 0\.1"):
        binarize_attention(vit)
    assert not attention_modules(vit)


@pytest.mark.parametrize("module", [nn.Linear(2, 2), Attention(8, 2)], ids=["linear", "attention alone"])
def test_patching_something_else_is_refused(module):
    with pytest.raises(ValueError, match="holds no attention of timm or transformers"):
        binarize_attention(module)
