"""Gradient checkpointing of the models that are built on diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint


def recompute(block: Callable[..., Any], *inputs: Any) -> Any:
    """The output of a block, whose activations are computed a second time for its gradient."""
    return checkpoint(block, *inputs, use_reentrant=False)


class GradientCheckpointing:
    """Makes :func:`recompute` the default of diffusers' models; their own is a local function, which pickle refuses."""

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any] | None = None) -> None:
        """Compute the activations of each block a second time in place of keeping them.

        Args:
            gradient_checkpointing_func: called with a block and its inputs; None is :func:`recompute`.
        """
        super().enable_gradient_checkpointing(gradient_checkpointing_func or recompute)  # type: ignore[misc]
