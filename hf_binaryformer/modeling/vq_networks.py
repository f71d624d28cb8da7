"""Convolutional encoder and decoder of the vector-quantised autoencoder, made of 3D pixel shuffles (paper A.2).

Strided and transposed convolutions of kernel 2, and residual 1x1x1 convolutions on shuffled voxels, stay within a latent's
cell. Only the residual 3x3x3 convolutions look beyond it. No layer computes statistics over space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stages(nn.Sequential):
    """Stages in sequence. With ``gradient_checkpointing`` each recomputes its activations for its gradient."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """Output of the last stage."""
        for stage in self:
            again = self.gradient_checkpointing and torch.is_grad_enabled()
            x = self._gradient_checkpointing_func(stage, x) if again else stage(x)
        return x


class Encoder(nn.Module):
    """Stages of (strided convolution, residual block), and a 1x1x1 convolution to the latents' channels."""

    def __init__(
        self, in_channels: int, latent_channels: int, channels: Sequence[int], num_convs: int, expansion: float
    ) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for stage, width in enumerate(channels):
            stages.append(nn.Conv3d(in_channels, width, 2, stride=2))
            if stage == 0:
                stages += [ResidualConv3d(width) for _ in range(num_convs)]
            # Latents never mix: the last block stays within one latent.
            stages.append(UnshuffleBlock3d(width, expansion, 2 if stage < len(channels) - 1 else 1))
            in_channels = width
        self.stages = Stages(*stages)
        self.project = nn.Conv3d(in_channels, latent_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) -> (B, latent_channels, d, h, w)."""
        return self.project(self.stages(x.to(memory_format=torch.channels_last_3d)))


class Decoder(nn.Module):
    """1x1x1 convolution, stages of (transposed convolution x2, residual shuffle blocks), 3x3x3 convolutions, head.

    The shuffle blocks mix only within a cell of 2x2x2 voxels. The residual 3x3x3 convolutions are at half and at full
    resolution.
    """

    def __init__(
        self,
        out_channels: int,
        latent_channels: int,
        channels: Sequence[int],
        num_convs: Sequence[int],
        expansion: float,
    ) -> None:
        super().__init__()
        self.expand = nn.Conv3d(latent_channels, channels[0], 1)
        stages: list[nn.Module] = []
        for stage, (before, width) in enumerate(pairwise(channels)):
            to_come = len(channels) - 2 - stage
            stages += [nn.GELU(), nn.ConvTranspose3d(before, width, 2, stride=2), UnshuffleBlock3d(width, expansion)]
            # The last stage has none: it would work at twice the volume's resolution, where there is nothing to learn.
            if to_come > 0:
                stages.append(ShuffleBlock3d(width))
            if to_come < 2:
                stages += [ResidualConv3d(width) for _ in range(num_convs[1 - to_come])]
        self.stages = Stages(*stages)
        self.head = nn.Conv3d(channels[-1], out_channels, 1)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, latent_channels, d, h, w) -> (B, C, D, H, W)."""
        return self.head(self.stages(self.expand(latents.to(memory_format=torch.channels_last_3d))))


class UnshuffleBlock3d(nn.Module):
    """Residual 1x1x1 convolutions over the combined channels of ``factor``³ voxels."""

    def __init__(self, channels: int, expansion: float, factor: int = 2) -> None:
        super().__init__()
        hidden = int(channels * expansion)
        self.factor = factor
        self.norm = nn.LayerNorm(channels * factor**3)
        self.fc1 = nn.Linear(channels * factor**3, hidden)
        self.fc2 = nn.Linear(hidden, channels * factor**3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) -> (B, C, D, H, W), sizes multiples of ``factor``."""
        y = pixel_unshuffle_3d(x, self.factor).movedim(1, -1)
        return x + pixel_shuffle_3d(self.fc2(F.gelu(self.fc1(self.norm(y)))).movedim(-1, 1), self.factor)


class ShuffleBlock3d(nn.Module):
    """Residual 1x1x1 convolutions at twice the resolution, on an eighth of the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels % 8:
            raise ValueError(f"a stage has {channels} channels; a 3D pixel shuffle needs a multiple of 8")
        self.fc1 = nn.Linear(channels // 8, channels // 4)
        self.fc2 = nn.Linear(channels // 4, channels // 8)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) -> (B, C, D, H, W)."""
        y = pixel_shuffle_3d(x, 2).movedim(1, -1)
        return x + pixel_unshuffle_3d(self.fc2(F.gelu(self.fc1(y))).movedim(-1, 1), 2)


class ResidualConv3d(nn.Module):
    """Residual 3x3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) -> (B, C, D, H, W)."""
        return x + self.conv(F.gelu(x))


def pixel_unshuffle_3d(x: Tensor, factor: int) -> Tensor:
    """Each cube of ``factor``³ voxels becomes channels: (B, C, D, H, W) -> (B, factor³ * C, D / factor, ...).

    Channel ``offset * C + c`` is channel c of the voxel at ``offset`` (i, j, k; k fastest) in its cube. Channels are
    last in memory here, so this order copies runs of C values. Torch's order for 2D scatters them and is several times
    slower.
    """
    if factor == 1:
        return x
    y = x.movedim(1, -1).unflatten(3, (-1, factor)).unflatten(2, (-1, factor)).unflatten(1, (-1, factor))
    return y.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4).movedim(-1, 1)


def pixel_shuffle_3d(x: Tensor, factor: int) -> Tensor:
    """Inverse of :func:`pixel_unshuffle_3d`: (B, factor³ * C, D, H, W) -> (B, C, D * factor, ...)."""
    if factor == 1:
        return x
    y = x.movedim(1, -1).unflatten(-1, (factor, factor, factor, -1))
    return y.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(5, 6).flatten(3, 4).flatten(1, 2).movedim(-1, 1)
