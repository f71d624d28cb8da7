"""Device code and launches of the backend "triton" for balanced bits (formulas: ``balance.py``).

A mean over tokens is a sum of sums of blocks of tokens, in an order that does not change, so results repeat. What would need a
second pass over stored numbers is computed twice instead, because reading is what takes the time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_binaryformer.kernels import self_check
from hf_binaryformer.kernels.balance import EPSILON, reference_balance, reference_balance_backward
from hf_binaryformer.kernels.bits import words_for
from hf_binaryformer.kernels.layout import channels_adjacent, token_major
from hf_binaryformer.kernels.self_check import BalanceKind, balance_difference
from hf_binaryformer.kernels.triton_draws import place_of
from hf_binaryformer.kernels.triton_tiles import INTERPRETED, on_its_device, padded

# Numbers that a program holds at once.
TILE = 8192


@triton.jit
def _rows(x, b, h, i, tokens, x_b, x_h, x_n, DIM: tl.constexpr, D: tl.constexpr):
    """Load tokens (rows, D) of one head as float32; 0 beyond the last token and channel."""
    channel = tl.arange(0, D)
    place = x + b * x_b + h * x_h + i.to(tl.int64)[:, None] * x_n + channel[None, :]
    return tl.load(place, mask=(i < tokens)[:, None] & (channel < DIM)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store(x, value, b, h, i, tokens, x_b, x_h, x_n, DIM: tl.constexpr, D: tl.constexpr):
    channel = tl.arange(0, D)
    place = x + b * x_b + h * x_h + i.to(tl.int64)[:, None] * x_n + channel[None, :]
    tl.store(place, value, mask=(i < tokens)[:, None] & (channel < DIM)[None, :])


@triton.jit
def sum_tokens(
    x, sums, heads, tokens, blocks, x_b, x_h, x_n, DIM: tl.constexpr, D: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """Sums (B·H, blocks, D) float32 of R tokens each of x (B, H, tokens, DIM)."""
    tile, group = place_of(tokens, R)
    i = tile * R + tl.arange(0, R)
    found = tl.sum(_rows(x, group // heads, group % heads, i, tokens, x_b, x_h, x_n, DIM, D), 0)
    tl.store(sums + (group * blocks + tile) * D + tl.arange(0, D), found)


@triton.jit
def balance_rows(
    x, means, y, bits, inverse_rms, heads, tokens, x_b, x_h, x_n, y_b, y_h, y_n, epsilon,
    DIM: tl.constexpr, D: tl.constexpr, WORDS: tl.constexpr, R: tl.constexpr, CENTERING: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Centre, normalise and round R tokens of one head, and pack the signs of what was rounded; D is a multiple of 64."""
    tile, group = place_of(tokens, R)
    b, h = group // heads, group % heads
    i = tile * R + tl.arange(0, R)
    channel = tl.arange(0, D)
    c = _rows(x, b, h, i, tokens, x_b, x_h, x_n, DIM, D)
    if CENTERING:
        c = tl.where((channel < DIM)[None, :], c - tl.load(means + group * D + channel)[None, :], 0.0)
    factor = tl.full((R,), 1.0, tl.float32)
    if NORM:
        factor = 1.0 / tl.sqrt(tl.sum(c * c, 1) / DIM + epsilon)
    found = (c * factor[:, None]).to(y.dtype.element_ty)
    _store(y, found, b, h, i, tokens, y_b, y_h, y_n, DIM, D)
    tl.store(inverse_rms + group * tokens + i, factor, mask=i < tokens)
    ones = ((found.to(tl.float32) >= 0) & (channel < DIM)[None, :]).to(tl.int64) << (channel % 64).to(tl.int64)[None, :]
    words = tl.sum(tl.reshape(ones, (R, D // 64, 64)), 2)
    word = tl.arange(0, D // 64)
    place = bits + (group * tokens + i)[:, None] * WORDS + word[None, :]
    tl.store(place, words, mask=(i < tokens)[:, None] & (word < WORDS)[None, :])


@triton.jit
def balance_gradient(
    y, grad, inverse_rms, sums, means, grad_x, heads, tokens, blocks,
    y_b, y_h, y_n, grad_b, grad_h, grad_n, grad_x_b, grad_x_h, grad_x_n, window,
    DIM: tl.constexpr, D: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr, SUMS: tl.constexpr, CENTERING: tl.constexpr,
):  # fmt: skip
    """The gradient before centring of R tokens of one head: its sum (SUMS), or the gradient of x, less the mean."""
    tile, group = place_of(tokens, R)
    b, h = group // heads, group % heads
    i = tile * R + tl.arange(0, R)
    channel = tl.arange(0, D)
    real = _rows(y, b, h, i, tokens, y_b, y_h, y_n, DIM, D)
    g = _rows(grad, b, h, i, tokens, grad_b, grad_h, grad_n, DIM, D)
    g = tl.where(tl.abs(real) <= window, g, 0.0)
    if NORM:
        factor = tl.load(inverse_rms + group * tokens + i, mask=i < tokens, other=0.0)
        g = (g - real * (tl.sum(g * real, 1) / DIM)[:, None]) * factor[:, None]
    if SUMS:
        tl.store(sums + (group * blocks + tile) * D + channel, tl.sum(g, 0))
    else:
        if CENTERING:
            g -= tl.load(means + group * D + channel)[None, :]
        _store(grad_x, g.to(grad_x.dtype.element_ty), b, h, i, tokens, grad_x_b, grad_x_h, grad_x_n, DIM, D)


def served(x: Tensor) -> bool:
    """Whether the kernels compute it: no float64, no empty tensor, d at most 1024."""
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.numel() > 0 and x.shape[-1] <= 1024


def trusted(x: Tensor, centering: bool, norm: bool) -> bool:
    """Whether the kernels may compute it on this device."""
    kind = BalanceKind(x.device, x.dtype, x.shape[-1], centering, norm)
    formulas = reference_balance, reference_balance_backward
    return self_check.trusted(kind, lambda: balance_difference(run_balance, run_balance_backward, formulas, kind))


def balance(x: Tensor, centering: bool, norm: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    """As :func:`hf_binaryformer.kernels.balance.reference_balance`; None for what :func:`served` excludes."""
    return run_balance(x, centering, norm) if served(x) and trusted(x, centering, norm) else None


@on_its_device
def run_balance(x: Tensor, centering: bool, norm: bool) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`balance` without questions."""
    x = channels_adjacent(x)
    batch, heads, tokens, dim = x.shape
    d, rows, blocks = _sizes(x)
    y = token_major(x, x.shape, x.dtype)
    bits = x.new_empty((batch, heads, tokens, words_for(dim)), dtype=torch.int64)
    inverse_rms = x.new_empty((batch, heads, tokens), dtype=torch.float32)
    grid, sizes = (blocks * batch * heads,), (heads, tokens)
    means = None
    if centering:
        sums = x.new_empty((batch * heads, blocks, d), dtype=torch.float32)
        sum_tokens[grid](x, sums, *sizes, blocks, *x.stride()[:3], DIM=dim, D=d, R=rows)
        means = sums.sum(1) / tokens
    balance_rows[grid](
        *(x, means, y, bits, inverse_rms, *sizes, *x.stride()[:3], *y.stride()[:3], EPSILON),
        **{"DIM": dim, "D": d, "WORDS": bits.shape[-1], "R": rows, "CENTERING": centering, "NORM": norm},
    )
    return y, bits, inverse_rms


def balance_backward(
    y: Tensor, grad: Tensor, inverse_rms: Tensor, centering: bool, norm: bool, window: float
) -> Tensor | None:
    """As :func:`hf_binaryformer.kernels.balance.reference_balance_backward`; None for what :func:`served` excludes."""
    if not served(y) or not trusted(y, centering, norm):
        return None
    return run_balance_backward(y, grad, inverse_rms, centering, norm, window)


@on_its_device
def run_balance_backward(
    y: Tensor, grad: Tensor, inverse_rms: Tensor, centering: bool, norm: bool, window: float
) -> Tensor:
    """:func:`balance_backward` without questions."""
    y, grad, inverse_rms = channels_adjacent(y), channels_adjacent(grad), inverse_rms.contiguous()
    batch, heads, tokens, dim = y.shape
    d, rows, blocks = _sizes(y)
    grad_x = token_major(y, y.shape, y.dtype)
    sums = means = None
    for sum_first in (True, False) if centering else (False,):
        if sum_first:
            sums = y.new_empty((batch * heads, blocks, d), dtype=torch.float32)
        elif sums is not None:
            means = sums.sum(1) / tokens
        balance_gradient[(blocks * batch * heads,)](
            *(y, grad, inverse_rms, sums, means, grad_x, heads, tokens, blocks),
            *(*y.stride()[:3], *grad.stride()[:3], *grad_x.stride()[:3], float(window)),
            **{"DIM": dim, "D": d, "R": rows, "NORM": norm, "SUMS": sum_first, "CENTERING": centering},
        )
    return grad_x


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Padded channels, tokens of a program, and the number of programs of a head."""
    d = padded(x.shape[3], 64)
    rows = max(1, min(TILE // d, padded(x.shape[2], 1) if INTERPRETED else 64))
    return d, rows, -(-x.shape[2] // rows)
