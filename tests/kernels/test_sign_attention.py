"""Attention of plain tensors against floating-point attention of their signs, and backends that others register."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hamming_cases import make_case
from torch import Tensor

from hf_binaryformer.kernels import (
    Backend,
    available_backends,
    backend_report,
    backends,
    hamming_attention,
    pack_sign_bits,
    register_backend,
    sign_attention,
)
from hf_binaryformer.kernels.reference import reference_backward, reference_forward


class StraightThroughSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * (ctx.saved_tensors[0].abs() <= 1)


def tensors(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = ((2, 3, 7, 20), (2, 3, 11, 20), (2, 3, 11, 5))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("scale", [None, 0.7])
def test_it_is_softmax_attention_of_signs(scale: float | None) -> None:
    query, key, value = tensors()
    cotangent = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    got = sign_attention(query, key, value, bit_gradient="ste", scale=scale)
    scores = (
        StraightThroughSign.apply(query) @ StraightThroughSign.apply(key).mT * (20**-0.5 if scale is None else scale)
    )
    wanted = scores.softmax(-1) @ value
    torch.testing.assert_close(got, wanted)
    for one, other in zip(
        *(torch.autograd.grad(out, (query, key, value), cotangent) for out in (got, wanted)), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_all_three_learn_by_default() -> None:
    query, key, value = tensors(torch.float32)
    sign_attention(query, key, value, seed=3).square().sum().backward()
    for one in (query, key, value):
        assert one.grad is not None and one.grad.abs().sum() > 0
    # The draws are of the seed.
    first = query.grad.clone()
    query.grad = None
    sign_attention(query, key, value, seed=3).square().sum().backward()
    assert torch.equal(first, query.grad)
    query.grad = None
    sign_attention(query, key, value, seed=4).square().sum().backward()
    assert not torch.equal(first, query.grad)


def test_without_bit_gradient_only_values_learn() -> None:
    query, key, value = tensors(torch.float32)
    sign_attention(query, key, value, bit_gradient="none").sum().backward()
    assert query.grad is None and key.grad is None and value.grad is not None


@pytest.fixture
def calls(monkeypatch) -> Iterator[list[str]]:
    """A backend of somebody else, preferred to all others, that computes no bfloat16; what it was asked for."""
    monkeypatch.setattr(backends, "_registered", dict(backends._registered))
    asked: list[str] = []

    def forward(*inputs):
        asked.append("forward")
        return None if inputs[4].dtype == torch.bfloat16 else reference_forward(*inputs)

    def backward(*inputs):
        asked.append("backward")
        return None if inputs[5].dtype == torch.bfloat16 else reference_backward(*inputs)

    def pack(x):
        asked.append("pack")
        return None

    register_backend(Backend("abacus", forward, backward, pack, priority=99, description="beads"))
    yield asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backend_of_others_is_preferred_and_falls_back(calls: list[str], dtype: torch.dtype) -> None:
    assert available_backends()[0] == "abacus" and backend_report()["abacus"] == "available: beads"
    case = make_case(dtype=dtype)
    inputs = [t.clone().requires_grad_(t.is_floating_point()) for t in case.inputs()]
    results = []
    for backend in (None, "reference"):
        out = hamming_attention(*inputs, head_dim=case.head_dim, backend=backend)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs[2:])])
    assert calls == ["forward", "backward"]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_packing_goes_on_to_the_next_backend(calls: list[str]) -> None:
    assert pack_sign_bits(torch.tensor([[0.5, -1.0, 0.0]])).tolist() == [[5]]
    assert calls == ["pack"]
