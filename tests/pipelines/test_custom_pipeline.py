"""What ``DiffusionPipeline.from_pretrained`` does with our pipelines, and what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from vq_cases import save_checkpoint, seeded, synthesis

import hf_binaryformer as bf

CODE = "from hf_binaryformer.pipelines.vq_synthesis import BinaryVQPipeline\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny-vq")


def test_one_line_of_code_makes_diffusers_load_it(saved, tmp_path):
    (tmp_path / "pipeline.py").write_text(CODE)
    loaded = DiffusionPipeline.from_pretrained(saved, custom_pipeline=str(tmp_path), trust_remote_code=True)
    assert type(loaded) is bf.BinaryVQPipeline
    loaded.set_progress_bar_config(disable=True)
    result = loaded(num_inference_steps=2, generator=seeded())
    assert torch.equal(result.images, synthesis()(num_inference_steps=2, generator=seeded()).images)


def test_without_it_diffusers_does_not_know_the_class(saved):
    with pytest.raises(AttributeError, match="no attribute BinaryVQPipeline"):
        DiffusionPipeline.from_pretrained(saved)
