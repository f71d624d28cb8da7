"""How tensors of the operator lie in memory, which every backend has to keep to: the fakes promise it to ``torch.compile``."""

from __future__ import annotations

import torch
from torch import Tensor


def token_major(like: Tensor, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """An uninitialised (B, H, N, d) tensor whose heads lie side by side in memory, as projections give and take them."""
    batch, heads, tokens, channels = shape
    return like.new_empty((batch, tokens, heads, channels), dtype=dtype).transpose(1, 2)


def compute_dtype(value: Tensor) -> torch.dtype:
    """Type of the log-sum-exp and of all gradients but that of the value: float32, or float64 for float64 values."""
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
    """Zeros for every gradient of the backward op; a gradient that nobody asked for has no element."""
    dtype = compute_dtype(value)
    bits = bit_gradient != "none"
    return (
        value.new_zeros(query_weight.shape if weight_gradient else (0,), dtype=dtype),
        value.new_zeros(key_weight.shape if weight_gradient else (0,), dtype=dtype),
        token_major(value, value.shape, value.dtype).zero_(),
        value.new_zeros((*query_bits.shape[:3], head_dim) if bits else (0,), dtype=dtype),
        value.new_zeros((*key_bits.shape[:3], head_dim) if bits else (0,), dtype=dtype),
    )
