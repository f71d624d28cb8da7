"""What the tests of the scheduler share."""

from __future__ import annotations

import torch

# A right law gives a p-value below it with this probability.
SIGNIFICANCE = 1e-4


def seeds(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + n) for n in range(count)]


def sample_all(scheduler, denoiser, start, generator, **steps):
    """Run every step from tokens some of which are masked; returns the tokens after each."""
    scheduler.set_timesteps(**steps)
    scheduler.prepare(start == scheduler.config.mask_token_id, generator)
    history = [start]
    for t in scheduler.timesteps:
        history.append(scheduler.step(denoiser(history[-1]), t, history[-1]).prev_sample)
    return history
