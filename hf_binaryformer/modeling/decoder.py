"""The convolutional decoder from tokens back to pixels (paper A.1)."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.plain import is_plain


class SegmentationDecoder(nn.Module):
    """1x1 convolution, stages of (transposed convolution x2, residual shuffle blocks), 3x3 convolutions, output head.

    Channels: hidden_size -> decoder_hidden_size, halved at each of log2(patch_size) stages. The shuffle blocks mix
    channels only within a small block of pixels, so that context is left to the transformer. Only the residual 3x3
    convolutions at the last resolution look beyond such a block.

    Raises:
        ValueError: the patch size is not a power of two, or the channels cannot be halved that often.
    """

    def __init__(self, config: BinaryFormerConfig) -> None:
        super().__init__()
        stages = int(math.log2(config.patch_size))
        if 2**stages != config.patch_size:
            raise ValueError(
                f"patch_size is {config.patch_size}; the decoder doubles the resolution: use a power of two"
            )
        # The finest shuffle works on a quarter of the last stage's channels.
        if config.decoder_hidden_size % 2 ** (stages + 2):
            raise ValueError(
                f"decoder_hidden_size {config.decoder_hidden_size} must be divisible by {2 ** (stages + 2)}"
            )
        channels = config.decoder_hidden_size
        self.expand = nn.Conv2d(config.hidden_size, channels, 1)
        self.stages = nn.ModuleList()
        for _ in range(stages):
            channels //= 2
            self.stages.append(
                nn.Sequential(
                    nn.ConvTranspose2d(2 * channels, channels, 2, stride=2),
                    UnshuffleBlock(channels, config.decoder_expansion),
                    ShuffleBlock(channels),
                )
            )
        self.image_skip = nn.Conv2d(config.num_channels, channels, 3, padding=1) if config.decoder_image_skip else None
        self.convs = nn.ModuleList(ResidualConv(channels) for _ in range(config.decoder_num_convs))
        self.head = nn.Conv2d(channels, cast(int, config.num_labels), 1)

    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        """(B, D, h, w) grid of tokens and (B, C, H, W) image, which only the skip reads -> (B, num_labels, H, W) logits."""
        x = self.expand(tokens)
        for stage in self.stages:
            x = stage(F.gelu(x))
        if self.image_skip is not None:
            if is_channels_last(x):  # a sum of two memory formats is slow
                image = image.contiguous(memory_format=torch.channels_last)
            x = x + self.image_skip(image)
        for conv in self.convs:
            x = conv(x)
        return self.head(x)


class UnshuffleBlock(nn.Module):
    """Residual 1x1 convolutions over the combined channels of 2x2 pixels.

    The channels are in torch's order, (C, 2, 2). The 3D networks (:mod:`hf_binaryformer.modeling.vq_networks`) use another
    one, (2, 2, 2, C), because their tensors are channels-last in memory. Saved weights fix both orders.
    """

    def __init__(self, channels: int, expansion: float) -> None:
        super().__init__()
        hidden = int(channels * expansion)
        self.norm = nn.GroupNorm(1, channels)
        self.fc1 = nn.Conv2d(4 * channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, 4 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), H and W even."""
        y = self.norm(x)
        if is_plain(self.fc1, nn.Conv2d):
            # Equal to fc1(pixel_unshuffle(y, 2)), whose channels are (C, 2, 2), without moving pixels.
            hidden = F.conv2d(y, self.fc1.weight.view(-1, x.shape[1], 2, 2), self.fc1.bias, stride=2)
        else:
            hidden = self.fc1(F.pixel_unshuffle(y, 2))
        return x + F.pixel_shuffle(self.fc2(F.gelu(hidden)), 2)


class ShuffleBlock(nn.Module):
    """Residual 1x1 convolutions at twice the resolution, on a quarter of the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels // 4, channels // 2, 1)
        self.fc2 = nn.Conv2d(channels // 2, channels // 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), C a multiple of 4."""
        plain = is_plain(self.fc1, nn.Conv2d) and is_plain(self.fc2, nn.Conv2d)
        if plain and is_channels_last(x) and x.dtype != torch.float32:
            # Four times the products, but no pixel moves in memory: faster, unless products are as slow as in float32.
            return x + _on_each_of_four(F.gelu(_on_each_of_four(x, self.fc1)), self.fc2)
        # The layers map each of the 2x2 pixels that pixel_shuffle(x, 2) makes of one pixel in the same way, so their
        # arrangement does not matter. A reshape that stacks them along the height is enough.
        pixels = x.reshape(x.shape[0], x.shape[1] // 4, -1, x.shape[3])
        return x + self.fc2(F.gelu(self.fc1(pixels))).reshape(x.shape)


def _on_each_of_four(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """pixel_unshuffle(layer(pixel_shuffle(x, 2)), 2) of a 1x1 convolution: (B, 4 C, H, W) -> (B, 4 C', H, W)."""
    weight = torch.kron(layer.weight[..., 0, 0], torch.eye(4, dtype=layer.weight.dtype, device=layer.weight.device))
    bias = None if layer.bias is None else layer.bias.repeat_interleave(4)
    return F.conv2d(x, weight[..., None, None], bias)


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of (B, C, H, W) lie together in memory, and the pixels do not."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class ResidualConv(nn.Module):
    """Residual 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + self.conv(F.gelu(self.norm(x)))
