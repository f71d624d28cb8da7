"""Differentiation of the registered operators: ``backward()``, ``torch.func``, and errors for what is not implemented.

The formula that is registered with ``torch.library`` serves ``backward()`` and compiled or exported graphs. It cannot run
under ``torch.func``, and it drops the tangents of forward-mode differentiation, which then are 0. The same formula in an
``autograd.Function`` does neither, so that is what Python code calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.library import CustomOpDef


def differentiable(
    operator: CustomOpDef, backward: Callable[..., Any] | None = None, setup_context: Callable[..., None] | None = None
) -> Callable[..., Any]:
    """Register the gradient of an operator.

    Args:
        operator: what ``torch.library.custom_op`` made.
        backward, setup_context: as in ``torch.autograd.Function``. None for the operator of a backward pass, whose own
            gradient would be a second derivative: it raises NotImplementedError.

    Returns:
        The function to call in place of the operator, with positional arguments only.
    """
    name = operator._qualname

    def no_second_derivative(ctx: Any, *gradients: Any) -> NoReturn:
        raise NotImplementedError(
            f"{name}: a second derivative was asked for, and only first ones are implemented; "
            f"do not differentiate its gradient (create_graph=True)"
        )

    class Differentiable(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments: Any) -> Any:
            return operator(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if setup_context is not None:
                setup_context(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return (backward or no_second_derivative)(ctx, *gradients)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> NoReturn:
            raise NotImplementedError(
                f"{name}: forward-mode differentiation (jvp, jacfwd, dual tensors) is not implemented; "
                f"use reverse mode, torch.func.grad or backward()"
            )

    operator.register_autograd(backward or no_second_derivative, setup_context=setup_context)

    def call(*arguments: Any) -> Any:
        # A compiled or exported graph should hold the operator itself. Dynamo traces no function that has a jvp, so that
        # it leaves a call under torch.func to Python.
        if torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
            return operator(*arguments)
        return Differentiable.apply(*arguments)

    return call
