"""Puts 1-bit attention into a vision transformer of timm or transformers that exists already."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from hf_binaryformer.modeling.binarize_timm import prepare_timm
from hf_binaryformer.modeling.binarize_transformers import prepare_transformers
from hf_binaryformer.modeling.configuration import BinaryFormerConfig

ViT = TypeVar("ViT", bound=nn.Module)


def binarize_attention(vit: ViT, config: BinaryFormerConfig | None = None) -> ViT:
    """Put 1-bit attention into a vision transformer of timm or transformers, in place.

    | library | attention | becomes |
    | --- | --- | --- |
    | timm | ``Attention``: ViT, DeiT, DINO, DINOv2, CLIP; register tokens, ``qk_norm`` | :class:`BinaryAttention` |
    | timm | ``EvaAttention``, ``AttentionRope``, BEiT's: EVA, EVA-02, DINOv3, rotary ViT | the same with a 1-bit core |
    | transformers | ViT, DeiT, DINOv2 (with registers), DINOv3, BEiT | the same with a 1-bit core |

    Norms of queries and keys and rotary positions come before the sign; gates and norms of the output stay behind it.
    Relative position biases (BEiT's defaults, ``vit_relpos_*``) and masks have no 1-bit form.

    In the first row, query and key projections (and their norms) are kept if ``config.query_key_head_dim`` does not change
    their size, the value and output projections if ``config.value_head_dim`` does not (None does not). Otherwise they are
    initialised anew. In the other rows all parameters are kept, under their names, and both fields must be None.

    What the kept projections then learn depends on the form: with "sign", queries and keys learn through their signs
    (``bit_gradient``); with "hamming", through the networks of the token weights, which are new and start at weight 1.
    A model with softmax weights needs training: its scores are those of signs from the first step on.

    Also kept: attention that blocks share, hooks and their handles, which parameters are frozen, mode, type and device.
    A new part learns if any parameter of the attention before it did. ``save_pretrained`` of transformers saves weights and
    not the form: load such a model, convert it again, and load its ``state_dict``.

    Args:
        vit: a model that holds such attention, with or without weights.
        config: its attention fields, ``query_key_head_dim`` and ``value_head_dim`` are read; sizes come from the model
            itself. None: "hamming" with the full number of value channels.

    Returns:
        The same model.

    Raises:
        ValueError: no such attention is found, or one has a part that has no 1-bit form. The model is then unchanged.

    Example:
        >>> import timm
        >>> vit = binarize_attention(timm.create_model("vit_tiny_patch16_224", pretrained=False))
        >>> from transformers import Dinov2Config, Dinov2Model
        >>> sizes = dict(hidden_size=48, num_attention_heads=3, num_hidden_layers=2, image_size=28)
        >>> sign = BinaryFormerConfig(attention_type="sign", bit_gradient="ternary", value_head_dim=None)
        >>> dino = binarize_attention(Dinov2Model(Dinov2Config(**sizes)), sign)
    """
    config = config or BinaryFormerConfig(value_head_dim=None)
    uses = [(name, module) for name, module in vit.named_modules(remove_duplicate=False) if name]
    # All are prepared before the first one changes the model.
    changes: dict[nn.Module, Callable[[], nn.Module]] = {}
    for name, old in uses:
        if old not in changes:
            change = prepare_timm(old, name, config) or prepare_transformers(old, name, config)
            if change is not None:
                changes[old] = change
    if not changes:
        others = [f"{name} ({type(module).__name__})" for name, module in uses if "Attention" in type(module).__name__]
        found = f"; it holds {', '.join(others[:3])}, which is not known here" if others else ""
        raise ValueError(
            f"{type(vit).__name__} holds no attention of timm or transformers that has a 1-bit form{found}: "
            f"expected one of the kinds that binarize_attention names"
        )
    done = {old: change() for old, change in changes.items()}
    for name, old in uses:
        if old in done and done[old] is not old:
            parent, _, child = name.rpartition(".")
            setattr(vit.get_submodule(parent), child, done[old])
    return vit
