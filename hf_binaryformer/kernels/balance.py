r"""Balanced bits: each channel of queries and keys has about as many tokens on one side of 0 as on the other.

For x (B, H, N, d), separately for each head of each sample:

    c_n = x_n - mean_n x_n                             (centring)
    y_n = c_n / sqrt(mean_d c_nd^2 + EPSILON)          (norm)
    bits = y >= 0

Backward, with g = dL/dy where abs(y) <= window and 0 elsewhere, and r_n the divisor of y_n:

    dc_n = (g_n - y_n mean_d(g_nd y_nd)) / r_n,  dx_n = dc_n - mean_n dc_n

A bit that is the same for most tokens hardly distinguishes them, and little gradient passes back through it. Softmax
attention does not change when all keys are shifted, but bits do. The mean of a single token is the token itself: after
centring it is 0, all its bits are +1, and it gets no gradient. The mean is over all tokens of one sample, including
class tokens and excluding padding. It costs O(N d).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_binaryformer.kernels.backends import first_result
from hf_binaryformer.kernels.bits import pack_sign_bits, words_for
from hf_binaryformer.kernels.checks import on_one_device
from hf_binaryformer.kernels.differentiation import differentiable
from hf_binaryformer.kernels.layout import compute_dtype, token_major

# Added to the mean square, so that a token of zeros stays a token of zeros.
EPSILON = 1e-6


def balance(
    x: Tensor,
    *,
    centering: bool = True,
    norm: bool = True,
    window: float | None = None,
    token_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Centre and normalise queries or keys, and pack the signs (formulas in this module's docstring).

    Args:
        x: (B, H, N, d) real numbers, any strides.
        centering: whether to subtract from each channel its mean over the tokens.
        norm: whether to divide each token's channels by their root mean square.
        window: gradients pass where abs(y) <= window, like the straight-through gradient of a sign (paper Eq. 3); None:
            all pass. A caller that sets it must call the operator without a window
            (``hamming_attention(..., window=None)``).
        token_mask: (B, N) bool, False for padding, which takes no part in the mean; None: all tokens do.

    Returns:
        y (B, H, N, d) like x, differentiable, and its bits (B, H, N, words) int64 of :func:`pack_sign_bits`.

    Raises:
        ValueError: x does not have these axes, or is not of real numbers, or the mask does not fit.

    Example:
        >>> y, bits = balance(torch.randn(1, 2, 100, 24))
        >>> (y >= 0).float().mean(2).sub(0.5).abs().max() < 0.2  # each channel is on both sides of 0
        tensor(True)
    """
    if x.dim() != 4 or not x.is_floating_point() or x.shape[-1] < 1:
        raise ValueError(f"x has shape {tuple(x.shape)} and type {x.dtype}, expected real numbers (B, H, N, d)")
    if token_mask is not None:
        x = _padded_with_mean(x, token_mask)
    return _differentiable(x, centering, norm, math.inf if window is None else window)[:2]


def _padded_with_mean(x: Tensor, token_mask: Tensor) -> Tensor:
    """Replace padding by the mean of the other tokens, so that it changes no mean."""
    if token_mask.dtype != torch.bool or token_mask.shape != (x.shape[0], x.shape[2]):
        raise ValueError(
            f"token_mask has shape {tuple(token_mask.shape)} and type {token_mask.dtype}, expected bool (B, N) = "
            f"{(x.shape[0], x.shape[2])}"
        )
    kept = token_mask[:, None, :, None]
    mean = torch.where(kept, x, 0).sum(2, keepdim=True, dtype=compute_dtype(x)) / kept.sum(2, keepdim=True).clamp_min(1)
    return torch.where(kept, x, mean.to(x.dtype))


@torch.library.custom_op("hf_binaryformer::balance", mutates_args=())
def _balance(x: Tensor, centering: bool, norm: bool, window: float) -> tuple[Tensor, Tensor, Tensor]:
    """The registered op: y, bits, and the factor of each token (B, H, N)."""
    if (found := first_result("balance", x, centering, norm)) is not None:
        return found
    return reference_balance(x, centering, norm)


@_balance.register_fake
def _(x: Tensor, centering: bool, norm: bool, window: float) -> tuple[Tensor, Tensor, Tensor]:
    bits = x.new_empty((*x.shape[:3], words_for(x.shape[3])), dtype=torch.int64)
    return token_major(x, x.shape, x.dtype), bits, x.new_empty(x.shape[:3], dtype=compute_dtype(x))


@torch.library.custom_op("hf_binaryformer::balance_backward", mutates_args=())
@on_one_device
def _balance_backward(
    grad: Tensor, y: Tensor, inverse_rms: Tensor, centering: bool, norm: bool, window: float
) -> Tensor:
    """Gradient of x, in the type of y."""
    if (found := first_result("balance_backward", y, grad, inverse_rms, centering, norm, window)) is not None:
        return found
    return reference_balance_backward(grad, y, inverse_rms, centering, norm, window)


@_balance_backward.register_fake
@on_one_device
def _(grad: Tensor, y: Tensor, inverse_rms: Tensor, centering: bool, norm: bool, window: float) -> Tensor:
    return token_major(y, y.shape, y.dtype)


_differentiable_backward = differentiable(_balance_backward)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    ctx.options = inputs[1:]  # type: ignore[attr-defined]
    ctx.save_for_backward(output[0], output[2])


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_others: Tensor) -> tuple[Tensor | None, ...]:
    y, inverse_rms = ctx.saved_tensors  # type: ignore[attr-defined]
    return _differentiable_backward(grad, y, inverse_rms, *ctx.options), None, None, None  # type: ignore[attr-defined]


_differentiable = differentiable(_balance, _backward, _setup_context)


def reference_balance(x: Tensor, centering: bool, norm: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Readable forward on any device."""
    c = x.to(compute_dtype(x))
    if centering and x.shape[2]:
        c = c - c.mean(2, keepdim=True)
    inverse_rms = (c.square().mean(-1) + EPSILON).rsqrt() if norm else c.new_ones(c.shape[:3])
    y = token_major(x, x.shape, x.dtype).copy_(c * inverse_rms[..., None])
    return y, pack_sign_bits(y), inverse_rms


def reference_balance_backward(
    grad: Tensor, y: Tensor, inverse_rms: Tensor, centering: bool, norm: bool, window: float
) -> Tensor:
    """Readable backward on any device."""
    dtype = compute_dtype(y)
    real = y.to(dtype)
    g = torch.where(real.abs() <= window, grad.to(dtype), 0.0)
    if norm:
        g = (g - real * (g * real).mean(-1, keepdim=True)) * inverse_rms[..., None].to(dtype)
    if centering and y.shape[2]:
        g = g - g.mean(2, keepdim=True)
    return token_major(y, y.shape, y.dtype).copy_(g)
