"""Memory layout of the operator's tensors. Every backend must keep to it: the fakes promise it to ``torch.compile``."""

from __future__ import annotations

import torch
from torch import Tensor


def token_major(like: Tensor, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """An uninitialised (B, H, N, d) tensor with adjacent heads in memory, as in inputs and outputs of projections."""
    batch, heads, tokens, channels = shape
    return like.new_empty((batch, tokens, heads, channels), dtype=dtype).transpose(1, 2)


def channels_adjacent(x: Tensor) -> Tensor:
    """The tensor with its channels adjacent in memory; a copy if they are not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def compute_dtype(value: Tensor) -> torch.dtype:
    """Type of the log-sum-exp and of all gradients except the value's: float32, or float64 for float64 values."""
    return torch.promote_types(value.dtype, torch.float32)


def zero_gradients(
    query_bits: Tensor,
    key_bits: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value: Tensor,
    head_dim: int,
    bit_gradient: str,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Zeros for every gradient of the backward op; a gradient that is not requested is empty."""
    dtype = compute_dtype(value)
    bits = bit_gradient != "none"
    return (
        value.new_zeros(query_weight.shape if weight_gradient else (0,), dtype=dtype),
        value.new_zeros(key_weight.shape if weight_gradient else (0,), dtype=dtype),
        token_major(value, value.shape, value.dtype).zero_(),
        value.new_zeros((*query_bits.shape[:3], head_dim) if bits else (0,), dtype=dtype),
        value.new_zeros((*key_bits.shape[:3], head_dim) if bits else (0,), dtype=dtype),
    )
