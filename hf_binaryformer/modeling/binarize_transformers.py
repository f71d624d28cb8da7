"""1-bit attention in models of transformers, through its interface for attention functions.

Each attention keeps its class, its projections and all that it does before the scores (rotary positions) and after them.
It gets ``core``, and a configuration of its own that names the function below. What the whole model is set to (``sdpa``,
``eager``) no longer reaches it, so nothing turns its scores back into softmax scores.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from hf_binaryformer.modeling.attention_core import AttentionCore
from hf_binaryformer.modeling.binarize_timm import NO_BIAS, build_core
from hf_binaryformer.modeling.configuration import BinaryFormerConfig

IMPLEMENTATION = "hf_binaryformer"
# Classes that call the attention interface and do no more than the tests compare with their formulas.
KINDS = {
    "BeitAttention",
    "DeiTAttention",
    "DINOv3ViTAttention",
    "Dinov2Attention",
    "Dinov2SelfAttention",
    "Dinov2WithRegistersAttention",
    "Dinov2WithRegistersSelfAttention",
    "ViTAttention",
}


class InterfaceCore(AttentionCore):
    """The core of an attention of transformers. It is defined here, so that unpickling one registers the function."""


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """What transformers calls: query, key, value (B, H, N, d) -> (B, N, H, d), and no probabilities.

    Raises:
        ValueError: a mask is given, or the probabilities are asked for.
    """
    if attention_mask is not None or options.get("is_causal"):
        raise ValueError("attention masks are not supported: call without attention_mask")
    if options.get("output_attentions"):
        raise ValueError("1-bit attention keeps no probabilities: call without output_attentions")
    return module.core(query, key, value).transpose(1, 2), None  # type: ignore[operator]


AttentionInterface.register(IMPLEMENTATION, attend)


def prepare_transformers(old: nn.Module, name: str, config: BinaryFormerConfig) -> Callable[[], nn.Module] | None:
    """As :func:`hf_binaryformer.modeling.binarize_timm.prepare_timm`, for attention of transformers."""
    kind, module = type(old).__name__, type(old).__module__
    # In older versions Dinov2Attention is what holds the attention.
    if kind not in KINDS or not module.startswith("transformers.models.") or not hasattr(old, "scaling"):
        return None
    if "forward" in vars(old):
        raise ValueError(f"{name} is a {kind} with a forward of its own; expected that of transformers")
    if hasattr(old, "core"):
        raise ValueError(f"{name} is 1-bit attention already: convert a model once")
    own: Any = old
    for field in ("use_relative_position_bias", "use_shared_relative_position_bias"):
        if getattr(own.config, field, False):
            raise ValueError(f"{name}: config.{field} {NO_BIAS}: build the model with {field}=False")
    head_dim = getattr(own, "head_dim", None) or own.attention_head_size
    dropouts = (getattr(own, field, None) for field in ("attention_dropout", "dropout", "dropout_prob"))
    core = build_core(
        old, name, config, head_dim, next(p for p in dropouts if isinstance(p, float | int)), InterfaceCore
    )
    settings = copy.deepcopy(own.config)
    settings._attn_implementation = IMPLEMENTATION

    def change() -> nn.Module:
        own.core, own.config = core, settings
        return old

    return change
