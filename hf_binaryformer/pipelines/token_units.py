"""Which tokens of a grid are masked and drawn together, in which order, and from which random numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# One base for each grid axis, and one for the codebook, which is used if tokens are masked individually.
HALTON_BASES = (2, 3, 5, 7)
# With this number of points per unit, hardly any cell of the grid has no point.
HALTON_POINTS_PER_UNIT = 16

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass
class TokenUnits:
    """A partition of the tokens (K, d, h, w) of one sample.

    Args:
        shape: (1 or K, blocks along d, h, w), the units as a grid.
        ids: (K d h w,) int64, the unit of each token in C order.
    """

    shape: tuple[int, ...]
    ids: Tensor

    @classmethod
    def build(cls, tokens_shape: Sequence[int], block_size: int, granularity: str) -> TokenUnits:
        """Blocks of ``block_size`` positions a side (1: single positions), smaller where the grid ends.

        With granularity "position" a unit holds all K tokens of its positions, with "codebook" those of one codebook.
        """
        codebooks, *grid = tokens_shape
        shape = (codebooks if granularity == "codebook" else 1, *(-(-side // block_size) for side in grid))
        ids = torch.arange(math.prod(shape)).view(shape)
        for axis, side in enumerate(grid, start=1):
            ids = ids.repeat_interleave(block_size, axis).narrow(axis, 0, side)
        return cls(shape, ids.expand(codebooks, *grid).flatten())

    @property
    def count(self) -> int:
        """Number of units."""
        return math.prod(self.shape)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the tokens of each unit: (B, K d h w) -> (B, units), float64."""
        sums = torch.zeros(len(values), self.count, dtype=torch.float64, device=values.device)
        return sums.index_add_(1, self.ids.to(values.device), values.double())

    def spread(self, chosen: Tensor) -> Tensor:
        """Every token gets its unit's value: (B, units) -> (B, K d h w)."""
        return chosen[:, self.ids.to(chosen.device)]

    def order(self, selection: str, generator: torch.Generator) -> Tensor:
        """Keys (units,) float64, the smallest first, for "random", "halton" and "raster" ("confidence": ties at random)."""
        random = torch.rand(self.count, generator=generator, dtype=torch.float64)
        if selection == "raster":
            # All codebooks of a position before the next position.
            codebooks = self.shape[0]
            return torch.arange(self.count, dtype=torch.float64).view(-1, codebooks).T.flatten()
        return self._halton(generator) + random if selection == "halton" else random

    def _halton(self, generator: torch.Generator) -> Tensor:
        """For each unit, the index of a randomly shifted Halton sequence's first point in its cell of the unit cube."""
        points = torch.arange(1, HALTON_POINTS_PER_UNIT * self.count + 1)
        shift = torch.rand(len(self.shape), generator=generator, dtype=torch.float64)
        cell = torch.zeros_like(points)
        # The grid's axes get the smallest bases, the codebook the last.
        for side, base, offset in zip(self.shape, (HALTON_BASES[-1], *HALTON_BASES[:-1]), shift, strict=True):
            coordinate = (radical_inverse(points, base) + offset) % 1
            cell = cell * side + (coordinate * side).long().clamp_max(side - 1)
        first = torch.full((self.count,), float(len(points)), dtype=torch.float64)
        return first.scatter_reduce(0, cell, torch.arange(len(points), dtype=torch.float64), "amin")


def radical_inverse(numbers: Tensor, base: int) -> Tensor:
    """Digits of whole numbers mirrored at the point: 6 = 110 in base 2 -> 0.011 = 0.375; float64 in [0, 1)."""
    result = torch.zeros(numbers.shape, dtype=torch.float64)
    scale = 1.0
    while bool(numbers.any()):
        scale /= base
        result += (numbers % base).double() * scale
        numbers = numbers // base
    return result


def sample_generators(generator: Generators, count: int) -> list[torch.Generator]:
    """One CPU generator for each sample; a single given generator draws their seeds, sample by sample.

    Raises:
        ValueError: the number of generators differs from that of the samples.
    """
    if not isinstance(generator, Sequence):
        parents: list[torch.Generator | None] = [generator] * count
    elif len(generator) != count:
        raise ValueError(f"{len(generator)} generators for {count} samples: give one, or one for each sample")
    else:
        parents = list(generator)
    children = []
    for parent in parents:
        seed = torch.randint(2**62, (), generator=parent, device=parent.device if parent is not None else None)
        children.append(torch.Generator().manual_seed(int(seed)))
    return children


def gumbel_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise in float64, always finite."""
    exponential = torch.empty(tuple(shape), dtype=torch.float64).exponential_(generator=generator)
    return -exponential.clamp_min_(torch.finfo(torch.float64).tiny).log_()
