"""The timed training steps train."""

from __future__ import annotations

import dataclasses

import pytest

import training_step as benchmark_training
from hf_binaryformer.training.recipes import load_recipe


def test_the_baseline_is_plain_softmax_and_the_last_what_recipes_train():
    first, *_, last = benchmark_training.subjects("amos", 1)
    settings = load_recipe("amos", [])["model"]
    fields = ("attention_type", "bit_gradient", "learned_logit_scale")
    assert [getattr(first, field) for field in fields] == ["softmax", None, False]
    assert [getattr(last, field) for field in fields] == [settings[field] for field in fields]


@pytest.mark.slow
def test_timed_training_steps_train():
    """Every variant of training_step.py, on 16 x 16 pixels: the same batch again costs less after some steps."""
    for subject in benchmark_training.subjects("amos", 1):
        assert subject.tokens == 1601 and subject.dtype == "bfloat16" and subject.step
        step = dataclasses.replace(subject, tokens=5).prepare()
        losses = [step() for _ in range(4)]
        assert losses[-1] < losses[0], subject.name
