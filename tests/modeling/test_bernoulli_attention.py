"""`hamming_bernoulli`: two random sign samples for queries and keys, weighted by their distances (paper Sec. 2.2)."""

from typing import Any

import pytest
import torch
from attention_oracle import (
    DIM,
    HEAD_DIM,
    HEADS,
    VALUE_DIM,
    assert_same_results,
    finish,
    make_attention,
    make_config,
    output_and_gradients,
    project,
    sigma,
    tokens,
)
from torch import Tensor

import hf_binaryformer.modeling.attention_forms as attention_module
from hf_binaryformer.kernels import unpack_sign_bits
from hf_binaryformer.modeling.attention import BinaryAttention


class Recorder:
    """Stands before `hamming_attention` and keeps what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Tensor, ...]] = []
        self.real = attention_module.hamming_attention
        monkeypatch.setattr(attention_module, "hamming_attention", self)

    def __call__(self, *args: Tensor, **options: Any) -> Tensor:
        self.calls.append(args)
        return self.real(*args, **options)


def dense_bernoulli(module: BinaryAttention, x: Tensor, query_bits: Tensor, key_bits: Tensor) -> Tensor:
    """y* = w1 y1 + w2 y2 with w1 = d2 / (d1 + d2), d = mean abs(sigma(q) - y), for samples y drawn by the module."""
    query, key, value = project(module, x)
    interpolated = []
    for real, bits in ((sigma(query), query_bits), (sigma(key), key_bits)):
        first, second = unpack_sign_bits(bits, HEAD_DIM, dtype=torch.float64).unbind(3)
        d_first, d_second = (real - first).abs().mean(-1), (real - second).abs().mean(-1)
        w_first, w_second = d_second / (d_first + d_second), d_first / (d_first + d_second)
        interpolated.append(w_first[..., None] * first + w_second[..., None] * second)
    scores = module.config.logit_scale * interpolated[0] @ interpolated[1].transpose(-1, -2) / HEAD_DIM**0.5
    if module.config.learned_logit_scale:
        scores = scores * torch.exp(module.log_scale)[:, None, None]
    per_head = scores.softmax(-1) @ value
    if module.config.bernoulli_transpose_heads:
        return finish(module, per_head)
    mixed = per_head.reshape(x.shape[0], x.shape[1], HEADS * VALUE_DIM)
    return mixed @ module.proj.weight.T + module.proj.bias


@pytest.mark.parametrize(
    "fields", [{}, {"logit_scale": 4.0}, {"learned_logit_scale": True}, {"bernoulli_transpose_heads": False}]
)
def test_bernoulli_given_its_samples(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_config("hamming_bernoulli").bernoulli_transpose_heads
    recorder = Recorder(monkeypatch)
    module, x = make_attention("hamming_bernoulli", **fields), tokens()
    actual = output_and_gradients(module, module(x), x)
    query_bits, key_bits = recorder.calls[0][:2]
    expected = output_and_gradients(module, dense_bernoulli(module, x, query_bits, key_bits), x)
    assert_same_results(actual, expected)


def test_bernoulli_samples_have_the_right_mean_and_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    """psgn(x) is +1 with probability clip((x + 1) / 2, 0, 1), x = sigma(q), twice for queries and twice for keys."""
    recorder = Recorder(monkeypatch)
    module, x = make_attention("hamming_bernoulli"), tokens()
    with torch.no_grad():
        # sigma rises with slope 2 at zero: small queries and keys, so that many probabilities are neither 0 nor 1.
        module.qkv.weight[: 2 * DIM] *= 0.2
        module.qkv.bias[: 2 * DIM] *= 0.2
        query, key, _ = project(module, x)
        for _ in range(400):
            module(x)
    sides = []
    for side, real in ((0, query), (1, key)):
        samples = torch.stack([unpack_sign_bits(call[side], HEAD_DIM, torch.float64) for call in recorder.calls])
        mean = sigma(real).clamp(-1, 1).unsqueeze(3).expand(*samples.shape[1:])
        deviation = (1 - mean.square()).sqrt()
        assert ((samples.mean(0) - mean).abs() <= 5 * deviation / 20 + 1e-12).all()
        assert (deviation > 0.1).double().mean() > 0.5
        standardised = (samples - mean) / deviation.clamp_min(1e-9)
        uncertain = deviation[:, :, :, 0] > 0.1
        between = (standardised[:, :, :, :, 0] * standardised[:, :, :, :, 1]).mean(0)[uncertain]
        assert between.abs().max() < 6.5 / 20, "the two samples of a token are independent"
        sides.append((standardised[:, :, :, :, 0], uncertain))
    both = sides[0][1] & sides[1][1]
    across = (sides[0][0] * sides[1][0]).mean(0)[both]
    assert across.abs().max() < 6.5 / 20, "queries and keys are drawn independently"


def test_bernoulli_with_saturated_inputs_is_sign_attention() -> None:
    """abs(sigma(q)) >= 1 leaves nothing to chance: both samples are sgn(q), and their weights add up to one."""
    bernoulli, signed = make_attention("hamming_bernoulli"), make_attention("sign")
    signed.load_state_dict(bernoulli.state_dict())
    with torch.no_grad():
        for module in (bernoulli, signed):
            module.qkv.weight[: 2 * DIM] *= 1000
    x = tokens()
    torch.testing.assert_close(bernoulli(x), signed(x))


def test_bernoulli_repeats_with_a_generator() -> None:
    module, x = make_attention("hamming_bernoulli").eval(), tokens()

    def run(seed: int) -> Tensor:
        module.generator = torch.Generator().manual_seed(seed)
        return module(x)

    first = run(1)
    torch.randn(5)
    assert torch.equal(first, run(1))
    assert not torch.equal(first, run(2))
