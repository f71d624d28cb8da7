"""Dropout acts in training and at no other time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_oracle import DIM, HEADS, make_config
from torch import Tensor, nn

from hf_binaryformer.modeling.attention import BinaryAttention
from hf_binaryformer.modeling.attention_forms import PADDED_TOKENS
from hf_binaryformer.modeling.binarize import binarize_attention
from hf_binaryformer.modeling.vq_transformer import BinaryVQTransformer3DModel

RATE = 0.5


def attention(form: str, **dropout: float) -> Callable[[float], nn.Module]:
    return lambda rate: BinaryAttention(
        DIM, HEADS, config=make_config(form), **{name: rate for name in dropout or {"proj_drop": rate}}
    )


def transformer(rate: float) -> nn.Module:
    sizes = {"grid_size": (2, 3, 2), "num_codebooks": 2, "codebook_size": 5, "embedding_dim": 8}
    return BinaryVQTransformer3DModel(**sizes, num_layers=2, num_heads=2, value_head_dim=4, dropout=rate)


def binarized(rate: float) -> nn.Module:
    import timm

    sizes = {"img_size": 32, "depth": 2, "num_classes": 3}
    return binarize_attention(timm.create_model("vit_tiny_patch16_224", pretrained=False, proj_drop_rate=rate, **sizes))


def some_tokens() -> Tensor:
    return torch.randn(2, 11, DIM)


MODELS: dict[str, tuple[Callable[[float], nn.Module], Callable[[], Tensor]]] = {
    "softmax, probabilities": (attention("softmax", attn_drop=RATE), some_tokens),
    "softmax, long": (attention("softmax", attn_drop=RATE), lambda: torch.randn(1, PADDED_TOKENS, DIM)),
    "softmax, output": (attention("softmax", proj_drop=RATE), some_tokens),
    "hamming": (attention("hamming"), some_tokens),
    "sign": (attention("sign"), some_tokens),
    "token transformer": (transformer, lambda: torch.randint(6, (2, 2, 2, 3, 2))),
    "binarized timm": (binarized, lambda: torch.randn(2, 3, 32, 32)),
}


def run(model: nn.Module, x: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        output = model(x)
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("name", MODELS)
def test_in_training_only(name) -> None:
    make, draw = MODELS[name]
    dropped, plain, x = make(RATE), make(0.0), draw()
    plain.load_state_dict(dropped.state_dict())
    expected = run(plain.eval(), x, 0)
    dropped.train()
    in_training = run(dropped, x, 0)
    assert not torch.allclose(in_training, expected)
    assert not torch.equal(in_training, run(dropped, x, 1)), "another draw"
    assert torch.equal(in_training, run(dropped, x, 0)), "torch's generator decides"
    dropped.eval()
    assert torch.equal(run(dropped, x, 0), expected) and torch.equal(run(dropped, x, 1), expected)


def test_dropped_probabilities_have_the_right_mean() -> None:
    """A rate of p scales what is left by 1 / (1 - p): the mean over draws is the output without dropout."""
    module = attention("softmax", attn_drop=RATE)(0.3).double().train()
    x = torch.randn(1, 7, DIM, dtype=torch.float64)
    draws = torch.stack([run(module, x, seed) for seed in range(2000)])
    error = draws.mean(0) - run(module.eval(), x, 0)
    assert (error.abs() <= 5 * draws.std(0) / len(draws) ** 0.5).all()
