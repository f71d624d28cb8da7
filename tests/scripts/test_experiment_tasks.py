"""What the experiments' tasks and measures are: the twin tokens, bits by the share of masked ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

import mask_ratio
from hf_binaryformer.modeling.vq_transformer import BinaryVQTransformer3DModel
from hf_binaryformer.pipelines.absorbing_scheduler import AbsorbingScheduler
from hf_binaryformer.training import sampler
from make_twins import Kind, twins
from make_twins import main as make_twins


@pytest.mark.parametrize("kind", list(Kind))
def test_twins_are_where_they_should_be_and_nothing_else_is_known(kind, tmp_path):
    tokens = twins(500, kind, 8, 5, 0)[:, 0, 0].numpy()
    first, second = tokens[:, 0], tokens[:, 1]
    agreement = (first[:, :, None] == second[:, None, :]).mean(0)
    assert (agreement > 0.999).sum() == 8 and (np.sort(agreement, 1)[:, :-1] < 0.3).all()
    order = (agreement > 0.999).argmax(1)
    assert {"copy": (order == range(8)).all(), "mirror": (order[::-1] == range(8)).all(), "shuffle": True}[kind]
    make_twins(tmp_path, kind, 8, 5, 20, 6, 0)
    saved = {split: load_file(tmp_path / f"{split}.safetensors")["tokens"] for split in ("train", "validation")}
    assert saved["train"].shape == (20, 1, 1, 2, 8) and saved["validation"].shape == (6, 1, 1, 2, 8)
    rows = {json.dumps(row.tolist()) for split in saved.values() for row in split[:, 0, 0, 0]}
    assert len(rows) == 26


def test_bits_by_mask_ratio(tmp_path):
    """Of a network that always gives the same distribution its cross-entropy; of any, about what the training's bound says."""
    torch.manual_seed(0)
    network = BinaryVQTransformer3DModel(
        grid_size=(2, 3, 4), num_codebooks=2, codebook_size=5, embedding_dim=8, num_layers=1, num_heads=2
    )
    scheduler = AbsorbingScheduler(num_train_timesteps=40, num_codebooks=2, mask_token_id=5)
    scheduler.save_pretrained(tmp_path / "scheduler")
    tokens = torch.randint(5, (24, 2, 2, 3, 4), dtype=torch.uint8)
    save_file({"tokens": tokens}, tmp_path / "test.safetensors")

    def measure() -> dict:
        network.save_pretrained(tmp_path / "transformer")
        mask_ratio.main(tmp_path, tmp_path)
        return json.loads((tmp_path / "mask_ratio.json").read_text())

    with torch.no_grad():
        network.head.weight.mul_(20)
    settings = {"seed": 0, "batch_size": 8, "validation_times": 40}
    accelerator = Accelerator(cpu=True)
    bound = sampler.validate(network, tokens, scheduler, settings, accelerator)["validation_bits_per_token"]
    found = measure()
    assert found["bits_per_position"] == pytest.approx(bound, rel=0.03)
    assert bound > 2 * np.log2(5)
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.copy_(torch.arange(10.0) / 5)
    save_file({"tokens": torch.full_like(tokens, 3)}, tmp_path / "test.safetensors")
    cost = [-np.log2(np.exp(x[3]) / np.exp(x).sum()) for x in (np.arange(5) / 5, np.arange(5, 10) / 5)]
    assert cost[0] == pytest.approx(cost[1])
    assert set(measure()["bits"]) == {f"{0.05 + 0.1 * part:g}" for part in range(10)}
    assert list(measure()["bits"].values()) == pytest.approx([cost[0]] * 10)
    assert measure()["bits_per_position"] == pytest.approx(2 * cost[0])
