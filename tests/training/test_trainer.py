"""``transformers.Trainer`` trains the networks as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import hf_binaryformer as bf

TINY = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "num_heads": 2, "num_hidden_layers": 2, "num_channels": 1}
TINY |= {"value_head_dim": 4, "decoder_hidden_size": 32, "num_labels": 2}


def bright_pixels(count: int) -> list[dict[str, Tensor]]:
    """Images of noise; the label of a pixel says whether its 4 x 4 patch is bright."""
    patches = torch.rand(count, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    return [{"pixel_values": one * 2 - 1, "labels": (one[0] > 0.5).long()} for one in patches]


def trainer(model: Any, folder: Path, data: list[dict[str, Tensor]], **options: Any) -> Trainer:
    settings = {"learning_rate": 3e-3, "per_device_train_batch_size": 8, "max_steps": 25, "logging_steps": 5, **options}
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", **settings
    )
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)


@pytest.mark.parametrize(
    "attention", [{"attention_type": "hamming"}, {"attention_type": "sign", "bit_gradient": "ternary"}]
)
def test_the_loss_falls(attention, tmp_path):
    model = bf.BinaryFormerForSemanticSegmentation(bf.BinaryFormerConfig(**TINY, **attention))
    work = trainer(model, tmp_path, bright_pixels(16))
    before = work.evaluate()["eval_loss"]
    work.train()
    assert work.evaluate()["eval_loss"] < 0.7 * before
    work.save_model(tmp_path / "saved")
    again = bf.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in model.state_dict().items())


def test_a_classifier(tmp_path):
    labels = torch.arange(16) % 2
    data = [{"pixel_values": torch.randn(1, 16, 16) + 2 * one - 1, "labels": one} for one in labels]
    model = bf.BinaryFormerForImageClassification(bf.BinaryFormerConfig(**TINY, attention_type="sign"))
    work = trainer(model, tmp_path, data)
    before = work.evaluate()["eval_loss"]
    work.train()
    assert work.evaluate()["eval_loss"] < 0.7 * before


def test_accumulated_batches_are_one_large_batch(tmp_path):
    """The loss is a mean over pixels, so the Trainer has to divide by the number of batches."""
    data, ends = bright_pixels(4), []
    for size, batches in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        model = bf.BinaryFormerForSemanticSegmentation(bf.BinaryFormerConfig(**TINY, attention_type="hamming"))
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": batches, "max_steps": 1}
        trainer(model, tmp_path, data, optim="sgd", max_grad_norm=0, **options).train()
        ends.append(model.state_dict())
    for name, one in ends[0].items():
        torch.testing.assert_close(one, ends[1][name], rtol=1e-4, atol=1e-6, msg=lambda said, n=name: f"{n}: {said}")
