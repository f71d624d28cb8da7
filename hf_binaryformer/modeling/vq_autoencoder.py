"""The vector-quantised autoencoder: volumes to tokens and back (paper 3.2, A.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil
from typing import cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from hf_binaryformer.modeling.gradient_checkpointing import GradientCheckpointing
from hf_binaryformer.modeling.pretrained import DiffusersCheckpointMixin
from hf_binaryformer.modeling.vq_networks import Decoder, Encoder
from hf_binaryformer.modeling.vq_quantizer import ProductQuantizer


@dataclass
class BinaryVQEncoderOutput(BaseOutput):
    """What :meth:`BinaryVQModel.encode` returns.

    Args:
        latents: (B, num_codebooks * codebook_dim, d, h, w) before quantisation.
        tokens: (B, num_codebooks, d, h, w) int64, 0 to codebook_size - 1.
    """

    latents: Tensor
    tokens: Tensor


@dataclass
class BinaryVQDecoderOutput(BaseOutput):
    """What the decoding methods of :class:`BinaryVQModel` return.

    Args:
        sample: (B, in_channels, D, H, W), with intensities on the scale that the model was trained on.
    """

    sample: Tensor


@dataclass
class BinaryVQModelOutput(BaseOutput):
    """What training needs from :class:`BinaryVQModel`.

    Args:
        sample: reconstruction (B, in_channels, D, H, W).
        tokens: (B, num_codebooks, d, h, w) int64; None without quantisation.
        commitment_loss: mean squared distance of the latents to their codebook entries, scalar; 0 without quantisation.
    """

    # Accelerate rebuilds outputs from a dictionary as their first argument, so the others need defaults.
    sample: Tensor
    tokens: Tensor | None = None
    commitment_loss: Tensor | None = None


class BinaryVQModel(GradientCheckpointing, DiffusersCheckpointMixin, ModelMixin, ConfigMixin):
    """Convolutional autoencoder with a product-quantised bottleneck.

    Each latent covers a cell of ``downsample``³ voxels. Strided and transposed convolutions of kernel 2, and residual
    1x1x1 blocks on shuffled voxels, stay within a cell. Only the residual 3x3x3 convolutions look beyond it, by
    ``encoder_reach`` and ``decoder_reach`` voxels. No layer computes statistics over space, so a decoded tile equals
    that part of the decoded volume.

    Axes are (D, H, W) = (I, J, K) of a volume in RAS order; intensities 0 (background) to about 1.

    Args:
        in_channels: channels of a volume.
        num_codebooks, codebook_size, codebook_dim, ema_decay, revival_threshold: see :class:`ProductQuantizer`.
        encoder_channels: channels of each stage, from the volume to the latents; each stage halves the resolution.
        encoder_num_convs: residual 3x3x3 convolutions at half the volume's resolution.
        decoder_channels: channels at the latents, and after each stage; each stage doubles the resolution.
        decoder_num_convs: residual 3x3x3 convolutions at half and at full resolution.
        expansion: hidden channels of the shuffle blocks, as a multiple of their channels.
        patchwise: encode and decode non-overlapping patches separately, as the paper does, with zeros around each.
        patch_size: edge of a patch in latents; only read with ``patchwise``.
        tile_size: edge of a tile of :meth:`tiled_decode` in latents.
        spacing: voxel size in mm, (R, A, S), that volumes are resampled to; None keeps their own.
        percentiles: lower and upper percentile of the intensities that become 0 and 1.
        intensity_ceiling: scaled intensities are clipped to [0, intensity_ceiling].

    Raises:
        ValueError: the numbers of stages differ or are below two, or the shuffle cannot divide the channels.

    Example:
        >>> model = BinaryVQModel(encoder_channels=[8, 16], decoder_channels=[32, 16, 8], num_codebooks=2, codebook_dim=4)
        >>> tokens = model.encode(torch.rand(1, 1, 16, 16, 24)).tokens
        >>> tokens.shape, model.decode(tokens).sample.shape
        (torch.Size([1, 2, 4, 4, 6]), torch.Size([1, 1, 16, 16, 24]))
    """

    # The quantizer stays float32 when diffusers loads the rest in half precision.
    _keep_in_fp32_modules = ["quantizer"]  # noqa: RUF012 (diffusers reads it from the class)

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        num_codebooks: int = 8,
        codebook_size: int = 64,
        codebook_dim: int = 32,
        encoder_channels: Sequence[int] = (32, 64, 128, 256),
        encoder_num_convs: int = 1,
        decoder_channels: Sequence[int] = (1024, 512, 256, 128, 32),
        decoder_num_convs: Sequence[int] = (2, 2),
        expansion: float = 1.0,
        ema_decay: float = 0.99,
        revival_threshold: float = 0.03,
        patchwise: bool = False,
        patch_size: int = 2,
        tile_size: int = 4,
        spacing: Sequence[float] | None = (1.0, 1.0, 1.0),
        percentiles: Sequence[float] = (0.5, 99.5),
        intensity_ceiling: float = 1.5,
    ) -> None:
        super().__init__()
        stages = len(encoder_channels)
        if stages < 2 or len(decoder_channels) != stages + 1:
            raise ValueError(
                f"encoder_channels {list(encoder_channels)} has {stages} stages and decoder_channels "
                f"{list(decoder_channels)} {len(decoder_channels) - 1}; expected the same number, at least 2 "
                f"(decoder_channels begins with the width at the latents)"
            )
        latent_channels = num_codebooks * codebook_dim
        self.encoder = Encoder(in_channels, latent_channels, encoder_channels, encoder_num_convs, expansion)
        self.quantizer = ProductQuantizer(num_codebooks, codebook_size, codebook_dim, ema_decay, revival_threshold)
        self.decoder = Decoder(in_channels, latent_channels, decoder_channels, decoder_num_convs, expansion)

    @property
    def downsample(self) -> int:
        """Edge of a latent's cell in voxels."""
        return 2 ** len(self.config.encoder_channels)

    @property
    def encoder_reach(self) -> int:
        """How many voxels beyond its own cell a token sees."""
        return 2 * self.config.encoder_num_convs

    @property
    def decoder_reach(self) -> int:
        """How many voxels beyond its own cell a latent changes."""
        half, full = self.config.decoder_num_convs
        return 2 * half + full

    def forward(self, x: Tensor, quantize: bool = True, kept_codebooks: Tensor | None = None) -> BinaryVQModelOutput:
        """Reconstruct a volume; in training mode, also move the codebooks towards the latents.

        Args:
            x: (B, in_channels, D, H, W), sizes as for :meth:`encode`.
            quantize: False reconstructs from the continuous latents, to train the convolutions before the codebooks.
            kept_codebooks: (B,) from 1 to num_codebooks: the number of first sub-codebooks that each sample is decoded
                from, with zeros in place of the others. None keeps all. If the number is drawn at random in training
                (nested dropout, Rippel et al., ICML 2014; not in the paper), the first sub-codebooks learn what matters
                most and the last ones learn detail.

        Raises:
            ValueError: as :meth:`encode`.
        """
        latents = self._encode(x)
        if not quantize:
            return BinaryVQModelOutput(self._decode(self._keep(latents, kept_codebooks)), None, latents.new_zeros(()))
        quantized, tokens, commitment = self.quantizer(latents)
        return BinaryVQModelOutput(self._decode(self._keep(quantized, kept_codebooks)), tokens, commitment)

    def _keep(self, latents: Tensor, kept: Tensor | None) -> Tensor:
        """Latents with zeros in all sub-codebooks but the first ``kept`` of each sample."""
        if kept is None:
            return latents
        mask = torch.arange(self.config.num_codebooks, device=latents.device) < kept[:, None]
        return latents * mask.repeat_interleave(self.config.codebook_dim, 1)[:, :, None, None, None]

    def encode(self, x: Tensor) -> BinaryVQEncoderOutput:
        """Volume to tokens.

        Args:
            x: (B, in_channels, D, H, W) float, D, H and W multiples of ``downsample`` (of ``patch_size * downsample``
                with ``patchwise``).

        Raises:
            ValueError: the number of axes or channels is wrong, or sizes are not such multiples.
        """
        latents = self._encode(x)
        return BinaryVQEncoderOutput(latents, self.quantizer.encode(latents))

    def decode(self, tokens: Tensor) -> BinaryVQDecoderOutput:
        """Tokens (B, num_codebooks, d, h, w) to a volume.

        Raises:
            ValueError: see :meth:`ProductQuantizer.decode`; with ``patchwise``, also for sizes that are not multiples
                of ``patch_size``.
        """
        return self.decode_latents(self.quantizer.decode(tokens))

    def decode_latents(self, latents: Tensor) -> BinaryVQDecoderOutput:
        """Quantised latents (B, num_codebooks * codebook_dim, d, h, w) to a volume."""
        return BinaryVQDecoderOutput(self._decode(latents))

    def tiled_decode(self, tokens: Tensor, tile_size: int | None = None) -> BinaryVQDecoderOutput:
        """:meth:`decode` in tiles: the same values, with the memory of one tile and its halo.

        Args:
            tokens: (B, num_codebooks, d, h, w).
            tile_size: edge of a tile in latents, at least 1; None takes the configuration's. With ``patchwise`` it must
                be a multiple of ``patch_size``.

        Raises:
            ValueError: as :meth:`decode`, or a tile would cut through patches.
        """
        edge = tile_size or self.config.tile_size
        if edge < 1 or (self.config.patchwise and edge % self.config.patch_size):
            raise ValueError(
                f"tile_size is {edge}, expected at least 1"
                + (f" and a multiple of patch_size {self.config.patch_size}" if self.config.patchwise else "")
            )
        halo = 0 if self.config.patchwise else ceil(self.decoder_reach / self.downsample)
        size, cell = tokens.shape[2:], self.downsample
        if tokens.dim() != 5 or 0 in size:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}, expected five axes and none empty")
        sample: Tensor | None = None
        for corner in product(*(range(0, n, edge) for n in size)):
            read, keep, place = [slice(None)] * 2, [slice(None)] * 2, [slice(None)] * 2
            for start, n in zip(corner, size, strict=True):
                stop, first = min(start + edge, n), max(start - halo, 0)
                read.append(slice(first, min(stop + halo, n)))
                keep.append(slice((start - first) * cell, (stop - first) * cell))
                place.append(slice(start * cell, stop * cell))
            part = self.decode(tokens[tuple(read)]).sample
            if sample is None:
                sample = part.new_empty(*part.shape[:2], *(n * cell for n in size))
            sample[tuple(place)] = part[tuple(keep)]
        return BinaryVQDecoderOutput(cast(Tensor, sample))

    def _encode(self, x: Tensor) -> Tensor:
        channels, multiple = self.config.in_channels, self.downsample
        if self.config.patchwise:
            multiple *= self.config.patch_size
        if x.dim() != 5 or x.shape[1] != channels or any(n < 1 or n % multiple for n in x.shape[2:]):
            raise ValueError(
                f"volume has shape {tuple(x.shape)}, expected (batch, {channels}, D, H, W) with D, H and W multiples of "
                f"{multiple}: pad it"
            )
        return self._in_patches(self.encoder, x, multiple)

    def _decode(self, latents: Tensor) -> Tensor:
        edge = self.config.patch_size
        if self.config.patchwise and any(n % edge for n in latents.shape[2:]):
            raise ValueError(
                f"latents have size {tuple(latents.shape[2:])}, expected multiples of patch_size {edge}: pad the volume"
            )
        return self._in_patches(self.decoder, latents.to(self.dtype), edge)

    def _in_patches(self, network: Callable[[Tensor], Tensor], x: Tensor, edge: int) -> Tensor:
        """Run a network on the whole input, or with ``patchwise`` separately on each patch with this edge."""
        if not self.config.patchwise:
            return network(x)
        batch, _, *size = x.shape
        grid = [n // edge for n in size]
        x = x.unflatten(4, (-1, edge)).unflatten(3, (-1, edge)).unflatten(2, (-1, edge))
        x = network(x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(0, 3))  # (B * patches, C, edge, edge, edge)
        x = x.unflatten(0, (batch, *grid)).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
