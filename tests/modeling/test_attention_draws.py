"""Which generator attention draws from: set for a model, for each sample, and repeated when a block is recomputed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_binaryformer as bf
from hf_binaryformer.modeling.attention import attention_modules, drawing_from

FORMS: dict[str, dict[str, Any]] = {
    "bernoulli": {"attention_type": "hamming_bernoulli"},
    "bernoulli, shared": {"attention_type": "hamming_bernoulli", "share_attention": True},
    "ternary": {"attention_type": "hamming", "bit_gradient": "ternary"},
    "sign, ternary": {"attention_type": "sign", "bit_gradient": "ternary"},
}


def encoder(**fields: Any) -> nn.Module:
    sizes = {"image_size": 16, "num_channels": 1, "hidden_size": 24, "num_heads": 2, "value_head_dim": 4}
    return bf.BinaryFormerModel(bf.BinaryFormerConfig(**sizes, num_hidden_layers=3, initializer_range=0.3, **fields))


def transformer(**fields: Any) -> nn.Module:
    sizes = {"grid_size": (2, 3, 2), "num_codebooks": 2, "codebook_size": 5, "embedding_dim": 8, "num_heads": 2}
    sizes |= {"num_layers": 3, "value_head_dim": 4, "initializer_range": 0.3, "dropout": 0.1}
    return bf.BinaryVQTransformer3DModel(**sizes, **fields)


def some_input(model: nn.Module, batch: int = 2) -> Tensor:
    if isinstance(model, bf.BinaryFormerModel):
        return torch.randn(batch, 1, 16, 16)
    return torch.randint(6, (batch, 2, 2, 3, 2))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def checkpoint(model: nn.Module, reentrant: bool) -> None:
    if isinstance(model, bf.BinaryFormerModel):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    else:

        def run(block: Any, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)

        model.enable_gradient_checkpointing(run)


def gradients(model: nn.Module, inputs: list[Tensor], generator: torch.Generator | None) -> list[Tensor]:
    """Of a loss over several forward passes, which all come before the backward pass."""
    model.set_attention_generator(generator)
    model.zero_grad()
    torch.manual_seed(11)
    loss = sum(model(x)[0].pow(3).mean() for x in inputs)
    # What is set in between must not reach the recomputation.
    model.set_attention_generator(seeded(99))
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("with_generator", [False, True])
@pytest.mark.parametrize("make", [encoder, transformer])
@pytest.mark.parametrize("form", FORMS)
def test_gradient_checkpointing_gives_the_same_gradients(form, make, with_generator, reentrant) -> None:
    model = make(**FORMS[form]).train()
    inputs = [some_input(model), some_input(model)]
    found, states = [], []
    for enabled in (False, True):
        if enabled:
            checkpoint(model, reentrant)
        generator = seeded(5) if with_generator else None
        found.append(gradients(model, inputs, generator))
        states.append(torch.empty(0) if generator is None else generator.get_state())
    assert len(found[0]) == len(found[1]) > 0
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain)
    assert torch.equal(*states), "the recomputation takes nothing from the generator"


@pytest.mark.parametrize("make", [encoder, transformer])
def test_one_generator_for_each_sample(make) -> None:
    """A sample's output does not depend on the others of its batch."""
    model = make(attention_type="hamming_bernoulli").eval()
    x = some_input(model, 3)
    model.set_attention_generator([seeded(1), seeded(2), seeded(3)])
    together = model(x)[0]
    for number, one in enumerate(together):
        model.set_attention_generator([seeded(1 + number)])
        torch.testing.assert_close(model(x[number : number + 1])[0][0], one)
    model.set_attention_generator([seeded(4), seeded(2), seeded(3)])
    again = model(x)[0]
    assert not torch.allclose(again[0], together[0])
    torch.testing.assert_close(again[1:], together[1:])


def test_as_many_generators_as_samples() -> None:
    model = encoder(attention_type="hamming_bernoulli").eval()
    model.set_attention_generator([seeded(1), seeded(2)])
    with pytest.raises(ValueError, match="2 generators for 3 samples"):
        model(some_input(model, 3))


def test_within_a_context_only() -> None:
    model = encoder(attention_type="hamming_bernoulli").eval()
    own, x = seeded(8), some_input(model)
    model.set_attention_generator(own)
    with drawing_from(model, seeded(1)):
        first = model(x)[0]
    with pytest.raises(RuntimeError, match="stop"), drawing_from(model, seeded(1)):
        assert torch.equal(model(x)[0], first)
        raise RuntimeError("stop")
    assert all(attention.generator is own for attention in attention_modules(model))
    assert torch.equal(own.get_state(), seeded(8).get_state())
