"""Key-padding masks: keys that no query attends to, such as the padding of sequences of unequal length.

The keys that take part are moved to the front, and a backend is told how many each sample has. Their work is all that is
done, so a mask makes attention faster. Ternary draws count the keys in their new order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_binaryformer.kernels.draws import seed_from_head
from hf_binaryformer.kernels.layout import compute_dtype, token_major, zero_gradients


def kept_first(key_mask: Tensor, *sides: Tensor | None) -> list[Any]:
    """Move the keys that take part to the front, without changing their order.

    Args:
        key_mask: (B, Nk) bool, True for keys that take part.
        sides: tensors (B, H, Nk, ...) of the keys, or None; differentiable.

    Returns:
        Number of keys of each sample (B,) int64, then the reordered ``sides``.
    """
    order = torch.argsort(key_mask.logical_not().to(torch.uint8), dim=1, stable=True)
    moved = [
        None if side is None else side.take_along_dim(order.view(order.shape[0], 1, -1, *(1,) * (side.dim() - 3)), 2)
        for side in sides
    ]
    return [key_mask.sum(1), *moved]


def forward_by_sample(
    compute: Callable[..., tuple[Tensor, Tensor]],
    query_bits: Tensor,
    key_bits: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value: Tensor,
    head_dim: int,
    scale: float,
    key_lengths: Tensor,
) -> tuple[Tensor, Tensor]:
    """Forward of samples with ``key_lengths`` (B,) keys each, one sample after another.

    Args:
        compute: as :func:`hf_binaryformer.kernels.reference.reference_forward`.
    """
    output = token_major(value, (*query_bits.shape[:3], value.shape[3]), value.dtype).zero_()
    logsumexp = value.new_full(query_bits.shape[:3], float("-inf"), dtype=compute_dtype(value))
    for sample, keys in _samples(key_lengths):
        queries, keyed = _of_sample(sample, keys, (query_bits, query_weight), (key_bits, key_weight, value))
        found = compute(queries[0], keyed[0], queries[1], *keyed[1:], head_dim, scale)
        output[sample], logsumexp[sample] = found[0], found[1]
    return output, logsumexp


def backward_by_sample(
    compute: Callable[..., tuple[Tensor, ...]],
    grad_output: Tensor,
    query_bits: Tensor,
    key_bits: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    grad_logsumexp: Tensor | None,
    seed: Tensor,
    head_dim: int,
    scale: float,
    bit_gradient: str,
    weight_gradient: bool,
    key_lengths: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backward of samples with ``key_lengths`` (B,) keys each, one sample after another.

    Args:
        compute: as :func:`hf_binaryformer.kernels.reference.reference_backward`.
    """
    sizes = query_bits, key_bits, query_weight, key_weight, value, head_dim, bit_gradient, weight_gradient
    gradients = zero_gradients(*sizes)
    of_queries = grad_output, query_bits, query_weight, output, logsumexp, grad_logsumexp
    for sample, keys in _samples(key_lengths):
        queries, keyed = _of_sample(sample, keys, of_queries, (key_bits, key_weight, value))
        own_seed = seed_from_head(seed, sample.start * query_bits.shape[1])
        found = compute(
            *(queries[0], queries[1], keyed[0], queries[2], *keyed[1:], *queries[3:]),
            *(own_seed, head_dim, scale, bit_gradient, weight_gradient),
        )
        for place, (whole, part) in enumerate(zip(gradients, found, strict=True)):
            if whole.dim() == 1:  # not requested
                continue
            whole = whole[sample]
            (whole if place in (0, 3) else whole[:, :, :keys]).copy_(part)  # 0 and 3 are those of queries
    return gradients


def _samples(key_lengths: Tensor) -> list[tuple[slice, int]]:
    """Samples that have keys, with the number of their keys."""
    return [(slice(b, b + 1), keys) for b, keys in enumerate(key_lengths.tolist()) if keys]


def _of_sample(
    sample: slice, keys: int, of_queries: tuple[Any, ...], of_keys: tuple[Tensor, ...]
) -> tuple[list[Any], list[Tensor]]:
    """What belongs to one sample, without the keys that do not take part."""
    queries = [None if tensor is None else tensor[sample] for tensor in of_queries]
    return queries, [tensor[sample, :, :keys] for tensor in of_keys]
