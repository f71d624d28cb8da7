"""The uniform numbers of the ternary gradient against their formula in Python's integers."""

from __future__ import annotations

import pytest
import torch

from hf_binaryformer.kernels.draws import uniform

HEADS, ROWS, KEYS = 3, 130, 5
SEED = 0x1234_5678_9ABC_DEF0


def mix(h: int, last: bool = True) -> int:
    h ^= h >> 16
    h = h * 0x7FEB352D % 2**32
    h ^= h >> 15
    h = h * 0x846CA68B % 2**32
    return h ^ (h >> 16) if last else h


def expected(seed: int, head: int, i: int, j: int) -> float:
    low, high = seed % 2**32, (seed >> 32) % 2**32
    row = mix((mix((mix((mix(low) + high) % 2**32) + head) % 2**32) + i) % 2**32)
    return ((mix((row + 0x9E3779B9 * j) % 2**32, last=False) >> 10) + 0.5) / 2**22


@pytest.mark.parametrize("seed", [0, SEED, 2**62 - 1])
@pytest.mark.parametrize(("group", "rows"), [((0, HEADS), (0, ROWS)), ((1, 3), (64, 128)), ((2, 3), (127, 130))])
def test_every_block_has_the_numbers_of_its_own_heads_and_rows(seed: int, group: tuple, rows: tuple) -> None:
    drawn = uniform(torch.tensor(seed), slice(*group), slice(*rows), KEYS, torch.device("cpu"))
    assert drawn.shape == (group[1] - group[0], rows[1] - rows[0], KEYS)
    for n, head in enumerate(range(*group)):
        for m, i in enumerate(range(*rows)):
            assert drawn[n, m].tolist() == [expected(seed, head, i, j) for j in range(KEYS)]
