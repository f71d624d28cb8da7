"""The scheduler against joint distributions that are known state by state, and the properties every sampler must have."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy_joint import ToyJoint, goodness_of_fit

import hf_binaryformer as bf
from hf_binaryformer.modeling.vq_transformer import elbo_loss
from hf_binaryformer.pipelines.absorbing_scheduler import SELECTIONS, AbsorbingScheduler
from hf_binaryformer.pipelines.token_units import gumbel_noise, radical_inverse, sample_generators

DRAWS = 4000
# Four tokens in a row; a wrong law of so many draws gives p-values far below, the right one this with probability 1e-4.
ROW = (1, 1, 1, 4)
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


def toy_scheduler(toy: ToyJoint, **options) -> AbsorbingScheduler:
    return AbsorbingScheduler(
        **{"num_codebooks": toy.shape[0], "mask_token_id": toy.values, "temperature": 1.0, **options}
    )


def masked_tokens(toy: ToyJoint, count: int) -> torch.Tensor:
    return torch.full((count, *toy.shape), toy.values)


def random_denoiser(shape, values, seed=0, scale=2.0):
    """Logits that depend on every token of the sample alone, not on the batch."""
    table = torch.randn(values + 1, *shape, generator=torch.Generator().manual_seed(seed)).double() * scale
    base = torch.randn(shape[0], values, *shape[1:], generator=torch.Generator().manual_seed(seed + 1)).double()

    def denoise(sample):
        mixed = torch.stack([table.gather(0, s[None])[0].sum() for s in sample])
        return base * (1 + mixed.sin()).view(-1, 1, 1, 1, 1, 1) * scale

    return denoise


# The law of the sampler


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


# Properties


GRID = (2, 3, 4, 3)
VALUES = 5
OPTIONS = [
    *({"selection": name} for name in SELECTIONS),
    {"block_size": 2},
    {"mask_granularity": "codebook", "selection": "halton"},
    {"mask_granularity": "codebook", "block_size": 2},
    {"remask_eta": 0.3},
    {"remask_eta": 0.3, "selection": "confidence"},
    {"top_k": 3, "top_p": 0.9},
]
ids = [" ".join(f"{k}={v}" for k, v in options.items()) for options in OPTIONS]


def scheduler_of(options) -> AbsorbingScheduler:
    return AbsorbingScheduler(num_codebooks=GRID[0], mask_token_id=VALUES, **options)


def holes(count: int) -> torch.Tensor:
    """Random tokens of which whole positions are masked, a different number in each sample."""
    generator = torch.Generator().manual_seed(9)
    tokens = torch.randint(VALUES, (count, *GRID), generator=generator)
    share = torch.linspace(0.2, 1, count).view(-1, 1, 1, 1, 1)
    mask = torch.rand(count, 1, *GRID[1:], generator=generator) < share
    return tokens.masked_fill(mask, VALUES)


@pytest.mark.parametrize("steps", [1, 3, 7, 200])
@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_the_last_step_leaves_no_mask_and_known_tokens_never_change(options, steps):
    start = holes(4)
    denoiser = random_denoiser(GRID, VALUES)
    known = start != VALUES
    history = sample_all(scheduler_of(options), denoiser, start, seeds(4), num_inference_steps=steps)
    assert not (history[-1] == VALUES).any()
    assert all(torch.equal(h[known], start[known]) for h in history)
    assert len(history) <= 1 + steps
    if "remask_eta" not in options:
        assert all((a == b)[a != VALUES].all() for a, b in itertools.pairwise(history)), "a drawn token changed"
        assert all((a != b).any() for a, b in itertools.pairwise(history)), "a step changed nothing"


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_same_seed_same_bytes_and_a_batch_of_four_equals_four_singles(options):
    start, denoiser = holes(4), random_denoiser(GRID, VALUES)

    def run(tokens, generator):
        return sample_all(scheduler_of(options), denoiser, tokens, generator, num_inference_steps=6)[-1]

    batch = run(start, seeds(4))
    assert torch.equal(batch, run(start, seeds(4)))
    assert not torch.equal(batch, run(start, seeds(4, first=50)))
    assert torch.equal(batch, torch.cat([run(start[n : n + 1], seeds(4)[n]) for n in range(4)]))
    # One generator for the batch gives what it gives to one sample after another.
    together, one_by_one = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    singles = torch.cat([run(start[n : n + 1], one_by_one) for n in range(4)])
    assert torch.equal(run(start, together), singles)


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_temperature_to_zero_is_the_likeliest_token(options):
    start, denoiser = holes(3), random_denoiser(GRID, VALUES)

    def run(temperature, scheduler):
        scheduler.set_timesteps(5, temperature=temperature)
        scheduler.prepare(start == VALUES, seeds(3))
        tokens = start
        for t in scheduler.timesteps:
            logits, before = denoiser(tokens), tokens
            output = scheduler.step(logits, t, before)
            tokens = output.prev_sample
            if temperature == 0:
                drawn = output.changed & (tokens != VALUES)
                assert torch.equal(tokens[drawn], logits.argmax(2)[drawn])
                assert torch.equal(output.pred_original_sample, torch.where(before == VALUES, logits.argmax(2), before))
            assert torch.equal(output.changed, before != tokens)
        return tokens

    assert torch.equal(run(0.0, scheduler_of(options)), run(1e-9, scheduler_of(options)))


@pytest.mark.parametrize("units, steps", [(36, 7), (36, 36), (5, 7), (1, 200), (36, 1)])
def test_steps_share_the_units_evenly(units, steps):
    start = torch.zeros(1, *GRID, dtype=torch.long)
    start.flatten(2)[:, :, :units] = VALUES
    scheduler = scheduler_of({})
    history = sample_all(scheduler, random_denoiser(GRID, VALUES), start, seeds(1), num_inference_steps=steps)
    drawn = [int((a != b).sum()) // GRID[0] for a, b in itertools.pairwise(history)]
    assert len(drawn) == min(units, steps) and sum(drawn) == units and max(drawn) - min(drawn) <= 1
    assert scheduler.num_inference_steps == steps and len(scheduler.timesteps) == len(drawn)


def test_an_empty_mask_needs_no_step_and_further_steps_change_nothing():
    scheduler = scheduler_of({})
    tokens = torch.zeros(1, *GRID, dtype=torch.long)
    scheduler.set_timesteps(4)
    scheduler.prepare(tokens == VALUES, seeds(1))
    assert len(scheduler.timesteps) == 0
    assert torch.equal(scheduler.step(random_denoiser(GRID, VALUES)(tokens), 1, tokens).prev_sample, tokens)


def test_raster_and_blocks_go_through_the_grid_in_order():
    start = torch.full((1, *GRID), VALUES)
    scheduler = scheduler_of({"selection": "raster", "block_size": 2})
    history = sample_all(scheduler, random_denoiser(GRID, VALUES), start, seeds(1), tokens_per_step=1)
    boxes = itertools.product((0, 2), (0, 2), (0, 2))
    assert len(history) == 9
    for (a, b), (i, j, k) in zip(itertools.pairwise(history), boxes, strict=True):
        expected = torch.zeros(1, *GRID, dtype=torch.bool)
        expected[..., i : i + 2, j : j + 2, k : k + 2] = True
        assert torch.equal(a != b, expected)


def test_confidence_draws_the_surest_first():
    start = torch.full((1, 1, 1, 1, 6), 3)
    sureness = torch.tensor([2.0, 5.0, 1.0, 6.0, 3.0, 4.0])
    logits = torch.stack([sureness, -sureness, torch.zeros(6)]).view(1, 1, 3, 1, 1, 6)
    scheduler = AbsorbingScheduler(num_codebooks=1, mask_token_id=3, selection="confidence", temperature=0)
    history = sample_all(scheduler, lambda _: logits, start, seeds(1), tokens_per_step=1)
    order = [int((a != b).flatten().nonzero()) for a, b in itertools.pairwise(history)]
    assert order == sureness.argsort(descending=True).tolist()


def test_halton_spreads_more_evenly_than_random():
    start = torch.full((8, 1, 8, 8, 8), 2)

    def unevenness(selection):
        scheduler = AbsorbingScheduler(num_codebooks=1, mask_token_id=2, selection=selection)
        scheduler.set_timesteps(8)
        scheduler.prepare(start == 2, seeds(8))
        tokens = scheduler.step(torch.zeros(8, 1, 2, 8, 8, 8), scheduler.timesteps[0], start).prev_sample
        drawn = (tokens != 2).double()
        assert torch.equal(drawn.flatten(1).sum(1), torch.full((8,), 64.0).double())
        planes = torch.stack([drawn[:, 0].sum(axes) for axes in ((1, 2), (1, 3), (2, 3))])
        return float(planes.std()), float(torch.nn.functional.avg_pool3d(drawn[:, 0], 4).std())

    (plane, octant), (random_plane, random_octant) = unevenness("halton"), unevenness("random")
    assert plane < 0.6 * random_plane and octant < 0.85 * random_octant


def test_radical_inverse_mirrors_the_digits():
    for base in (2, 3, 7):
        for n in range(60):
            digits = np.base_repr(n, base)[::-1]
            expected = sum(int(d, base) * base ** -(i + 1.0) for i, d in enumerate(digits))
            assert float(radical_inverse(torch.tensor(n), base)) == pytest.approx(expected, abs=1e-15)


def test_gumbel_noise_is_float64_and_follows_its_law():
    noise = gumbel_noise((200_000,), torch.Generator().manual_seed(0))
    assert noise.dtype == torch.float64 and noise.isfinite().all()
    from scipy.stats import kstest

    assert kstest(noise.numpy(), "gumbel_r").pvalue > SIGNIFICANCE


# Noise in training, and the bound


@pytest.mark.parametrize("granularity", ["position", "codebook"])
@pytest.mark.parametrize("block_size", [1, 2])
def test_noise_masks_units_with_probability_t_over_total(granularity, block_size):
    scheduler = AbsorbingScheduler(
        num_codebooks=2,
        mask_token_id=VALUES,
        num_train_timesteps=8,
        mask_granularity=granularity,
        block_size=block_size,
    )
    tokens = torch.randint(VALUES, (300, 2, 4, 4, 4))
    times = torch.full((300,), 6)
    noisy, masked = scheduler.add_noise(tokens, times, torch.Generator().manual_seed(0))
    assert torch.equal(noisy, torch.where(masked, VALUES, tokens))
    units = masked.unfold(2, block_size, block_size).unfold(3, block_size, block_size).unfold(4, block_size, block_size)
    units = units.flatten(5)
    assert torch.equal(units.any(-1), units.all(-1)), "a block is masked in part"
    together = torch.equal(masked[:, 0], masked[:, 1])
    assert together == (granularity == "position")
    count = units[..., 0].numel() // (2 if together else 1)
    assert units[..., 0].double().mean() == pytest.approx(0.75, abs=5 * (0.75 * 0.25 / count) ** 0.5)
    if block_size == 2:
        assert not torch.equal(units[:, :, 0], units[:, :, 1])


def test_noise_at_both_ends_of_time_and_from_each_generator():
    scheduler = scheduler_of({})
    tokens = torch.randint(VALUES, (4, *GRID))
    times = torch.tensor([0, 256, 100, 200])
    noisy, masked = scheduler.add_noise(tokens, times, seeds(4), [1, 2, 1, 2])
    assert not masked[0].any() and masked[1].all() and torch.equal(noisy[0], tokens[0])
    for n in range(4):
        alone, _ = scheduler.add_noise(tokens[n : n + 1], times[n : n + 1], seeds(4)[n : n + 1], [1, 2, 1, 2][n])
        assert torch.equal(alone[0], noisy[n])


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


# Files and errors


def test_save_and_load_gives_the_same_samples(tmp_path):
    scheduler = scheduler_of({"selection": "halton", "temperature": 0.6, "top_k": 4})
    scheduler.save_pretrained(tmp_path)
    loaded = AbsorbingScheduler.from_pretrained(tmp_path)
    assert {key: loaded.config[key] for key in scheduler.config if not key.startswith("_")} == {
        key: value for key, value in scheduler.config.items() if not key.startswith("_")
    }
    start, denoiser = holes(2), random_denoiser(GRID, VALUES)
    samples = [sample_all(s, denoiser, start, seeds(2), num_inference_steps=5)[-1] for s in (scheduler, loaded)]
    assert torch.equal(*samples)


def test_a_transformer_of_another_kind_is_refused():
    fits = {"train_block_sizes": [1, 2], "mask_granularity": "position", "num_codebooks": 2, "codebook_size": VALUES}
    scheduler = scheduler_of({"block_size": 2})
    scheduler.check_compatible(SimpleNamespace(**fits))
    for change, message in (
        ({"train_block_sizes": [1]}, r"block_size 2 is not in .*\[1\]"),
        ({"mask_granularity": "codebook"}, "mask_granularity is 'position'.* is 'codebook'"),
        ({"num_codebooks": 3}, "num_codebooks is 2.* is 3"),
        ({"codebook_size": 64}, "mask_token_id is 5.*codebook_size is 64"),
    ):
        with pytest.raises(ValueError, match=message):
            scheduler.check_compatible(SimpleNamespace(**{**fits, **change}))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"selection": "best"}, "selection is 'best'.*halton"),
        ({"mask_granularity": "voxel"}, "expected one of position, codebook"),
        ({"top_p": 1.5}, "top_p is 1.5, expected 0 to 1"),
        ({"remask_eta": -1}, "remask_eta is -1"),
        ({"block_size": 0}, "block_size is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        AbsorbingScheduler(**options)


def test_calls_that_do_not_fit():
    scheduler, tokens = scheduler_of({}), torch.full((2, *GRID), VALUES)
    logits = torch.zeros(2, GRID[0], VALUES, *GRID[1:])
    with pytest.raises(ValueError, match="call set_timesteps before prepare"):
        scheduler.prepare(tokens == VALUES)
    for wrong in ({}, {"num_inference_steps": 3, "tokens_per_step": 1}, {"num_inference_steps": 0}):
        with pytest.raises(ValueError, match="give one, at least 1"):
            scheduler.set_timesteps(**wrong)
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="call prepare before the steps"):
        scheduler.step(logits, 3, tokens)
    with pytest.raises(ValueError, match="3 generators for 2 samples"):
        scheduler.prepare(tokens == VALUES, seeds(3))
    with pytest.raises(ValueError, match="masked in part"):
        scheduler.prepare(torch.arange(2).view(1, 2, 1, 1, 1).expand(2, *GRID) == 0)
    scheduler.prepare(tokens == VALUES)
    with pytest.raises(ValueError, match="expected .*2, 2, 5, 3, 4, 3"):
        scheduler.step(logits[:, :, 1:], 3, tokens)
    with pytest.raises(ValueError, match="NaN"):
        scheduler.step(logits.fill_(torch.nan), 3, tokens)
    with pytest.raises(ValueError, match=r"\(batch, 2 codebooks, d, h, w\)"):
        scheduler.add_noise(tokens[:, :1], torch.ones(2))
    with pytest.raises(ValueError, match="expected 2 from 0 to 256"):
        scheduler.add_noise(tokens, torch.tensor([1, 257]))


def test_public_name():
    assert bf.AbsorbingScheduler is AbsorbingScheduler
    assert [g.initial_seed() for g in sample_generators(seeds(2), 2)] != [0, 1]
