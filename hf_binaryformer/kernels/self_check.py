"""A comparison of a backend with the reference on a small problem, before its numbers are used."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_binaryformer.kernels.bits import pack_sign_bits
from hf_binaryformer.kernels.masks import backward_by_sample, forward_by_sample
from hf_binaryformer.kernels.reference import reference_backward, reference_forward

# Several tiles, none of them full at the end.
QUERIES, KEYS, HEADS = 150, 201, 2
# Largest norm(found - expected) / norm(expected) of outputs and gradients, and of those made of random draws, some of which
# a difference of rounding tips.
TOLERANCES = {torch.float32: (1e-3, 0.1), torch.bfloat16: (5e-2, 0.3), torch.float16: (1e-2, 0.3)}
PARTS = ("query weights", "key weights", "values", "queries", "keys")
NAMES = ("the output", "the log-sum-exp", *(f"the gradient of {part}" for part in PARTS))


def difference(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    *,
    head_dim: int,
    value_dim: int,
    planes: int,
    dtype: torch.dtype,
    bit_gradient: str,
    masked: bool,
    device: torch.device,
) -> str | None:
    """Where a backend's functions differ from the reference, in words; None if they agree.

    Args:
        forward, backward: as in :class:`~hf_binaryformer.kernels.backends.Backend`.
        head_dim, value_dim, planes, dtype, bit_gradient: of the problem.
        masked: whether only some of the keys take part.
        device: where it is computed.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    plane = () if planes == 1 else (planes,)
    bits = [pack_sign_bits(draw(1, HEADS, tokens, *plane, head_dim)) for tokens in (QUERIES, KEYS)]
    weights = [draw(1, HEADS, tokens, *plane) for tokens in (QUERIES, KEYS)]
    value, grad_output = (draw(1, HEADS, tokens, value_dim).to(dtype) for tokens in (KEYS, QUERIES))
    inputs = *bits, *weights, value
    options = torch.tensor(1), head_dim, head_dim**-0.5, bit_gradient, True
    close, drawn = TOLERANCES[dtype]
    ways: tuple[Callable[..., Any], ...] = reference_forward, reference_backward
    last: tuple[Tensor, ...] = ()
    if masked:
        ways = partial(forward_by_sample, reference_forward), partial(backward_by_sample, reference_backward)
        last = (torch.tensor([2 * KEYS // 3], device=device),)

    def results(way: Callable[..., Any], back: Callable[..., Any]) -> tuple[Tensor, ...]:
        output, logsumexp = way(*inputs, head_dim, head_dim**-0.5, *last)
        return output, logsumexp, *back(grad_output, *inputs, output, logsumexp, None, *options, *last)

    pairs = zip(results(forward, backward), results(*ways), strict=True)
    for place, (name, (found, expected)) in enumerate(zip(NAMES, pairs, strict=True)):
        if not expected.numel():
            continue
        allowed = drawn if place >= 5 and bit_gradient == "ternary" else close
        error = float((found.float() - expected.float()).norm() / expected.float().norm())
        if not error <= allowed:
            return f"{name} is off by {error:.2g} of its size, {allowed:g} allowed"
    return None
