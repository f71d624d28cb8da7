"""Pipelines whose network was cast as a whole, which is not the same as running it under autocast."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_segmentation import processor, smooth_volume, tiny_model
from vq_cases import GRID, SHAPE, inpainting, seeded, synthesis

from hf_binaryformer.pipelines.precision import number_format
from hf_binaryformer.pipelines.segmentation import VolumeSegmentationPipeline

HALVES = [torch.float16, torch.bfloat16]


def pipeline(**options: Any) -> VolumeSegmentationPipeline:
    return VolumeSegmentationPipeline(tiny_model(initializer_range=0.05), processor(), **options)


@pytest.mark.parametrize("image_size", [(32, 32), (16, 16)], ids=["whole slices", "windows"])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
def test_a_cast_network_segments(dtype, image_size) -> None:
    torch.manual_seed(0)
    model = tiny_model(initializer_range=0.05)
    whole = VolumeSegmentationPipeline(model, processor(image_size=image_size))
    expected = whole(smooth_volume(), return_probabilities=True)
    whole.model.to(dtype)
    found = whole(smooth_volume(), return_probabilities=True)
    assert whole.model.dtype == dtype
    # A bit whose number is nearly 0 may flip, so that a few voxels differ more.
    error = np.abs(found.probabilities.astype(np.float32) - expected.probabilities.astype(np.float32))
    assert error.mean() < 4e-3 and np.quantile(error, 0.99) < 0.03
    assert found.report["dtype"] == str(dtype).removeprefix("torch."), "what the network was computed in"
    assert expected.report["dtype"] == "float32"


def test_half_in_the_middle_of_its_life() -> None:
    """As users write it."""
    whole = pipeline()
    whole.model.half()
    assert whole(smooth_volume()).labels.shape == (26, 21, 17)


def test_autocast_of_weights_in_its_own_type() -> None:
    whole = pipeline(dtype=torch.bfloat16)
    whole.model.bfloat16()
    result = whole(smooth_volume())
    assert result.report["dtype"] == "bfloat16" and result.labels.shape == (26, 21, 17)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_autocast_of_weights_in_another_type_is_refused_at_once(dtype) -> None:
    message = rf"weights are {dtype}, dtype is torch\.bfloat16, .*model\.float\(\)"
    whole = pipeline(dtype=torch.bfloat16)
    whole.model.to(dtype)
    with pytest.raises(ValueError, match=message):
        whole("there is no such file.nii.gz")
    with pytest.raises(ValueError, match=message):
        VolumeSegmentationPipeline(whole.model, processor(), dtype="bfloat16")


@pytest.mark.parametrize("in_hardware, expected", [(True, "bfloat16"), (False, "float32")])
def test_auto_is_bfloat16_where_the_processor_has_it(monkeypatch, in_hardware, expected) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: in_hardware)
    assert pipeline(dtype="auto")(smooth_volume()).report["dtype"] == expected
    assert pipeline()(smooth_volume()).report["dtype"] == "float32", "Python's default does not depend on the machine"
    sampler = synthesis()
    sampler.set_autocast("auto")
    assert sampler._autocast_dtype == (torch.bfloat16 if in_hardware else None)


def test_auto_leaves_weights_of_another_type_in_their_own(monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    whole = VolumeSegmentationPipeline(tiny_model().half(), processor(), dtype="auto")
    assert whole(smooth_volume()).report["dtype"] == "float16"


@pytest.mark.parametrize("capability, expected", [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_auto_on_graphics_processors(monkeypatch, capability, expected) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert number_format("auto", "cuda:0") == expected
    assert number_format("auto", "mps") == torch.float32


@pytest.mark.parametrize("dtype", HALVES)
def test_cast_pipelines_of_absorbing_diffusion(dtype) -> None:
    one = synthesis().to(dtype)
    output = one(num_inference_steps=3, generator=seeded())
    assert output.images.shape == (1, 1, *SHAPE) and output.images.dtype == torch.float32
    assert output.images.isfinite().all()
    mask = torch.zeros(SHAPE)
    mask[4:10, 4:10, 4:10] = 1
    filled = inpainting().to(dtype)(torch.rand(SHAPE), mask, num_inference_steps=3, generator=seeded())
    assert filled.images.isfinite().all() and filled.tokens.shape[2:] == GRID
