"""The properties that every sampler must have, files and errors; its law stands in test_absorbing_law.py."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from absorbing_cases import SIGNIFICANCE, sample_all, seeds

import hf_binaryformer as bf
from hf_binaryformer.pipelines.absorbing_scheduler import SELECTIONS, AbsorbingScheduler
from hf_binaryformer.pipelines.token_units import gumbel_noise, radical_inverse, sample_generators


def random_denoiser(shape, values, seed=0, scale=2.0):
    """Logits that depend on every token of the sample alone, not on the batch."""
    table = torch.randn(values + 1, *shape, generator=torch.Generator().manual_seed(seed)).double() * scale
    base = torch.randn(shape[0], values, *shape[1:], generator=torch.Generator().manual_seed(seed + 1)).double()

    def denoise(sample):
        mixed = torch.stack([table.gather(0, s[None])[0].sum() for s in sample])
        return base * (1 + mixed.sin()).view(-1, 1, 1, 1, 1, 1) * scale

    return denoise


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


def test_masking_again_leaves_as_many_masked_as_without():
    start = torch.zeros(1, *GRID, dtype=torch.long)
    start.flatten(2)[:, :, :20] = VALUES
    left = []
    for options in ({}, {"remask_eta": 0.8}):
        history = sample_all(
            scheduler_of(options), random_denoiser(GRID, VALUES), start, seeds(1), num_inference_steps=6
        )
        left.append([int((h == VALUES).sum()) for h in history])
    assert left[0] == left[1]


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


def test_noise_stays_in_the_hole():
    scheduler = scheduler_of({})
    tokens = torch.randint(VALUES, (3, *GRID))
    times = torch.tensor([256, 100, 256])
    hole = torch.zeros(3, 1, *GRID[1:], dtype=torch.bool)
    hole[:2, :, 1:, 2:] = True
    noisy, masked = scheduler.add_noise(tokens, times, seeds(3), hole=hole)
    everywhere = scheduler.add_noise(tokens, times, seeds(3))[1]
    assert torch.equal(masked, everywhere & hole) and 0 < masked[1].sum() < hole[1].expand_as(masked[1]).sum()
    assert torch.equal(masked[0], hole[0].expand(GRID)) and not masked[2].any()
    assert torch.equal(noisy, tokens.masked_fill(masked, VALUES))


def test_noise_at_both_ends_of_time_and_from_each_generator():
    scheduler = scheduler_of({})
    tokens = torch.randint(VALUES, (4, *GRID))
    times = torch.tensor([0, 256, 100, 200])
    noisy, masked = scheduler.add_noise(tokens, times, seeds(4), [1, 2, 1, 2])
    assert not masked[0].any() and masked[1].all() and torch.equal(noisy[0], tokens[0])
    for n in range(4):
        alone, _ = scheduler.add_noise(tokens[n : n + 1], times[n : n + 1], seeds(4)[n : n + 1], [1, 2, 1, 2][n])
        assert torch.equal(alone[0], noisy[n])


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
