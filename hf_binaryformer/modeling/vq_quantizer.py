"""Product quantisation of latents, with codebooks that are moving averages of the encoder's latents (paper A.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# Cluster sizes (moving averages) below this hold no information about where the entry should be.
MIN_CLUSTER_SIZE = 1e-5
# Added to squared distances that are used as sampling weights, because all of them may be 0.
TINY_WEIGHT = 1e-12


class ProductQuantizer(nn.Module):
    """Splits the channels into groups, and replaces each group's vector by the nearest entry of that group's codebook.

    The codebooks are not parameters: entry = moving average of the sum of its latents / moving average of their number.
    The first batch in training mode initialises them by k-means. An entry that is no longer used moves to a badly
    represented latent, and its statistics are reset. Everything is float32, even under autocast and in a model cast to
    half precision. Under ``torch.distributed`` every process holds the same codebooks, computed from the latents of all
    processes.

    Args:
        num_codebooks: number of channel groups K; each position becomes K tokens.
        codebook_size: number of entries V of a codebook; tokens are 0 to V - 1.
        codebook_dim: number of channels c of a group; latents have K * c channels.
        ema_decay: decay of the moving averages, at least 0 and below 1.
        revival_threshold: an entry is dead if the moving average of its number of latents is below this share of the
            fair number (all latents / V). 0 never revives entries.
        kmeans_iterations: Lloyd steps of the initial k-means.
    """

    initialized: Tensor
    codebook: Tensor
    cluster_size: Tensor
    cluster_sum: Tensor
    counts: Tensor

    def __init__(
        self,
        num_codebooks: int,
        codebook_size: int,
        codebook_dim: int,
        ema_decay: float = 0.99,
        revival_threshold: float = 0.03,
        kmeans_iterations: int = 20,
    ) -> None:
        super().__init__()
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay is {ema_decay}, expected at least 0 and below 1")
        if not 0 <= revival_threshold < 1:
            raise ValueError(f"revival_threshold is {revival_threshold}, expected at least 0 and below 1")
        self.num_codebooks, self.codebook_size, self.codebook_dim = num_codebooks, codebook_size, codebook_dim
        self.ema_decay, self.revival_threshold = ema_decay, revival_threshold
        self.kmeans_iterations = kmeans_iterations
        shape = (num_codebooks, codebook_size, codebook_dim)
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self.register_buffer("codebook", torch.randn(shape))
        self.register_buffer("cluster_size", torch.zeros(shape[:2]))
        self.register_buffer("cluster_sum", torch.zeros(shape))
        self.register_buffer("counts", torch.zeros(shape[:2]), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any) -> ProductQuantizer:
        """Apply moves between devices to the codebooks, but not changes of precision."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, *args)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise; in training mode, also update the codebooks.

        Args:
            latents: (B, K * c, d, h, w), any float dtype.

        Returns:
            Quantised latents of the same shape, float32, whose gradient goes straight through to ``latents``; tokens
            (B, K, d, h, w) int64; commitment loss, the mean squared distance of the latents to their entries, scalar.
        """
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            if self.training:
                self._start(latents.detach())
            tokens = self.encode(latents)
            # The losses need the entries that the tokens were chosen from, so the codebooks are updated afterwards.
            quantized = self.decode(tokens)
            commitment = F.mse_loss(latents, quantized)
            if self.training:
                self._follow(self._grouped(latents.detach()), tokens.transpose(0, 1).flatten(1), len(latents))
            return latents + (quantized - latents).detach(), tokens, commitment

    def encode(self, latents: Tensor) -> Tensor:
        """(B, K * c, d, h, w) -> tokens (B, K, d, h, w) int64 of the nearest entries."""
        with torch.autocast(latents.device.type, enabled=False), torch.no_grad():
            nearest, _ = nearest_entries(self._grouped(latents.float()), self.codebook)
        return nearest.unflatten(1, (latents.shape[0], *latents.shape[2:])).transpose(0, 1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (B, K, d, h, w), integers from 0 to V - 1 -> latents (B, K * c, d, h, w) float32.

        Raises:
            ValueError: the number of codebooks is wrong, or tokens are out of range (a mask token for example).
        """
        if tokens.dim() != 5 or tokens.shape[1] != self.num_codebooks:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}, expected (batch, {self.num_codebooks}, d, h, w): one axis "
                f"with a token for each of the {self.num_codebooks} codebooks"
            )
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.codebook_size:
            raise ValueError(
                f"tokens range from {int(tokens.min())} to {int(tokens.max())}, expected 0 to {self.codebook_size - 1}: "
                f"replace mask tokens before decoding"
            )
        books = torch.arange(self.num_codebooks, device=tokens.device)[:, None, None, None]
        entries = self.codebook[books, tokens.long()]  # (B, K, d, h, w, c)
        return entries.movedim(-1, 2).flatten(1, 2)

    @property
    def usage(self) -> Tensor:
        """Share of the entries of each codebook, (K,), that were used in training since :meth:`reset_usage`."""
        return (self.counts > 0).float().mean(1)

    @property
    def perplexity(self) -> Tensor:
        """Exponential of the entropy of the tokens since :meth:`reset_usage`, (K,): V when all are equally frequent."""
        share = self.counts / self.counts.sum(1, keepdim=True).clamp(min=1)
        return torch.special.entr(share).sum(1).exp()

    def reset_usage(self) -> None:
        """Start counting again for :attr:`usage` and :attr:`perplexity`."""
        self.counts.zero_()

    def _grouped(self, latents: Tensor) -> Tensor:
        """(B, K * c, d, h, w) -> (K, B * d * h * w, c)."""
        return (
            latents.unflatten(1, (self.num_codebooks, self.codebook_dim)).movedim(2, -1).transpose(0, 1).flatten(1, 4)
        )

    @torch.no_grad()
    def _start(self, latents: Tensor) -> None:
        """K-means on the first batch of all processes; all of them take the main process's result."""
        if bool(self.initialized):
            return
        vectors = _gather(self._grouped(latents), len(latents))
        self.codebook.copy_(kmeans(vectors, self.codebook_size, self.kmeans_iterations))
        _broadcast(self.codebook)
        fair = vectors.shape[1] / self.codebook_size
        self.cluster_size.fill_(fair)
        self.cluster_sum.copy_(self.codebook * fair)
        self.initialized.fill_(True)

    @torch.no_grad()
    def _follow(self, vectors: Tensor, tokens: Tensor, samples: int) -> None:
        """One step of the moving averages. vectors: (K, N, c) of ``samples`` samples; tokens: (K, N)."""
        counts, sums = cluster_statistics(vectors, tokens, self.codebook_size)
        _all_reduce(counts)
        _all_reduce(sums)
        self.counts += counts
        self.cluster_size.lerp_(counts, 1 - self.ema_decay)
        self.cluster_sum.lerp_(sums, 1 - self.ema_decay)
        alive = (self.cluster_size > MIN_CLUSTER_SIZE)[..., None]
        average = self.cluster_sum / self.cluster_size.clamp(min=MIN_CLUSTER_SIZE)[..., None]
        self.codebook.copy_(torch.where(alive, average, self.codebook))
        self._revive(vectors, samples)

    def _revive(self, vectors: Tensor, samples: int) -> None:
        fair = self.cluster_size.sum(1, keepdim=True) / self.codebook_size
        dead = self.cluster_size < self.revival_threshold * fair  # (K, V); equal in all processes
        if not bool(dead.any()):
            return
        # Latents are drawn in proportion to their error. More entries among many similar ones (background) would stay
        # unused.
        vectors = _gather(vectors, samples)
        _, error = nearest_entries(vectors, self.codebook)
        picked = torch.multinomial(error + TINY_WEIGHT, self.codebook_size, replacement=True)
        candidates = torch.gather(vectors, 1, picked[..., None].expand(-1, -1, self.codebook_dim))
        _broadcast(candidates)
        self.codebook.copy_(torch.where(dead[..., None], candidates, self.codebook))
        # Old statistics would pull the entry back. With the fair number it survives until it has had its chance.
        self.cluster_size.copy_(torch.where(dead, fair, self.cluster_size))
        self.cluster_sum.copy_(torch.where(dead[..., None], candidates * fair[..., None], self.cluster_sum))


def nearest_entries(vectors: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """(K, N, c), (K, V, c) -> indices of the nearest entries and squared distances to them, both (K, N)."""
    distance = codebook.square().sum(-1)[:, None] - 2 * vectors @ codebook.transpose(1, 2)
    least, index = distance.min(-1)
    return index, (least + vectors.square().sum(-1)).clamp(min=0)


def cluster_statistics(vectors: Tensor, index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Number (K, V) and sum (K, V, c) of vectors (K, N, c) that ``index`` (K, N) gives to each of V = size entries."""
    counts = vectors.new_zeros(len(vectors), size).scatter_add_(1, index, torch.ones_like(vectors[..., 0]))
    sums = vectors.new_zeros(len(vectors), size, vectors.shape[-1])
    return counts, sums.scatter_add_(1, index[..., None].expand_as(vectors), vectors)


def kmeans(vectors: Tensor, size: int, iterations: int) -> Tensor:
    """``size`` centres (K, V, c) of vectors (K, N, c), by k-means++ and Lloyd steps.

    Random numbers come from torch's default generator. With fewer different vectors than centres, several centres are
    equal.
    """
    groups = torch.arange(len(vectors), device=vectors.device)
    first = torch.randint(vectors.shape[1], (len(vectors),), device=vectors.device)
    centres = vectors[groups, first][:, None]
    distance = (vectors - centres).square().sum(-1)
    for _ in range(size - 1):
        picked = torch.multinomial(distance + TINY_WEIGHT, 1)[:, 0]
        centre = vectors[groups, picked][:, None]
        centres = torch.cat([centres, centre], dim=1)
        distance = torch.minimum(distance, (vectors - centre).square().sum(-1))
    for _ in range(iterations):
        index, _ = nearest_entries(vectors, centres)
        counts, sums = cluster_statistics(vectors, index, size)
        centres = torch.where(counts[..., None] > 0, sums / counts.clamp(min=1)[..., None], centres)
    return centres


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gather(vectors: Tensor, samples: int) -> Tensor:
    """(K, N, c) of ``samples`` samples in each process, the same number in all -> (K, processes * N, c).

    The order is that of a single process's batch, of which process r of P has samples r, r + P, ... The same random
    draws then pick the same vectors.
    """
    if _world_size() == 1:
        return vectors
    parts = [torch.empty_like(vectors, memory_format=torch.contiguous_format) for _ in range(_world_size())]
    dist.all_gather(parts, vectors.contiguous())
    return torch.stack([part.unflatten(1, (samples, -1)) for part in parts], dim=2).flatten(1, 3)


def _all_reduce(tensor: Tensor) -> None:
    if _world_size() > 1:
        dist.all_reduce(tensor)


def _broadcast(tensor: Tensor) -> None:
    if _world_size() > 1:
        dist.broadcast(tensor, src=0)
