"""Synthesis: what a seed determines, what the last step leaves, how often the network runs, bits and hits of a volume."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vq_cases import CODEBOOKS, ENTRIES, GRID, SHAPE, components, seeded, synthesis

from hf_binaryformer.pipelines.vq_sampling import BACKGROUND_CEILING

POSITIONS = math.prod(GRID)


def count_calls(monkeypatch, pipeline) -> list[int]:
    """Batch size of every run of the transformer from now on."""
    calls = []
    forward = pipeline.transformer.forward
    monkeypatch.setattr(pipeline.transformer, "forward", lambda t, **o: calls.append(len(t)) or forward(t, **o))
    return calls


def test_volumes_and_tokens():
    pipeline = synthesis()
    output = pipeline(batch_size=2, num_inference_steps=7, generator=seeded())
    assert output.images.shape == (2, 1, *SHAPE) and output.images.dtype == torch.float32
    assert output.tokens.shape == (2, CODEBOOKS, *GRID) and output.tokens.dtype == torch.uint8
    assert output.images.min() >= 0 and output.images.max() <= pipeline.vqmodel.config.intensity_ceiling
    assert not ((output.images > 0) & (output.images < BACKGROUND_CEILING)).any()
    with torch.no_grad():
        decoded = pipeline.vqmodel.decode(output.tokens.long()).sample
    bright = decoded > BACKGROUND_CEILING + 1e-4
    torch.testing.assert_close(output.images[bright], decoded[bright].clamp_max(1.5))


@pytest.mark.parametrize("steps", [1, 7, POSITIONS, 10 * POSITIONS])
@pytest.mark.parametrize("selection", ["random", "confidence"])
def test_last_step_leaves_no_mask_token(steps, selection, monkeypatch):
    pipeline = synthesis(selection=selection)
    calls = count_calls(monkeypatch, pipeline)
    output = pipeline(num_inference_steps=steps, generator=seeded(), output_type="tokens")
    assert output.images is None and output.tokens.max() < ENTRIES
    # Steps beyond one a position would change nothing, and do not run the network.
    assert len(calls) == pipeline.num_timesteps == min(steps, POSITIONS)


def test_one_cold_step_is_the_arg_max():
    pipeline = synthesis()
    tokens = pipeline(num_inference_steps=1, temperature=0, generator=seeded()).tokens
    with torch.no_grad():
        logits = pipeline.transformer(torch.full((1, CODEBOOKS, *GRID), ENTRIES)).logits
    assert torch.equal(tokens.long(), logits.argmax(2))


def test_same_seed_same_bytes_and_another_seed_others():
    pipeline = synthesis()
    one, again, other = (pipeline(num_inference_steps=5, generator=seeded(s)).images for s in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize("one_generator", [True, False])
def test_batch_of_four_equals_four_singles(one_generator):
    pipeline = synthesis()
    generators = [seeded(0)] * 4 if one_generator else [seeded(seed) for seed in range(4)]
    singles = [pipeline(num_inference_steps=6, generator=g) for g in generators]
    batch_generator = seeded(0) if one_generator else [seeded(seed) for seed in range(4)]
    batch = pipeline(batch_size=4, num_inference_steps=6, generator=batch_generator)
    assert torch.equal(batch.tokens, torch.cat([s.tokens for s in singles]))
    assert torch.equal(batch.images, torch.cat([s.images for s in singles]))


def test_temperature_is_the_schedulers_unless_given():
    pipeline = synthesis(temperature=0.3)
    default, same, other = (
        pipeline(num_inference_steps=4, temperature=t, generator=seeded()).tokens for t in (None, 0.3, 5.0)
    )
    assert torch.equal(default, same) and not torch.equal(default, other)


def test_callback_sees_and_replaces_tokens():
    pipeline, seen = synthesis(), []

    def tell(owner, step, timestep, tensors):
        assert owner is pipeline
        seen.append((step, timestep, int((tensors["tokens"] == ENTRIES).sum())))
        return {"tokens": tensors["tokens"].where(tensors["tokens"] == ENTRIES, torch.tensor(1))}

    tokens = pipeline(num_inference_steps=4, generator=seeded(), callback_on_step_end=tell).tokens
    left = [POSITIONS * CODEBOOKS * (3 - step) // 4 for step in range(4)]
    assert seen == [(step, 4 - step, left[step]) for step in range(4)]
    assert (tokens == 1).all()
    with pytest.raises(ValueError, match=r"holds latents, expected only tokens"):
        pipeline(callback_on_step_end=tell, callback_on_step_end_tensor_inputs=["latents"])


def test_output_types_and_other_grids():
    pipeline = synthesis()
    array = pipeline(num_inference_steps=3, generator=seeded(), output_type="np").images
    images, tokens = pipeline(num_inference_steps=3, generator=seeded(), return_dict=False)
    assert isinstance(array, np.ndarray) and np.array_equal(array, images.numpy())
    assert tokens.dtype == torch.uint8
    assert pipeline(num_inference_steps=2, grid_size=(2, 3, 7)).images.shape == (1, 1, 8, 12, 28)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"output_type": "pil"}, "output_type is 'pil', expected one of pt, np, tokens"),
        ({"grid_size": (2, 0, 2)}, r"grid_size is \(2, 0, 2\), expected three"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"batch_size": 2, "generator": [torch.Generator()]}, "generator"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        synthesis()(**options)


def test_components_that_do_not_belong_together():
    from hf_binaryformer.modeling.vq_autoencoder import BinaryVQModel
    from hf_binaryformer.pipelines.vq_synthesis import BinaryVQPipeline

    parts = components()
    other = BinaryVQModel(encoder_channels=[8, 8], decoder_channels=[8, 8, 8], num_codebooks=4, codebook_dim=4)
    with pytest.raises(ValueError, match="autoencoder's num_codebooks is 4, the transformer's 2.*one checkpoint"):
        BinaryVQPipeline(**{**parts, "vqmodel": other})
    with pytest.raises(ValueError, match="mask_granularity"):
        BinaryVQPipeline(**components(mask_granularity="codebook"))


def test_the_pipeline_leaves_modes_and_codebooks_alone():
    pipeline = synthesis()
    pipeline.vqmodel.train()
    pipeline.transformer.train()
    before = {name: value.clone() for name, value in pipeline.vqmodel.state_dict().items()}
    modes = []
    pipeline.transformer.register_forward_hook(lambda module, *_: modes.append(module.training))
    pipeline.encode(pipeline(num_inference_steps=2).images)
    assert modes == [False, False] and pipeline.vqmodel.training and pipeline.transformer.training
    assert all(torch.equal(value, before[name]) for name, value in pipeline.vqmodel.state_dict().items())


def test_bits_of_a_model_that_knows_nothing():
    pipeline = synthesis()
    torch.nn.init.zeros_(pipeline.transformer.head.weight)
    torch.nn.init.zeros_(pipeline.transformer.head.bias)
    tokens = torch.randint(ENTRIES, (3, CODEBOOKS, *GRID))
    bits = pipeline.elbo(tokens, num_samples=64, generator=seeded())
    torch.testing.assert_close(bits, torch.full((3,), CODEBOOKS * math.log2(ENTRIES)), rtol=0.06, atol=0)


def test_bits_and_hits_of_a_model_that_knows_all(monkeypatch):
    pipeline = synthesis()
    volumes = torch.rand(2, 1, *SHAPE)
    truth = pipeline.encode(volumes)

    def all_knowing(tokens, **options):
        onehot = torch.nn.functional.one_hot(truth, ENTRIES).movedim(-1, 2).float()
        return SimpleNamespace(logits=100 * onehot)

    monkeypatch.setattr(pipeline.transformer, "forward", all_knowing)
    assert pipeline.token_accuracy(volumes, num_samples=3).tolist() == [1, 1]
    assert pipeline.elbo(volumes, num_samples=3).abs().max() < 1e-4
    wrong = (truth + 1) % ENTRIES
    assert pipeline.token_accuracy(wrong, num_samples=3).tolist() == [0, 0]


def test_times_of_masking_cover_their_range_evenly():
    pipeline = synthesis()
    total = pipeline.scheduler.config.num_train_timesteps
    times = pipeline._times(total, seeded())
    assert sorted(times) == list(range(1, total + 1))
    with pytest.raises(ValueError, match="num_samples is 0"):
        pipeline.elbo(torch.zeros(1, CODEBOOKS, *GRID, dtype=torch.long), num_samples=0)
