"""The encoder: timm's vision transformer, built with 1-bit attention or converted to it."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar, cast

import torch
from timm.layers import Attention as TimmAttention
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from hf_binaryformer.modeling.attention import BinaryAttention, SharedAttention
from hf_binaryformer.modeling.configuration import BinaryFormerConfig

ViT = TypeVar("ViT", bound=nn.Module)


def build_encoder(config: BinaryFormerConfig) -> VisionTransformer:
    """Timm's ``VisionTransformer`` of these sizes; parameters keep timm's names, and no weights are loaded."""
    pixels = config.token_type == "pixel"
    vit = VisionTransformer(
        img_size=config.image_shape,
        patch_size=1 if pixels else config.patch_size,
        in_chans=config.num_channels,
        num_classes=0,
        global_pool="",
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        qkv_bias=config.qkv_bias,
        class_token=config.class_token,
        norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
        attn_layer=BinaryAttention.bound_to(config),
        weight_init="skip",
        **({"embed_layer": PixelEmbed, "pos_embed": "none"} if pixels else {"dynamic_img_size": True}),
    )
    if config.share_attention:
        for block in vit.blocks[1:]:
            block.attn = SharedAttention(cast(BinaryAttention, vit.blocks[0].attn))
    return vit


def position_table(vit: VisionTransformer) -> Tensor:
    """Initial position table (1, prefix + N, D): sines and cosines of both patch coordinates, 0 for the class token."""
    table = build_sincos2d_pos_embed(list(vit.patch_embed.grid_size), dim=vit.embed_dim, interleave_sin_cos=True)
    return nn.functional.pad(table, (0, 0, vit.num_prefix_tokens, 0))[None]


class PixelEmbed(nn.Module):
    """Each pixel is a token: its values and its row and column in [-1, 1], projected (paper Appendix B).

    Takes the arguments that timm passes to a patch embedding; (B, C, H, W) -> (B, H W, D).
    """

    def __init__(
        self, img_size: tuple[int, int], in_chans: int, embed_dim: int, bias: bool = True, **unused: Any
    ) -> None:
        super().__init__()
        self.grid_size = tuple(img_size)
        self.num_patches = img_size[0] * img_size[1]
        self.proj = nn.Linear(in_chans + 2, embed_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H W, D)."""
        axes = [torch.linspace(-1, 1, side, dtype=x.dtype, device=x.device) for side in x.shape[2:]]
        position = torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(x.shape[0], -1, -1, -1)
        return self.proj(torch.cat([x, position], dim=1).flatten(2).mT)


def binarize_attention(vit: ViT, config: BinaryFormerConfig | None = None) -> ViT:
    """Put 1-bit attention into any timm VisionTransformer, in place.

    Query and key projections (and their norms) are kept if ``config.query_key_head_dim`` does not change their size, the
    value and output projections if ``config.value_head_dim`` does not (None does not). Otherwise they are initialised anew.

    Args:
        vit: a model whose blocks hold timm's ``Attention``, with or without weights.
        config: its attention fields and ``value_head_dim`` are read; sizes come from the model itself. None: "hamming"
            with the full number of value channels.

    Returns:
        The same model.

    Raises:
        ValueError: no timm ``Attention`` is found, or one has a part that has no 1-bit form.

    Example:
        >>> import timm
        >>> vit = binarize_attention(timm.create_model("vit_tiny_patch16_224", pretrained=False))
    """
    config = config or BinaryFormerConfig(value_head_dim=None)
    owners = [(name, module) for name, module in vit.named_modules() if type(module) is TimmAttention]
    if not owners:
        raise ValueError(f"{type(vit).__name__} holds no timm Attention; expected a timm VisionTransformer")
    for name, old in owners:
        parent, _, child = name.rpartition(".")
        setattr(vit.get_submodule(parent), child, _binary_copy(old, name, config))
    return vit


@torch.no_grad()
def _binary_copy(old: TimmAttention, name: str, config: BinaryFormerConfig) -> BinaryAttention:
    dim = old.qkv.in_features
    if not isinstance(old.norm, nn.Identity) or getattr(old, "gate", None) is not None:
        raise ValueError(f"{name} normalises or gates its output, which BinaryAttention does not do")
    if old.attn_dim != dim or old.proj.out_features != dim:
        raise ValueError(f"{name} maps {dim} to {old.attn_dim} channels; BinaryAttention needs them equal")
    new = BinaryAttention(
        dim,
        old.num_heads,
        qkv_bias=old.qkv.bias is not None,
        proj_bias=old.proj.bias is not None,
        attn_drop=old.attn_drop.p,
        proj_drop=old.proj_drop.p,
        config=config,
        device=old.qkv.weight.device,
        dtype=old.qkv.weight.dtype,
    )
    new.q_norm, new.k_norm = old.q_norm, old.k_norm
    same_values = new.value_head_dim == old.head_dim
    projections = old.attn_dim  # rows of each of the old queries, keys and values
    for mine, theirs in ((new.qkv.weight, old.qkv.weight), (new.qkv.bias, old.qkv.bias)):
        if mine is not None and theirs is not None and new.query_key_dim == projections:
            mine[: 2 * projections] = theirs[: 2 * projections]
        if mine is not None and theirs is not None and same_values:
            mine[2 * new.query_key_dim :] = theirs[2 * projections :]
    if same_values:
        new.proj.load_state_dict(old.proj.state_dict())
    return new.train(old.training)
