"""A comparison of a GPU backend with the reference on a small problem, before its numbers are used."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_binaryformer.kernels.backends import own_precision
from hf_binaryformer.kernels.bits import pack_sign_bits
from hf_binaryformer.kernels.masks import backward_by_sample, forward_by_sample
from hf_binaryformer.kernels.reference import reference_backward, reference_forward

VARIABLE = "HF_BINARYFORMER_SELF_CHECK"
ENABLED = os.environ.get(VARIABLE) != "0" and os.environ.get("TRITON_INTERPRET") != "1"
# Names of GPUs (torch.cuda.get_device_name) that have a record in model_cards/evidence/kernels: nothing is compared there.
MEASURED: frozenset[str] = frozenset()
# What the comparison found for each kind of problem.
CHECKED: dict[Any, bool] = {}
# Several tiles, none of them full at the end. The second head has small weights, so that no score is large: kernels may
# treat such rows in another way.
QUERIES, KEYS, HEADS, BATCH = 150, 201, 2, 2
SMALL = 0.03
# Largest norm(found - expected) / norm(expected) of outputs and gradients, and of those made of random draws, some of which
# a difference of rounding tips. TF32 rounds at 2^-11, which float32 must not pass with.
TOLERANCES = {torch.float32: (1e-4, 0.1), torch.bfloat16: (5e-2, 0.3), torch.float16: (1e-2, 0.3)}
PARTS = ("query weights", "key weights", "values", "queries", "keys")
NAMES = ("the output", "the log-sum-exp", *(f"the gradient of {part}" for part in PARTS))


@dataclass(frozen=True)
class Kind:
    """Problems that one compiled kernel computes.

    Args:
        device: where.
        head_dim, value_dim: channels.
        planes: 1, or 2 for two Bernoulli samples.
        dtype: of the values.
        bit_gradient: "none", "ste" or "ternary".
        weight_gradient: whether weights get gradients.
        masked: whether only some of the keys take part.
    """

    device: torch.device
    head_dim: int
    value_dim: int
    planes: int
    dtype: torch.dtype
    bit_gradient: str
    weight_gradient: bool
    masked: bool


@dataclass(frozen=True)
class BalanceKind:
    """The same for :func:`hf_binaryformer.kernels.balance.balance`."""

    device: torch.device
    dtype: torch.dtype
    channels: int
    centering: bool
    norm: bool


def trusted(kind: Kind | BalanceKind, compare: Callable[[], str | None]) -> bool:
    """Whether kernels may compute this kind of problem: they have been measured on the device, or agree with the reference.

    The comparison is made once in a process, and warns if they differ or cannot run. While a CUDA graph is captured none can
    be made; a kind that was not compared before may run then.

    Args:
        kind: of problem.
        compare: says where the kernels differ from the reference; None if they agree.
    """
    if not ENABLED:
        return True
    if kind not in CHECKED:
        if kind.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return True
        CHECKED[kind] = _agrees(kind, compare)
    return CHECKED[kind]


def _agrees(kind: Kind | BalanceKind, compare: Callable[[], str | None]) -> bool:
    name = torch.cuda.get_device_name(kind.device) if kind.device.type == "cuda" else kind.device.type
    if name in MEASURED:
        return True
    try:
        found = compare()
    except Exception as error:  # the compiler's and the driver's errors have no common class
        found = f"{type(error).__name__}: {error}"
    if found is None:
        return True
    warnings.warn(
        f"the Triton kernels disagree with the reference on {name} ({kind}): {found}. The reference is used, which is "
        f"slower. Please report this line with Triton {getattr(sys.modules.get('triton'), '__version__', 'unknown')} and "
        f"torch {torch.__version__}; {VARIABLE}=0 turns the comparison off",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def difference(forward: Callable[..., Any], backward: Callable[..., Any], kind: Kind) -> str | None:
    """Where a backend's functions differ from the reference, in words; None if they agree.

    Args:
        forward, backward: as in :class:`~hf_binaryformer.kernels.backends.Backend`.
        kind: of problem.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with own_precision(kind.device):
            return _difference(forward, backward, kind)
    finally:
        torch.set_float32_matmul_precision(precision)


def balance_difference(
    balance: Callable[..., Any],
    balance_backward: Callable[..., Any],
    reference: tuple[Callable[..., Any], ...],
    kind: BalanceKind,
) -> str | None:
    """The same for balanced bits; ``reference`` has both functions of :mod:`hf_binaryformer.kernels.balance`."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (
        torch.randn(BATCH, KEYS, HEADS, kind.channels, generator=generator).transpose(1, 2).to(kind.device, kind.dtype)
        for _ in range(2)
    )
    rule = kind.centering, kind.norm
    y, bits, factors = balance(x, *rule)
    expected, _, wanted_factors = reference[0](x, *rule)
    found = (y, factors, balance_backward(y, grad, factors, *rule, 1.0))
    wanted = (expected, wanted_factors, reference[1](grad, y, factors, *rule, 1.0))
    names = ("the balanced numbers", "the norms", "the gradient")
    for name, one, other in zip(names, found, wanted, strict=True):
        error = float((one.float() - other.float()).norm() / other.float().norm())
        if not error <= TOLERANCES[kind.dtype][0]:
            return f"{name}: off by {error:.2g} of their size, {TOLERANCES[kind.dtype][0]:g} allowed"
    if not torch.equal(bits.cpu(), pack_sign_bits(y.cpu())):
        return "bits are not the signs of the balanced numbers"
    return None


def _difference(forward: Callable[..., Any], backward: Callable[..., Any], kind: Kind) -> str | None:
    generator = torch.Generator().manual_seed(0)

    def draw(tokens: int, *channels: int) -> Tensor:
        """(B, H, tokens, channels), heads adjacent in memory as a projection leaves them."""
        return torch.randn(BATCH, tokens, HEADS, *channels, generator=generator).transpose(1, 2).to(kind.device)

    plane = () if kind.planes == 1 else (kind.planes,)
    reals = [draw(tokens, *plane, kind.head_dim) for tokens in (QUERIES, KEYS)]
    bits = [pack_sign_bits(real) for real in reals]
    for real, packed in zip(reals, bits, strict=True):
        if not torch.equal(packed.cpu(), pack_sign_bits(real.cpu())):
            return "bits are packed in another way"
    weights = [draw(tokens, *plane) for tokens in (QUERIES, KEYS)]
    for weight in weights:
        weight[:, 1] *= SMALL
    value, grad_output = (draw(tokens, kind.value_dim).to(kind.dtype) for tokens in (KEYS, QUERIES))
    inputs = *bits, *weights, value
    scale = kind.head_dim**-0.5
    options = torch.tensor(1), kind.head_dim, scale, kind.bit_gradient, kind.weight_gradient
    close, drawn = TOLERANCES[kind.dtype]
    ways: tuple[Callable[..., Any], ...] = reference_forward, reference_backward
    last: tuple[Tensor, ...] = ()
    if kind.masked:
        ways = partial(forward_by_sample, reference_forward), partial(backward_by_sample, reference_backward)
        last = (torch.tensor([KEYS - sample - KEYS // 3 for sample in range(BATCH)], device=kind.device),)

    def results(way: Callable[..., Any], back: Callable[..., Any]) -> tuple[Tensor, ...]:
        output, logsumexp = way(*inputs, kind.head_dim, scale, *last)
        return output, logsumexp, *back(grad_output, *inputs, output, logsumexp, None, *options, *last)

    pairs = zip(results(forward, backward), results(*ways), strict=True)
    for place, (name, both) in enumerate(zip(NAMES, pairs, strict=True)):
        if not both[1].numel():
            continue
        allowed = drawn if place >= 5 and kind.bit_gradient == "ternary" else close
        for head in range(HEADS):
            found, expected = (tensor[:, head].float() for tensor in both)
            error = float((found - expected).norm() / expected.norm())
            if not error <= allowed:
                return f"{name} is off by {error:.2g} of its size, {allowed:g} allowed"
    return None
