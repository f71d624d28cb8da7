"""The backend "reference": readable PyTorch on any device in O(N) memory. Every other backend is tested against it.

Formulas: :mod:`hf_binaryformer.kernels.hamming`. Letters: G = batch x heads, P = planes (1, or 2 for two Bernoulli samples).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_binaryformer.kernels.backends import Backend, register_backend
from hf_binaryformer.kernels.bits import unpack_sign_bits
from hf_binaryformer.kernels.draws import BLOCK, ternary, uniform
from hf_binaryformer.kernels.layout import compute_dtype, token_major, zero_gradients

# Number of scores held at once. It bounds the extra memory and keeps a tile in a core's cache.
CHUNK_ELEMENTS = 1 << 19


def reference_forward(
    query_bits: Tensor,
    key_bits: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value: Tensor,
    head_dim: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Readable forward on any device: output (B, H, Nq, d_v) in the value's type, log-sum-exp (B, H, Nq) in float32 or 64."""
    dtype = compute_dtype(value)
    batch, heads, queries = query_bits.shape[:3]
    keys, value_dim = value.shape[2:]
    output = value.new_zeros((batch * heads, queries, value_dim), dtype=dtype)
    logsumexp = value.new_full((batch * heads, queries), float("-inf"), dtype=dtype)
    for group, row_blocks in _tiles(batch * heads, queries, keys):
        _, _, signed_query = _planes(query_bits, query_weight, group, head_dim, dtype)
        _, _, signed_key = _planes(key_bits, key_weight, group, head_dim, dtype)
        v = value.flatten(0, 1)[group].to(dtype)
        for rows in row_blocks:
            scores = (signed_query[:, rows] * scale) @ signed_key.mT  # (G, rows, Nk)
            maximum = scores.amax(-1, keepdim=True)
            weights = scores.sub_(maximum).exp_()
            total = weights.sum(-1, keepdim=True)
            output[group, rows] = (weights @ v) / total
            logsumexp[group, rows] = (maximum + total.log()).squeeze(-1)
    shape = (batch, heads, queries)
    rows_together = token_major(value, (*shape, value_dim), value.dtype)
    return rows_together.copy_(output.view(*shape, value_dim)), logsumexp.view(shape)


def reference_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Readable backward; scores are recomputed tile by tile.

    Args:
        grad_output: (B, H, Nq, d_v).
        query_bits, key_bits, query_weight, key_weight, value, head_dim, scale, bit_gradient: as in the operator.
        output, logsumexp: (B, H, Nq, d_v) and (B, H, Nq), what the forward returned.
        grad_logsumexp: (B, H, Nq), or None for zeros.
        seed: 0-d int64 tensor of the ternary draws.
        weight_gradient: whether the gradients of the weights are requested.

    Returns:
        Gradients of query_weight, key_weight, value, sgn(query), sgn(key). That of the value has the value's type; the
        others are float32 (float64 for float64 values). Those not requested are empty.
    """
    sizes = (query_bits, key_bits, query_weight, key_weight, value, head_dim, bit_gradient, weight_gradient)
    gradients = zero_gradients(*sizes)
    dtype = compute_dtype(value)
    delta = (grad_output.to(dtype) * output).sum(-1)
    if grad_logsumexp is not None:  # it is an output too; its gradient enters dS = P * (dP - delta) through delta
        delta -= grad_logsumexp
    batch, heads, queries = query_bits.shape[:3]
    keys = value.shape[2]
    d_query_weight, d_key_weight, _, d_query, d_key = (
        g.view(batch * heads, *g.shape[2:]) if g.dim() > 1 and g is not gradients[2] else g for g in gradients
    )
    d_value = value.new_zeros((batch * heads, keys, value.shape[3]), dtype=dtype)
    for group, row_blocks in _tiles(batch * heads, queries, keys):
        query_signs, query_w, signed_query = _planes(query_bits, query_weight, group, head_dim, dtype)
        key_signs, key_w, signed_key = _planes(key_bits, key_weight, group, head_dim, dtype)
        v, d_out, lse, dlt = (t.flatten(0, 1)[group].to(dtype) for t in (value, grad_output, logsumexp, delta))

        def score_gradient(rows: slice) -> tuple[Tensor, Tensor]:
            scores = (signed_query[:, rows] * scale) @ signed_key.mT  # noqa: B023 (used within this iteration)
            p = scores.sub_(lse[:, rows].unsqueeze(-1)).exp_()  # noqa: B023
            return p, (d_out[:, rows] @ v.mT).sub_(dlt[:, rows].unsqueeze(-1)).mul_(p)  # noqa: B023

        d_signed_key = torch.zeros_like(signed_key)
        for rows in row_blocks:
            p, d_scores = score_gradient(rows)
            d_value[group] += p.mT @ d_out[:, rows]
            if weight_gradient or bit_gradient == "ste":
                d_signed_query = scale * (d_scores @ signed_key)
                d_signed_key += scale * (d_scores.mT @ signed_query[:, rows])
            if weight_gradient:
                d_query_weight[group, rows] = _weight_gradient(d_signed_query, query_signs[:, rows], query_weight)
            if bit_gradient == "ste":
                d_query[group, rows] = d_signed_query * query_w[:, rows]
            if bit_gradient == "ternary":
                draw = uniform(seed, group, rows, keys, value.device)
                t = ternary(d_scores * key_w.mT, draw, dim=2)
                d_query[group, rows] = scale * query_w[:, rows] * (t @ key_signs[:, :, 0])
                t = ternary(d_scores * query_w[:, rows], draw, dim=1)
                d_key[group] += scale * key_w * (t.mT @ query_signs[:, rows, 0])
        if weight_gradient:
            d_key_weight[group] = _weight_gradient(d_signed_key, key_signs, key_weight)
        if bit_gradient == "ste":
            d_key[group] = d_signed_key * key_w
    gradients[2].copy_(d_value.view(value.shape))
    return gradients


def _planes(
    bits: Tensor, weight: Tensor, group: slice, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Signs (G, N, P, d), first plane's weight as a column (G, N, 1), and sum over planes of weight * sign (G, N, d)."""
    if bits.dim() == 4:
        bits, weight = bits.unsqueeze(3), weight.unsqueeze(3)
    signs = unpack_sign_bits(bits.flatten(0, 1)[group], head_dim, dtype)
    weight = weight.flatten(0, 1)[group].to(dtype)
    return signs, weight[..., :1], (signs * weight.unsqueeze(-1)).sum(2)


def _weight_gradient(d_signed: Tensor, signs: Tensor, weight: Tensor) -> Tensor:
    """Gradient of each plane's weight: (G, N) or (G, N, 2) like the weights themselves."""
    gradient = (d_signed.unsqueeze(2) * signs).sum(-1)
    return gradient if weight.dim() == 4 else gradient.squeeze(2)


def _tiles(groups: int, queries: int, keys: int) -> Iterator[tuple[slice, list[slice]]]:
    """Heads to process together, and the blocks of query rows of each; at most CHUNK_ELEMENTS scores per tile."""
    if queries * keys == 0:
        return
    together = max(1, CHUNK_ELEMENTS // (queries * keys))
    height = max(1, CHUNK_ELEMENTS // keys // BLOCK) * BLOCK  # whole blocks of ternary draws
    row_blocks = [slice(i, min(i + height, queries)) for i in range(0, queries, height)]
    for first in range(0, groups, together):
        yield slice(first, min(first + together, groups)), row_blocks


register_backend(
    Backend("reference", reference_forward, reference_backward, description="readable PyTorch, any device, O(N) memory")
)
