"""The scheduler and the bound against joint distributions that are known state by state."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from absorbing_cases import SIGNIFICANCE, sample_all
from toy_joint import ToyJoint, goodness_of_fit

from hf_binaryformer.modeling.vq_transformer import elbo_loss
from hf_binaryformer.pipelines.absorbing_scheduler import AbsorbingScheduler

DRAWS = 4000
# Four tokens in a row; a wrong law of so many draws gives p-values far below, the right one this with probability 1e-4.
ROW = (1, 1, 1, 4)


def toy_scheduler(toy: ToyJoint, **options) -> AbsorbingScheduler:
    return AbsorbingScheduler(
        **{"num_codebooks": toy.shape[0], "mask_token_id": toy.values, "temperature": 1.0, **options}
    )


def masked_tokens(toy: ToyJoint, count: int) -> torch.Tensor:
    return torch.full((count, *toy.shape), toy.values)


@pytest.mark.parametrize("steps", [{"tokens_per_step": 1}, {"num_inference_steps": 4}, {"num_inference_steps": 9}])
@pytest.mark.parametrize("selection", ["random", "raster", "halton"])
def test_one_token_a_step_reproduces_the_joint_distribution(selection, steps):
    toy = ToyJoint(ROW, 3)
    scheduler = toy_scheduler(toy, selection=selection)
    history = sample_all(scheduler, toy.denoiser, masked_tokens(toy, DRAWS), torch.Generator().manual_seed(1), **steps)
    assert len(history) == 5
    assert goodness_of_fit(toy.counts(history[-1]), toy.p) > SIGNIFICANCE


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("selection", ["random", "raster"])
def test_fewer_steps_make_the_factorised_error_and_no_other(selection, steps):
    toy = ToyJoint(ROW, 3)
    scheduler = toy_scheduler(toy, selection=selection)
    history = sample_all(
        scheduler, toy.denoiser, masked_tokens(toy, DRAWS), torch.Generator().manual_seed(2), num_inference_steps=steps
    )
    sizes = [int((a != b).sum()) // DRAWS for a, b in itertools.pairwise(history)]
    orders = [range(4)] if selection == "raster" else list(itertools.permutations(range(4)))
    cuts = np.cumsum([0, *sizes])
    laws = [toy.law([list(order[a:b]) for a, b in itertools.pairwise(cuts)]) for order in orders]
    counts = toy.counts(history[-1])
    assert goodness_of_fit(counts, np.mean(laws, axis=0)) > SIGNIFICANCE
    with np.errstate(divide="ignore"):
        assert 0.5 * np.abs(counts / DRAWS - toy.p).sum() > 0.1, "the toy's tokens should depend on one another"


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("selection", ["random", "raster", "halton"])
def test_independent_tokens_are_exact_at_any_number_of_steps(selection, steps):
    toy = ToyJoint(ROW, 3, dependent=False)
    scheduler = toy_scheduler(toy, selection=selection)
    history = sample_all(
        scheduler, toy.denoiser, masked_tokens(toy, DRAWS), torch.Generator().manual_seed(3), num_inference_steps=steps
    )
    assert goodness_of_fit(toy.counts(history[-1]), toy.p) > SIGNIFICANCE


def test_codebook_entries_drawn_singly_are_exact_and_positions_whole_are_not():
    toy = ToyJoint((2, 1, 1, 2), 3)
    for granularity in ("codebook", "position"):
        scheduler = toy_scheduler(toy, mask_granularity=granularity, selection="raster")
        history = sample_all(
            scheduler, toy.denoiser, masked_tokens(toy, DRAWS), torch.Generator().manual_seed(4), tokens_per_step=1
        )
        # Flat tokens are (codebook, position): both tokens of position 0 are numbers 0 and 2.
        groups = [[0], [2], [1], [3]] if granularity == "codebook" else [[0, 2], [1, 3]]
        assert len(history) == len(groups) + 1
        assert goodness_of_fit(toy.counts(history[-1]), toy.law(groups)) > SIGNIFICANCE


def test_inpainting_follows_the_conditional_distribution():
    toy = ToyJoint(ROW, 3)
    start = masked_tokens(toy, DRAWS)
    start[..., 1] = 2
    history = sample_all(toy_scheduler(toy), toy.denoiser, start, torch.Generator().manual_seed(5), tokens_per_step=1)
    law = np.where(toy.states[:, 1] == 2, toy.p, 0)
    assert goodness_of_fit(toy.counts(history[-1]), law / law.sum()) > SIGNIFICANCE


def test_masking_again_keeps_the_joint_distribution():
    # With two tokens every step draws at most one, given the other, so that the result is exact.
    toy = ToyJoint((1, 1, 1, 2), 4)
    scheduler = toy_scheduler(toy, remask_eta=1.0)
    history = sample_all(
        scheduler, toy.denoiser, masked_tokens(toy, DRAWS), torch.Generator().manual_seed(6), num_inference_steps=7
    )
    masked = [h == toy.values for h in history]
    again = [bool((~a & b).any()) for a, b in itertools.pairwise(masked)]
    assert len(history) == 8 and sum(again) >= 2
    assert goodness_of_fit(toy.counts(history[-1]), toy.p) > SIGNIFICANCE


def test_temperature_sharpens_the_distribution():
    toy = ToyJoint((1, 1, 1, 1), 5)
    scheduler = toy_scheduler(toy, temperature=1.0)
    history = sample_all(
        scheduler,
        toy.denoiser,
        masked_tokens(toy, DRAWS),
        torch.Generator().manual_seed(7),
        num_inference_steps=1,
        temperature=0.5,
    )
    law = toy.p**2 / (toy.p**2).sum()
    assert goodness_of_fit(toy.counts(history[-1]), law) > SIGNIFICANCE
    assert goodness_of_fit(toy.counts(history[-1]), toy.p) < SIGNIFICANCE


def test_top_k_and_top_p_cut_the_tail_and_keep_the_proportions():
    toy = ToyJoint((1, 1, 1, 1), 4)
    toy.p = np.array([0.4, 0.1, 0.2, 0.3])
    for options, kept in (
        ({"top_k": 2}, [0, 3]),
        ({"top_p": 0.6}, [0, 3]),
        ({"top_p": 0.75}, [0, 2, 3]),
        ({"top_p": 0.0}, [0]),
        ({"top_k": 9}, [0, 1, 2, 3]),
    ):
        scheduler = toy_scheduler(toy, **options)
        start, generator = masked_tokens(toy, DRAWS), torch.Generator().manual_seed(8)
        counts = toy.counts(sample_all(scheduler, toy.denoiser, start, generator, num_inference_steps=1)[-1])
        law = np.where(np.isin(range(4), kept), toy.p, 0)
        assert goodness_of_fit(counts, law / law.sum()) > SIGNIFICANCE, options


def bound(toy: ToyJoint, total: int) -> float:
    """Bits per sample of the "elbo" weighting: its mean over times, states and masks, each with its probability."""
    states = torch.from_numpy(toy.states).view(-1, *toy.shape)
    masks = torch.tensor(list(itertools.product([False, True], repeat=toy.count))).view(-1, *toy.shape)
    tokens = states.repeat_interleave(len(masks), 0)
    masked = masks.repeat(len(states), 1, 1, 1, 1)
    # States of probability 0 have no conditionals.
    logits = toy.denoiser(tokens.masked_fill(masked, toy.values)).clamp_min(-50)
    p = torch.from_numpy(toy.p).repeat_interleave(len(masks))
    hidden = masked.flatten(1).sum(1)
    bits = 0.0
    for t in range(1, total + 1):
        chance = (t / total) ** hidden * (1 - t / total) ** (toy.count - hidden)
        loss = elbo_loss(logits, tokens, masked, torch.full((len(p),), t), total, "elbo", "none")
        bits += toy.count * float((p * chance * loss).sum()) / total
    return bits


def test_the_bound_of_an_exact_denoiser_is_the_entropy():
    independent = ToyJoint((1, 1, 1, 3), 3, dependent=False)
    for total in (1, 2, 16):
        assert bound(independent, total) == pytest.approx(independent.entropy, abs=1e-4)
    dependent = ToyJoint((1, 1, 1, 3), 3)
    bounds = [bound(dependent, total) for total in (1, 2, 8, 64, 512)]
    assert bounds == sorted(bounds, reverse=True) and bounds[0] > dependent.entropy + 0.1
    assert dependent.entropy < bounds[-1] < dependent.entropy + 0.01
