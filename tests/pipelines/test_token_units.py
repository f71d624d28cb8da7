"""Orders of units against naive loops, with the same random shifts."""

from __future__ import annotations

import pytest
import torch

from hf_binaryformer.pipelines.token_units import HALTON_POINTS_PER_UNIT, TokenUnits


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("codebooks", "grid"), [(1, (2, 3, 4)), (3, (2, 2, 3)), (2, (1, 1, 5))])
def test_raster_takes_all_codebooks_of_a_position_then_the_next(codebooks: int, grid: tuple[int, int, int]) -> None:
    units = TokenUnits.build((codebooks, *grid), 1, "codebook")
    keys = units.order("raster", seeded(0)).view(codebooks, -1)
    positions = keys.shape[1]
    assert keys.tolist() == [[float(p * codebooks + k) for p in range(positions)] for k in range(codebooks)]


def mirrored_digits(number: int, base: int) -> float:
    value, scale = 0.0, 1.0
    while number:
        scale /= base
        value += number % base * scale
        number //= base
    return value


@pytest.mark.parametrize("granularity", ["position", "codebook"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_halton_counts_points_of_the_shifted_sequence(seed: int, granularity: str) -> None:
    """The first axis (codebooks) has the base 7; the grid's axes have 2, 3 and 5."""
    units = TokenUnits.build((2, 2, 3, 5), 1, granularity)
    keys = units.order("halton", seeded(seed))
    own = seeded(seed)
    random = torch.rand(units.count, generator=own, dtype=torch.float64)
    shift = torch.rand(4, generator=own, dtype=torch.float64).tolist()
    total = HALTON_POINTS_PER_UNIT * units.count
    first: dict[tuple[int, ...], int] = {}
    for number in range(1, total + 1):
        point = [(mirrored_digits(number, base) + s) % 1 for base, s in zip((7, 2, 3, 5), shift, strict=True)]
        cell = tuple(min(int(x * side), side - 1) for x, side in zip(point, units.shape, strict=True))
        first.setdefault(cell, number - 1)
    expected = torch.full(units.shape, float(total), dtype=torch.float64)
    for cell, number in first.items():
        expected[cell] = number
    torch.testing.assert_close(keys, expected.flatten() + random)
