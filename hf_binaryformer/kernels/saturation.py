"""Inputs of the token-weight networks: saturated tokens and their signs (paper Eq. 1 and 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_binaryformer.kernels.backends import first_result
from hf_binaryformer.kernels.differentiation import differentiable


def saturate_and_sign(x: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """tanh(beta x) and sgn(x), sgn(0) = +1, in one pass if a backend computes them.

    Args:
        x: (N, D) real numbers, any strides.
        beta: steepness of the saturation.

    Returns:
        Two tensors like x. Gradients reach x only through the first.
    """
    return _differentiable(x, beta)


@torch.library.custom_op("hf_binaryformer::saturate_and_sign", mutates_args=())
def _saturate_and_sign(x: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The registered op."""
    if (found := first_result("saturate_and_sign", x, beta)) is not None:
        return found
    return torch.tanh(beta * x), torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


@_saturate_and_sign.register_fake
def _(x: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    ctx.beta = inputs[1]  # type: ignore[attr-defined]
    ctx.save_for_backward(output[0])


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _sign_grad: Tensor) -> tuple[Tensor, None]:
    (tanh,) = ctx.saved_tensors  # type: ignore[attr-defined]
    return torch.ops.aten.tanh_backward(grad, tanh).mul_(ctx.beta), None  # type: ignore[attr-defined]


_differentiable = differentiable(_saturate_and_sign, _backward, _setup_context)
