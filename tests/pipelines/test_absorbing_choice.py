"""Which units the scheduler masks for training, draws, and masks again, on cases that can be counted by hand."""

from __future__ import annotations

import math

import pytest
import torch
from absorbing_cases import seeds

from hf_binaryformer.pipelines.absorbing_scheduler import AbsorbingScheduler, _Run
from hf_binaryformer.pipelines.token_units import TokenUnits


def test_every_sample_is_masked_in_blocks_of_its_own_size() -> None:
    scheduler = AbsorbingScheduler(num_train_timesteps=4, mask_token_id=5, num_codebooks=1, block_size=1)
    tokens = torch.zeros(3, 1, 8, 8, 8, dtype=torch.long)
    _, masked = scheduler.add_noise(tokens, torch.tensor([2, 2, 2]), seeds(3), block_size=[1, 2, 4])
    for sample, side in zip(masked[:, 0], (1, 2, 4), strict=True):
        blocks = sample.unfold(0, side, side).unfold(1, side, side).unfold(2, side, side).flatten(3)
        assert (blocks.all(3) | ~blocks.any(3)).all(), "a block is masked whole or not at all"
        # Larger blocks are not whole by chance.
        twice = sample.unfold(0, 2 * side, 2 * side).unfold(1, 2 * side, 2 * side).unfold(2, 2 * side, 2 * side)
        twice = twice.flatten(3)
        assert not (twice.all(3) | ~twice.any(3)).all()
        share = blocks[..., 0].float().mean()
        assert abs(float(share) - 0.5) < 4 * 0.5 / math.sqrt(blocks[..., 0].numel())


def test_the_share_of_masked_units_is_that_of_the_time() -> None:
    scheduler = AbsorbingScheduler(num_train_timesteps=10, mask_token_id=5, num_codebooks=1)
    tokens = torch.zeros(4, 1, 16, 16, 16, dtype=torch.long)
    noisy, masked = scheduler.add_noise(tokens, torch.tensor([0, 2, 7, 10]), seeds(4))
    shares = masked.flatten(1).double().mean(1)
    assert shares[0] == 0 and shares[3] == 1
    assert abs(shares[1] - 0.2) < 0.03 and abs(shares[2] - 0.7) < 0.03
    assert torch.equal(noisy == 5, masked)


def state(wanted: int, steps: int, **fields: torch.Tensor) -> _Run:
    """One sample of ``wanted`` units of one token each."""
    units = TokenUnits((1, 1, 1, wanted), torch.arange(wanted))
    hole = torch.ones(1, wanted, dtype=torch.bool)
    return _Run(units, [], hole, torch.tensor([wanted]), torch.tensor([steps]), **fields)


def scheduler_of(**fields: object) -> AbsorbingScheduler:
    scheduler = AbsorbingScheduler(num_train_timesteps=8, mask_token_id=5, num_codebooks=1, **fields)
    scheduler.set_timesteps(8)
    scheduler._set_draws(None, None)
    return scheduler


@pytest.mark.parametrize(
    ("eta", "draws", "again"),
    [
        # Before step 4 of 8, four of eight units are drawn and three are to stay masked: the share is at most 3 / 4.
        (1.0, [0.0, 0.74, 0.76, 0.3], [0.0, 0.3, 0.74]),
        (1.0, [0.0, 0.80, 0.76, 0.3], [0.0, 0.3]),
        # A smaller eta is the limit itself.
        (0.5, [0.0, 0.74, 0.76, 0.3], [0.0, 0.3]),
        (0.2, [0.0, 0.74, 0.76, 0.3], [0.0]),
    ],
)
def test_a_drawn_unit_is_masked_again_with_the_smaller_of_share_and_eta(
    eta: float, draws: list[float], again: list[float]
) -> None:
    # Units 4 to 7 are still masked; their numbers would be small enough.
    run = state(8, 8, order=torch.arange(8.0)[None], remask=torch.tensor([[*draws, 0.01, 0.02, 0.03, 0.04]]))
    masked = torch.tensor([[False] * 4 + [True] * 4])
    reveal, remask = scheduler_of(remask_eta=eta)._choose(run, 4, masked, torch.zeros(1, 8))
    assert remask[0].tolist() == [draw in again for draw in draws] + [False] * 4
    assert int(reveal.sum()) == 4 + len(again) - 3 and not (reveal & ~masked).any()
    assert reveal[0, 4 : 4 + int(reveal.sum())].all(), "the smallest of the order first"


def test_confidence_takes_the_units_with_the_largest_mean_certainty() -> None:
    """Unit 1 has one masked token of two: a sum would favour it over unit 0, whose two are surer each than unit 2's."""
    units = TokenUnits((1, 1, 1, 3), torch.tensor([0, 0, 1, 1, 2, 2]))
    hole = torch.ones(1, 6, dtype=torch.bool)
    run = _Run(units, [], hole, torch.tensor([3]), torch.tensor([3]), order=torch.tensor([[2.0, 1.0, 0.0]]))
    masked = torch.tensor([[True, True, False, True, True, True]])
    certainty = torch.tensor([[-1.0, -1.0, 0.0, -1.5, -3.0, -3.0]])
    scheduler = scheduler_of(selection="confidence")
    chosen = [scheduler._choose(run, step, masked, certainty)[0][0].tolist() for step in (0, 1)]
    assert chosen[0] == [True, True, False, False, False, False]
    # Two of three are to be drawn by the end of step 1.
    assert chosen[1] == [True, True, False, True, False, False]
