"""1-bit attention in models of timm: :class:`BinaryAttention` in place of ``Attention``, and other kinds that keep theirs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import Attention as TimmAttention
from timm.layers import AttentionRope, RelPosBias, RelPosMlp, apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import RelativePositionBias
from timm.models.eva import EvaAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn

from hf_binaryformer.modeling.attention import BinaryAttention
from hf_binaryformer.modeling.attention_core import AttentionCore
from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.plain import is_plain

# Parts that add a number to the score of each pair of tokens.
BIASES = (RelPosAttention, RelPosBias, RelPosMlp, RelativePositionBias)
NO_BIAS = "adds a bias to the score of each pair of tokens, for which products of bits have no place"


class KeptProjections(nn.Module):
    """The forward of timm's attention with rotary positions, separate biases or grouped keys, around 1-bit scores.

    An attention that exists gets one of the subclasses below as its class, and ``core``. It keeps everything else.
    """

    core: AttentionCore

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        shared_rel_pos_bias: Tensor | None = None,
    ) -> Tensor:
        """(B, N, D) -> (B, N, D).

        Raises:
            ValueError: a mask or a bias of the scores is given.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("attention masks are not supported: call without attn_mask and is_causal")
        if shared_rel_pos_bias is not None:
            raise ValueError(f"shared_rel_pos_bias {NO_BIAS}: call without it")
        own: Any = self
        query, key, value = self.project(x)
        query, key = self.through("q_norm", query), self.through("k_norm", key)
        if rope is not None:
            query, key = (self.rotate(t, rope).type_as(value) for t in (query, key))
        if (groups := query.shape[1] // key.shape[1]) > 1:
            key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        out = self.through("norm", self.core(query, key, value).transpose(1, 2).flatten(2))
        if getattr(own, "gate", None) is not None:
            out = out * own.gate(x).sigmoid()
        return own.proj_drop(own.proj(out))

    def through(self, part: str, x: Tensor) -> Tensor:
        """The output of a part for x, or x itself where this kind of attention has no such part."""
        layer = getattr(self, part, None)
        return x if layer is None else layer(x)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value (B, H, N, d), of one projection or of three."""
        own: Any = self
        if own.qkv is None:
            parts = [own.q_proj(x), own.k_proj(x), own.v_proj(x)]
        else:
            qkv = own.qkv(x)
            if getattr(own, "q_bias", None) is not None:
                qkv = qkv + torch.cat((own.q_bias, own.k_bias, own.v_bias)).to(qkv.dtype)
            parts = qkv.chunk(3, dim=-1)
        return tuple(part.unflatten(-1, (-1, self.core.head_dim)).transpose(1, 2) for part in parts)

    def rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        """Queries or keys with rotary positions; tokens before the patches (class, registers) have none."""
        prefix, half = int(getattr(self, "num_prefix_tokens", 0)), bool(getattr(self, "rotate_half", False))
        return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, half=half)], dim=2)


class BinaryEvaAttention(KeptProjections, EvaAttention):
    """Attention of EVA, EVA-02 and timm's DINOv3."""


class BinaryAttentionRope(KeptProjections, AttentionRope):
    """Attention of transformers with rotary positions."""


# BEiT's own forward takes fewer arguments.
class BinaryBeitAttention(KeptProjections, BeitAttention):  # type: ignore[misc]
    """Attention of BEiT with absolute positions."""


KEPT: dict[type[nn.Module], type[KeptProjections]] = {
    EvaAttention: BinaryEvaAttention,
    AttentionRope: BinaryAttentionRope,
    BeitAttention: BinaryBeitAttention,
}


def prepare_timm(old: nn.Module, name: str, config: BinaryFormerConfig) -> Callable[[], nn.Module] | None:
    """Check and build all that is needed; the model changes when the result is called.

    Args:
        old: any module.
        name: its place in the model.
        config: of the new attention.

    Returns:
        What makes the change and returns the module to put in this place. None: this is no attention of timm.

    Raises:
        ValueError: it has a part that has no 1-bit form.
    """
    if isinstance(old, BIASES):
        raise ValueError(f"{name} ({type(old).__name__}) {NO_BIAS}: build the model with absolute or rotary positions")
    if isinstance(old, TimmAttention):
        _check_convertible(old, name)
        new = _binary_form(old, name, config)
        return lambda: new
    if not isinstance(old, tuple(KEPT)):
        return None
    check_class(old, name, tuple(KEPT))
    if getattr(old, "relative_position_bias_table", None) is not None:
        raise ValueError(f"{name}.relative_position_bias_table {NO_BIAS}: build the model with use_rel_pos_bias=False")
    if not is_plain(old.attn_drop, nn.Dropout):  # type: ignore[arg-type]
        raise ValueError(f"{name}.attn_drop has hooks or another class, which would be lost: remove them first")
    core = build_core(old, name, config, _head_dim(old), old.attn_drop.p)  # type: ignore[union-attr, arg-type]

    def change() -> nn.Module:
        old.__class__ = KEPT[type(old)]
        old.core = core
        return old

    return change


def check_class(old: nn.Module, name: str, kinds: tuple[type[nn.Module], ...]) -> None:
    """Raise ValueError for attention with a forward that is not the library's."""
    if type(old) not in kinds or "forward" in vars(old):
        expected = ", ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{name} is a {type(old).__name__} with a forward of its own; expected timm's {expected}")


def build_core(
    old: Any,
    name: str,
    config: BinaryFormerConfig,
    head_dim: int,
    dropout: float,
    kind: type[AttentionCore] = AttentionCore,
) -> AttentionCore:
    """The core for an attention that keeps its projections; learned parts learn if any part of the old one does.

    Raises:
        ValueError: the configuration does not fit the projections.
    """
    parameters = list(old.parameters())
    like = next(p for p in parameters if p.is_floating_point())
    place = {"device": like.device, "dtype": like.dtype}
    heads = getattr(old, "num_heads", None) or old.num_attention_heads
    try:
        core = kind(config, heads, head_dim, dropout, **place)
    except ValueError as error:
        raise ValueError(f"{name} cannot be converted: {error}") from error
    return core.requires_grad_(any(p.requires_grad for p in parameters)).train(old.training)


def _width(old: Any) -> int:
    """Channels of the queries of all heads."""
    return old.num_heads * old.head_dim


def _head_dim(old: Any) -> int:
    """Channels of a head of queries."""
    layer = old.q_proj if old.qkv is None else old.qkv
    return layer.out_features // (old.num_heads * (1 if old.qkv is None else 3))


def _check_convertible(old: TimmAttention, name: str) -> None:
    """Raise ValueError if the attention does, or may do, something that BinaryAttention does not do."""
    check_class(old, name, (TimmAttention,))
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
    if _width(old) != dim or old.proj.out_features != dim:
        raise ValueError(f"{name} maps {dim} to {_width(old)} channels; BinaryAttention needs them equal")


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
    same_bits, same_values = new.query_key_dim == _width(old), new.value_head_dim == old.head_dim
    projections = _width(old)  # rows of each of the old queries, keys and values
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
