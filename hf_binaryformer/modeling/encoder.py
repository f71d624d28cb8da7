"""The encoder: timm's vision transformer, built with 1-bit attention."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from hf_binaryformer.modeling.attention import BinaryAttention, SharedAttention
from hf_binaryformer.modeling.configuration import BinaryFormerConfig


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
