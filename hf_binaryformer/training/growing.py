"""A larger network that begins with what a smaller one has learned (Net2Net: Chen, Goodfellow, Shlens, ICLR 2016).

Channels are copied, and what reads them is divided by the number of copies; new blocks add 0 to the tokens. The larger network
computes at first what the smaller one does, exactly where widths are multiples of the smaller ones. Where they are not, some
channels have one copy more than others, and group normalisation sees slightly other means.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import typer
from torch import Tensor, nn

from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.networks import BinaryFormerForSemanticSegmentation

# What both networks must have in common: all else than sizes, and what runs beside the tokens.
SAME = (
    "attention_type",
    "bit_gradient",
    "query_key_centering",
    "query_key_norm",
    "learned_logit_scale",
    "logit_scale",
    "num_heads",
    "patch_size",
    "image_size",
    "num_channels",
    "class_token",
    "decoder_num_convs",
    "decoder_image_skip",
    "id2label",
)


def grow_weights(name: str, config: BinaryFormerConfig, noise: float) -> BinaryFormerForSemanticSegmentation:
    """A network that computes what a smaller one does.

    Args:
        name: of the smaller one: short name, folder or Hub id.
        config: of the network; none of its widths is smaller, and all heads have learned scales.
        noise: normal noise on each matrix, as a share of the deviation of its weights. Without it, copies would get
            equal gradients and stay equal.

    Raises:
        CheckpointNotFoundError, CheckpointError: as for ``from_pretrained``.
        typer.BadParameter: the networks differ in more than sizes, or the new one is smaller.
    """
    old = BinaryFormerForSemanticSegmentation.from_pretrained(name, dtype=torch.float32)
    for field in SAME:
        if getattr(old.config, field) != getattr(config, field):
            theirs, mine = getattr(old.config, field), getattr(config, field)
            raise typer.BadParameter(f"grow_from={name}: {field} is {mine}, but {theirs} in that network")
    if config.attention_type != "sign" or not config.learned_logit_scale:
        raise typer.BadParameter("grow_from needs attention_type sign and learned_logit_scale true")
    model = BinaryFormerForSemanticSegmentation(config)
    with torch.no_grad():
        grow_encoder(model.binaryformer.encoder, old.binaryformer.encoder)
        # The shuffle blocks take channels by fours, as four pixels. All widths are multiples of 4, so whole fours are copied.
        for mine, theirs in zip(model.decoder.modules(), old.decoder.modules(), strict=True):
            if hasattr(theirs, "weight"):
                widen(mine, theirs)
        for matrix in (p for p in model.parameters() if p.dim() > 1):
            matrix.add_(noise * matrix.std() * torch.randn_like(matrix))
    return model


def grow_encoder(new: Any, old: Any) -> None:
    """Old blocks are spread evenly over the new encoder; those between add 0."""
    widen(new.patch_embed.proj, old.patch_embed.proj)
    widen(new.norm, old.norm)
    tokens = copies(old.embed_dim, new.embed_dim)
    for name in ("pos_embed", "cls_token"):
        if getattr(old, name) is not None:
            getattr(new, name).copy_(getattr(old, name)[..., tokens])
    if len(new.blocks) < len(old.blocks):
        raise typer.BadParameter(f"grow_from: {len(new.blocks)} blocks, but {len(old.blocks)} in the smaller network")
    source = {number * len(new.blocks) // len(old.blocks): block for number, block in enumerate(old.blocks)}
    for number, block in enumerate(new.blocks):
        if number in source:
            grow_block(block, source[number])
        else:
            for layer in (block.attn.proj, block.mlp.fc2):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)


def grow_block(new: Any, old: Any) -> None:
    """A block with more channels, and as many heads, with more bits and values each."""
    mine, theirs = new.attn, old.attn
    heads = torch.arange(theirs.num_heads)[:, None]
    bits = (heads * theirs.head_dim + copies(theirs.head_dim, mine.head_dim)).flatten()
    values = (heads * theirs.value_head_dim + copies(theirs.value_head_dim, mine.value_head_dim)).flatten()
    total = theirs.query_key_dim
    widen(mine.qkv, theirs.qkv, outputs=torch.cat([bits, total + bits, 2 * total + values]))
    widen(mine.proj, theirs.proj, inputs=values)
    # The sum over bits grows with their number, its fixed scale falls with the root of it.
    mine.log_scale.copy_(theirs.log_scale - 0.5 * math.log(mine.head_dim / theirs.head_dim))
    for layer in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
        widen(new.get_submodule(layer), old.get_submodule(layer))


def widen(new: Any, old: Any, outputs: Tensor | None = None, inputs: Tensor | None = None) -> None:
    """Copy a layer's weights, or a normalisation's.

    Args:
        new: the layer that is written.
        old: what it copies; no larger.
        outputs, inputs: which old output, or input, each new one is a copy of; None: :func:`copies`.
    """
    weight: Tensor = old.weight
    across = 1 if isinstance(old, nn.ConvTranspose2d) else 0  # the outputs' axis; the inputs' is the other one
    outputs = copies(weight.shape[across], new.weight.shape[across]) if outputs is None else outputs
    if weight.dim() > 1:
        along = 1 - across
        inputs = copies(weight.shape[along], new.weight.shape[along]) if inputs is None else inputs
        share = torch.bincount(inputs)[inputs].view([-1 if axis == along else 1 for axis in range(weight.dim())])
        weight = weight.index_select(along, inputs) / share
    new.weight.copy_(weight.index_select(across, outputs))
    if new.bias is not None:
        new.bias.copy_(old.bias[outputs])


def copies(old: int, new: int) -> Tensor:
    """Which of the old channels each new one is a copy of: (new,) int64.

    Raises:
        typer.BadParameter: there are fewer new ones.
    """
    if new < old:
        raise typer.BadParameter(f"grow_from: {new} channels where the smaller network has {old}")
    return torch.arange(new) % old
