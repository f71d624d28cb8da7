"""A generator decides all that a pipeline draws, the samples of "hamming_bernoulli" too; torch's own is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_segmentation import processor, smooth_volume, tiny_model
from torch import Tensor
from vq_cases import CODEBOOKS, ENTRIES, GRID, SHAPE, components, seeded

from hf_binaryformer.modeling.attention import attention_modules
from hf_binaryformer.modeling.vq_transformer import BinaryVQTransformer3DModel
from hf_binaryformer.pipelines.segmentation import VolumeSegmentationPipeline
from hf_binaryformer.pipelines.vq_inpainting import BinaryVQInpaintPipeline
from hf_binaryformer.pipelines.vq_synthesis import BinaryVQPipeline

OPTIONS: dict[str, Any] = {"num_inference_steps": 4, "output_type": "tokens"}


def vq(kind: type, **scheduler: Any) -> Any:
    parts = components(**scheduler)
    torch.manual_seed(0)
    parts["transformer"] = BinaryVQTransformer3DModel(
        grid_size=GRID,
        num_codebooks=CODEBOOKS,
        codebook_size=ENTRIES,
        embedding_dim=12,
        num_layers=2,
        num_heads=2,
        value_head_dim=4,
        attention_type="hamming_bernoulli",
        initializer_range=0.5,
    ).eval()
    pipeline = kind(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def segmentation() -> Any:
    return VolumeSegmentationPipeline(
        tiny_model(attention_type="hamming_bernoulli", initializer_range=0.3), processor(), batch_size=8
    )


def hole() -> tuple[Tensor, Tensor]:
    image = torch.rand(SHAPE, generator=seeded(1))
    mask = torch.zeros(SHAPE)
    mask[4:14, 4:16, 4:12] = 1
    return image, mask


def segment(pipeline: Any, generator: torch.Generator | None) -> Tensor:
    return torch.from_numpy(pipeline(smooth_volume(), return_probabilities=True, generator=generator).probabilities)


RUNS: dict[str, tuple[Callable[[], Any], Callable[[Any, Any], Tensor]]] = {
    "segmentation": (segmentation, segment),
    "synthesis": (lambda: vq(BinaryVQPipeline), lambda p, g: p(generator=g, temperature=0.0, **OPTIONS).tokens),
    "inpainting": (
        lambda: vq(BinaryVQInpaintPipeline),
        lambda p, g: p(*hole(), generator=g, temperature=0.0, **OPTIONS).tokens,
    ),
    "bits": (
        lambda: vq(BinaryVQPipeline),
        lambda p, g: p.elbo(torch.zeros(2, CODEBOOKS, *GRID, dtype=torch.long), num_samples=3, generator=g),
    ),
    "hits": (
        lambda: vq(BinaryVQPipeline),
        lambda p, g: p.token_accuracy(torch.zeros(2, CODEBOOKS, *GRID, dtype=torch.long), num_samples=3, generator=g),
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_same_seed_gives_the_same_whatever_torchs_own_generator(name) -> None:
    make, run = RUNS[name]
    pipeline = make()
    outputs = []
    for seed, state in ((3, 1), (3, 2), (4, 2)):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        outputs.append(run(pipeline, seeded(seed)))
        assert torch.equal(torch.get_rng_state(), before), "torch's own generator is left alone"
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("name", RUNS)
def test_a_generator_that_was_set_before_is_set_again(name) -> None:
    make, run = RUNS[name]
    pipeline = make()
    network = pipeline.model if name == "segmentation" else pipeline.transformer
    own = seeded(9)
    network.set_attention_generator(own)
    run(pipeline, seeded(3))
    assert all(attention.generator is own for attention in attention_modules(network))
    assert torch.equal(own.get_state(), seeded(9).get_state())


def test_a_volume_is_segmented_alike_each_time() -> None:
    """Without a generator too: labels of the same volume that differ would surprise."""
    pipeline = segmentation()
    first = pipeline(smooth_volume(), return_probabilities=True).probabilities
    torch.manual_seed(99)
    np.testing.assert_array_equal(pipeline(smooth_volume(), return_probabilities=True).probabilities, first)


@pytest.mark.parametrize("one_generator", [True, False])
def test_a_sample_does_not_depend_on_the_others_of_its_batch(one_generator) -> None:
    pipeline = vq(BinaryVQPipeline)
    generators = [seeded(0)] * 3 if one_generator else [seeded(seed) for seed in range(3)]
    singles = [pipeline(generator=g, **OPTIONS).tokens for g in generators]
    batch = pipeline(batch_size=3, generator=seeded(0) if one_generator else [seeded(s) for s in range(3)], **OPTIONS)
    assert torch.equal(batch.tokens, torch.cat(singles))
