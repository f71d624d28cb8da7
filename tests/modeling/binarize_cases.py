"""Small models of timm and transformers with random weights, and their 1-bit attention by its plain formula."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
import transformers
from timm.layers import AttentionRope
from timm.models.beit import Beit
from timm.models.eva import Eva
from torch import Tensor, nn

from hf_binaryformer.modeling.attention import BinaryAttention
from hf_binaryformer.modeling.attention_core import AttentionCore
from hf_binaryformer.modeling.configuration import BinaryFormerConfig

SIGN = {"attention_type": "sign", "bit_gradient": "ste", "value_head_dim": None}
SIZES = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
TIMM = {"img_size": 32, "patch_size": 8, **SIZES}
ROTARY = {"use_rot_pos_emb": True, "use_abs_pos_emb": False}
NORM = partial(nn.LayerNorm, eps=1e-3)
HUGGING = {
    "hidden_size": 48,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


def named(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, **{**SIZES, **options})


def eva(**options: Any) -> Callable[[], nn.Module]:
    return lambda: Eva(**TIMM, **options)


def grouped_and_gated() -> nn.Module:
    """Two heads of queries share one of keys and values; a norm and a gate follow, and the heads are wider than the tokens."""
    model = Eva(**TIMM, **ROTARY, rope_rotate_half=True)
    for block in model.blocks:
        options = {"qkv_fused": False, "num_kv_heads": 2, "gated": True, "scale_norm": True, "norm_layer": NORM}
        block.attn = AttentionRope(48, 4, attn_head_dim=16, num_prefix_tokens=1, rotate_half=True, **options)
    return model


def hugging(kind: str, **fields: Any) -> Callable[[], nn.Module]:
    """A model of transformers: its configuration and its class."""

    def build() -> nn.Module:
        config = getattr(transformers, f"{kind}Config")(**HUGGING, **fields)
        return getattr(transformers, f"{kind}Model")(config)

    return build


TIMM_MODELS = {
    "vit registers": named("vit_small_patch14_reg4_dinov2", img_size=32, patch_size=8),
    "vit qk_norm": named("vit_tiny_patch16_224", img_size=32, patch_size=8, qk_norm=True, norm_layer=NORM),
    "eva": eva(),
    "eva02": named("eva02_tiny_patch14_224", img_size=32, patch_size=8),
    "eva02 separate": named("eva02_base_patch14_224", img_size=32, patch_size=8),
    "dinov3": named("vit_small_patch16_dinov3", img_size=32, patch_size=8),
    "eva qk_norm": eva(qk_norm=True, norm_layer=NORM, qkv_bias=False, **ROTARY),
    "rope mixed": named("vit_small_patch16_rope_mixed_224", img_size=32, patch_size=8),
    "rope qk_norm": eva(attn_type="rope", qk_norm=True, norm_layer=NORM, num_reg_tokens=2, **ROTARY),
    "rope grouped gated": grouped_and_gated,
    "beit absolute": lambda: Beit(**TIMM, use_abs_pos_emb=True),
}
HUGGING_MODELS = {
    "vit": hugging("ViT"),
    "deit": hugging("DeiT"),
    "dinov2": hugging("Dinov2"),
    "dinov2 registers": hugging("Dinov2WithRegisters"),
    "dinov3": hugging("DINOv3ViT", num_register_tokens=2, key_bias=False),
    "beit absolute": hugging("Beit", use_absolute_position_embeddings=True),
}
MODELS = {
    **{f"timm {name}": build for name, build in TIMM_MODELS.items()},
    **{f"transformers {name}": build for name, build in HUGGING_MODELS.items()},
}


def random_model(name: str) -> nn.Module:
    """The model in double precision: no score is near enough to 0 for rounding to turn a sign."""
    torch.manual_seed(4)
    model = MODELS[name]().double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def image() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def run(model: nn.Module) -> Tensor:
    """What the model makes of the image: timm's output, or the tokens of a model of transformers."""
    out = model(image())
    return out if isinstance(out, Tensor) else out.last_hidden_state


def config(**fields: Any) -> BinaryFormerConfig:
    return BinaryFormerConfig(**{**SIGN, **fields})


def binary_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that computes 1-bit attention from tokens, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BinaryAttention) or isinstance(getattr(module, "core", None), AttentionCore)
    }


def observed(model: nn.Module) -> dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]]:
    """Arguments and output of each attention in a run of the model."""
    seen: dict[str, Any] = {}
    hooks = [
        module.register_forward_hook(
            lambda _, args, options, out, name=name: seen.update({name: (args, options, out)}), with_kwargs=True
        )
        for name, module in binary_modules(model).items()
    ]
    with torch.no_grad():
        run(model)
    for hook in hooks:
        hook.remove()
    return seen


def plain_attention(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """softmax(sgn q . sgn k / sqrt d) v of the module's own weights, with norms and rotations before the sign."""
    x = args[0] if args else options["hidden_states"]
    query, key, value, heads = projections(module, x)
    query, key = (layer_norm(t, getattr(module, f"{side}_norm", None)) for side, t in (("q", query), ("k", key)))
    if (rope := options.get("rope")) is not None:
        sin, cos = rope.split(rope.shape[-1] // 2, -1)
        query, key = (turned(t, cos, sin, module.rotate_half) for t in (query, key))
    if (positions := options.get("position_embeddings")) is not None:
        query, key = (turned(t, *positions, halves=True) for t in (query, key))
    outputs = []
    for head in range(heads):
        group = head * key.shape[1] // heads
        signs = [torch.where(t >= 0, 1.0, -1.0).double() for t in (query[:, head], key[:, group])]
        scores = torch.einsum("bid,bjd->bij", *signs) / query.shape[-1] ** 0.5
        outputs.append(scores.softmax(-1) @ value[:, group])
    out = layer_norm(torch.cat(outputs, -1), getattr(module, "norm", None))
    if getattr(module, "gate", None) is not None:
        out = out * linear(x, module.gate).sigmoid()
    last = [getattr(module, name) for name in ("proj", "o_proj") if hasattr(module, name)]
    return linear(out, last[0]) if last else out


def projections(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Query, key and value (B, H, N, d), and the number of query heads."""
    heads = getattr(module, "num_heads", None) or module.num_attention_heads
    if getattr(module, "qkv", None) is not None:
        width = module.qkv.weight.shape[0] // 3
        parts = [x @ w.T for w in module.qkv.weight.split(width)]
        if module.qkv.bias is not None:
            parts = [p + b for p, b in zip(parts, module.qkv.bias.split(width), strict=True)]
        if getattr(module, "q_bias", None) is not None:
            parts = [parts[0] + module.q_bias, parts[1], parts[2] + module.v_bias]
    else:
        names = ("q_proj", "k_proj", "v_proj") if hasattr(module, "q_proj") else ("query", "key", "value")
        parts = [linear(x, getattr(module, name)) for name in names]
    d = parts[0].shape[-1] // heads
    return *(p.reshape(*x.shape[:2], -1, d).permute(0, 2, 1, 3) for p in parts), heads


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def layer_norm(x: Tensor, layer: nn.Module | None) -> Tensor:
    if layer is None or isinstance(layer, nn.Identity):
        return x
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def turned(x: Tensor, cos: Tensor, sin: Tensor, halves: bool) -> Tensor:
    """The last tokens of x, as many as there are angles, as complex numbers times exp(i angle).

    A number is made of channels i and i + d / 2 (halves), or of neighbours.
    """
    first = x.shape[2] - cos.shape[-2]
    out, d = x.clone(), x.shape[-1]
    real, imaginary = (slice(0, d // 2), slice(d // 2, d)) if halves else (slice(0, d, 2), slice(1, d, 2))
    numbers = torch.complex(x[:, :, first:, real].contiguous(), x[:, :, first:, imaginary].contiguous())
    numbers = numbers * torch.complex(cos[..., real].contiguous(), sin[..., real].contiguous())
    out[:, :, first:, real], out[:, :, first:, imaginary] = numbers.real, numbers.imag
    return out
