"""Puts 1-bit attention into a timm vision transformer that exists already."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

import torch
from timm.layers import Attention as TimmAttention
from torch import nn

from hf_binaryformer.modeling.attention import BinaryAttention
from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.plain import is_plain

ViT = TypeVar("ViT", bound=nn.Module)


def binarize_attention(vit: ViT, config: BinaryFormerConfig | None = None) -> ViT:
    """Put 1-bit attention into any timm VisionTransformer, in place.

    Query and key projections (and their norms) are kept if ``config.query_key_head_dim`` does not change their size, the
    value and output projections if ``config.value_head_dim`` does not (None does not). Otherwise they are initialised anew.

    Also kept: attention that blocks share, hooks and their handles, which parameters are frozen, mode, type and device.
    A new part learns if any parameter of the attention before it did.

    Args:
        vit: a model whose blocks hold timm's ``Attention``, with or without weights.
        config: its attention fields and ``value_head_dim`` are read; sizes come from the model itself. None: "hamming"
            with the full number of value channels.

    Returns:
        The same model.

    Raises:
        ValueError: no timm ``Attention`` is found, or one has a part that has no 1-bit form. The model is then unchanged.

    Example:
        >>> import timm
        >>> vit = binarize_attention(timm.create_model("vit_tiny_patch16_224", pretrained=False))
    """
    config = config or BinaryFormerConfig(value_head_dim=None)
    everywhere = vit.named_modules(remove_duplicate=False)
    uses = [(name, module) for name, module in everywhere if name and isinstance(module, TimmAttention)]
    if not uses:
        raise ValueError(f"{type(vit).__name__} holds no timm Attention; expected a timm VisionTransformer")
    # All are built before the first one is put into its place.
    built: dict[nn.Module, BinaryAttention] = {}
    for name, old in uses:
        if old not in built:
            _check_convertible(old, name)
            built[old] = _binary_form(old, name, config)
    for name, old in uses:
        parent, _, child = name.rpartition(".")
        setattr(vit.get_submodule(parent), child, built[old])
    return vit


def _check_convertible(old: TimmAttention, name: str) -> None:
    """Raise ValueError if the attention does, or may do, something that BinaryAttention does not do."""
    if type(old) is not TimmAttention or "forward" in vars(old):
        raise ValueError(f"{name} is a {type(old).__name__} with a forward of its own; expected timm's Attention")
    if not isinstance(old.norm, nn.Identity) or getattr(old, "gate", None) is not None:
        raise ValueError(f"{name} normalises or gates its output, which BinaryAttention does not do")
    for part in ("qkv", "proj"):
        layer = getattr(old, part)
        if type(layer) is not nn.Linear or "forward" in vars(layer):
            found = type(layer).__name__
            raise ValueError(f"{name}.{part} is a {found}, expected torch.nn.Linear: merge adapters and wrappers first")
    # BinaryAttention has no module in their place.
    if not (is_plain(old.attn_drop, nn.Dropout) and is_plain(old.norm, nn.Identity)):
        raise ValueError(f"{name}.attn_drop or norm has hooks or another class, which would be lost: remove them first")
    dim = old.qkv.in_features
    if old.attn_dim != dim or old.proj.out_features != dim:
        raise ValueError(f"{name} maps {dim} to {old.attn_dim} channels; BinaryAttention needs them equal")


@torch.no_grad()
def _binary_form(old: TimmAttention, name: str, config: BinaryFormerConfig) -> BinaryAttention:
    """The new attention, which takes over those parts of the old one that fit; the old one is not changed."""
    fits = config.query_key_head_dim in (None, old.head_dim)
    kind: Any = type(old.q_norm)
    eps = getattr(old.q_norm, "eps", None)
    norm_layer: Any = kind if eps is None else partial(kind, eps=eps)
    try:
        new = BinaryAttention(
            old.qkv.in_features,
            old.num_heads,
            qkv_bias=old.qkv.bias is not None,
            qk_norm=kind is not nn.Identity and not fits,
            norm_layer=norm_layer,
            proj_bias=old.proj.bias is not None,
            attn_drop=old.attn_drop.p,
            config=config,
            device=old.qkv.weight.device,
            dtype=old.qkv.weight.dtype,
        ).train(old.training)
    except ValueError as error:
        raise ValueError(f"{name} cannot be converted: {error}") from error
    same_bits, same_values = new.query_key_dim == old.attn_dim, new.value_head_dim == old.head_dim
    projections = old.attn_dim  # rows of each of the old queries, keys and values
    for mine, theirs in ((new.qkv.weight, old.qkv.weight), (new.qkv.bias, old.qkv.bias)):
        if mine is not None and theirs is not None and same_bits:
            mine[: 2 * projections] = theirs[: 2 * projections]
        if mine is not None and theirs is not None and same_values:
            mine[2 * new.query_key_dim :] = theirs[2 * projections :]
    _take_over_state(new, old)
    for part in ("qkv", "proj", "q_norm", "k_norm"):
        _take_over_state(getattr(new, part), getattr(old, part))
    learns = {key: parameter.requires_grad for key, parameter in old.named_parameters()}
    for key, parameter in new.named_parameters():
        parameter.requires_grad_(learns.get(key, any(learns.values())))
    new.proj_drop = old.proj_drop
    if fits:
        new.q_norm, new.k_norm = old.q_norm, old.k_norm
    if same_values:
        new.proj = old.proj
    if same_bits and same_values:
        new.qkv = old.qkv
    return new


def _take_over_state(new: nn.Module, old: nn.Module) -> None:
    """Mode and hooks. The dictionaries of hooks are passed on themselves, because handles remove their hooks from them."""
    new.training = old.training
    vars(new).update({key: value for key, value in vars(old).items() if "hook" in key})
