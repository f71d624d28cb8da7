r"""Hamming attention: schema, fake, autograd and the readable reference that every other backend is held against.

For each head, with sign bits q and k of d channels, weights w_q and w_k, values v (paper Sec. 2.2, Eq. 2):

    S1_ij = d - 2 popcount(q_i xor k_j) = sgn(q_i) . sgn(k_j)
    S_ij  = scale * w_q,i * w_k,j * S1_ij            (two planes: the sum of the four such terms)
    O     = softmax(S) v

Backward, with P = softmax(S), delta_i = dO_i . O_i:

    dV = P^T dO,  dS = P * (dO V^T - delta),  dw_q,i = scale * sum_j dS_ij S1_ij w_k,j,  dw_k,j alike

and, for what reaches the real tensors behind the bits (``bit_gradient``), masked to abs(x) <= 1:

    ste:      dq_i = scale * w_q,i * sum_j g_ij sgn(k_j),  g_ij = dS_ij w_k,j   (dk by columns, with g_ij = dS_ij w_q,i)
    ternary:  the same with g_ij replaced by t_ij in {-s_i, 0, s_i}, P(t_ij != 0) = abs(g_ij) / s_i, s_i the
              largest abs(g_ij) of j's block of 64 (dk: of i's): unbiased, and a product of bits and ternary numbers only

Nothing of size Nq x Nk is kept: bits, weights, values, output and the row log-sum-exp are saved, scores are computed again.
Letters: G = batch x heads, P = planes (1, or 2 for two Bernoulli samples).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_binaryformer.kernels.backends import Backend, get_backend, register_backend, select_backend
from hf_binaryformer.kernels.bits import unpack_sign_bits
from hf_binaryformer.kernels.checks import check_inputs
from hf_binaryformer.kernels.draws import BLOCK, ternary, uniform

# Scores held at one time; bounds the extra memory and keeps a tile in a core's cache.
CHUNK_ELEMENTS = 1 << 19


def hamming_attention(
    query_bits: Tensor,
    key_bits: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value: Tensor,
    *,
    head_dim: int,
    scale: float | None = None,
    query: Tensor | None = None,
    key: Tensor | None = None,
    bit_gradient: str = "none",
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention whose query-key product is 1 bit wide (paper Sec. 2.2; formulas in this module's docstring).

    Differentiable in both weights and in ``value``; with ``bit_gradient`` also in ``query`` and ``key``.

    Args:
        query_bits: (B, H, Nq, words) int64 of :func:`pack_sign_bits`, or (B, H, Nq, 2, words) for two Bernoulli samples.
        key_bits: (B, H, Nk, words) or (B, H, Nk, 2, words) int64.
        query_weight: (B, H, Nq) or (B, H, Nq, 2) real weight of each query.
        key_weight: (B, H, Nk) or (B, H, Nk, 2) real weight of each key.
        value: (B, H, Nk, d_v), float64, float32, bfloat16 or float16; any d_v >= 1, any strides.
        head_dim: channels d >= 1 that were packed.
        scale: factor of the scores; None means 1 / sqrt(head_dim).
        query: (B, H, Nq, d) real tensor whose signs were packed; receives the bit gradient and is read for nothing else.
        key: (B, H, Nk, d), likewise.
        bit_gradient: "none" (only the weights learn, as in the paper), "ste" (paper Eq. 3), "ternary".
        seed: of the ternary draws, an int or a 0-d int64 tensor; None draws one from torch's generator.
        backend: name out of :func:`available_backends`, or None to have the fastest chosen.

    Returns:
        (B, H, Nq, d_v) in the type of ``value``; zeros where Nk is 0.

    Raises:
        ValueError: shapes, types or options that do not fit one another.
        BackendUnavailableError: the backend asked for cannot run here.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 5, 32)
        >>> ones = torch.ones(1, 2, 5)
        >>> hamming_attention(pack_sign_bits(q), pack_sign_bits(k), ones, ones, v, head_dim=32).shape
        torch.Size([1, 2, 5, 32])
    """
    check_inputs(query_bits, key_bits, query_weight, key_weight, value, query, key, head_dim, bit_gradient)
    if scale is None:
        scale = head_dim**-0.5
    if seed is None:
        seed = torch.randint(2**62, ()) if bit_gradient == "ternary" else 0
    if not isinstance(seed, Tensor):
        seed = torch.tensor(seed, dtype=torch.int64)
    if bit_gradient == "none":
        query = key = None
    backend = select_backend(backend, value.device.type).name
    tensors = (query_bits, key_bits, query_weight, key_weight, value, query, key, seed)
    return _hamming_attention(*tensors, head_dim, scale, bit_gradient, backend)[0]


@torch.library.custom_op("hf_binaryformer::hamming_attention", mutates_args=())
def _hamming_attention(
    query_bits: Tensor,
    key_bits: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    seed: Tensor,
    head_dim: int,
    scale: float,
    bit_gradient: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The registered op: output (B, H, Nq, d_v) and row log-sum-exp (B, H, Nq)."""
    return get_backend(backend).forward(query_bits, key_bits, query_weight, key_weight, value, head_dim, scale)


@_hamming_attention.register_fake
def _(query_bits, key_bits, query_weight, key_weight, value, *args, **kwargs) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    output = token_major(value, (*query_bits.shape[:3], value.shape[-1]), value.dtype)
    return output, value.new_empty(output.shape[:3], dtype=_compute_dtype(value))


@torch.library.custom_op("hf_binaryformer::hamming_attention_backward", mutates_args=())
def _hamming_attention_backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query_weight, key_weight, value, and of the sign values of query and key (empty when not asked for)."""
    return get_backend(backend).backward(
        grad_output,
        query_bits,
        key_bits,
        query_weight,
        key_weight,
        value,
        output,
        logsumexp,
        grad_logsumexp,
        seed,
        head_dim,
        scale,
        bit_gradient,
        weight_gradient,
    )


@_hamming_attention_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_output, query_bits, key_bits, query_weight, key_weight, value, output, logsumexp, grad_logsumexp,
    seed, head_dim, scale, bit_gradient, weight_gradient, backend,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _zero_gradients(
        query_bits, key_bits, query_weight, key_weight, value, head_dim, bit_gradient, weight_gradient
    )


def _zero_gradients(
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
    dtype = _compute_dtype(value)
    bits = bit_gradient != "none"
    return (
        value.new_zeros(query_weight.shape if weight_gradient else (0,), dtype=dtype),
        value.new_zeros(key_weight.shape if weight_gradient else (0,), dtype=dtype),
        token_major(value, value.shape, value.dtype).zero_(),
        value.new_zeros((*query_bits.shape[:3], head_dim) if bits else (0,), dtype=dtype),
        value.new_zeros((*key_bits.shape[:3], head_dim) if bits else (0,), dtype=dtype),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query_bits, key_bits, query_weight, key_weight, value, query, key, seed, head_dim, scale, bit_gradient, backend = (
        inputs
    )
    ctx.save_for_backward(query_bits, key_bits, query_weight, key_weight, value, query, key, seed, *output)
    ctx.options = head_dim, scale, bit_gradient, backend
    ctx.set_materialize_grads(False)  # the gradient of the log-sum-exp is None unless somebody used it


def _backward(ctx, grad_output: Tensor | None, grad_logsumexp: Tensor | None):  # type: ignore[no-untyped-def]
    query_bits, key_bits, query_weight, key_weight, value, query, key, seed, output, logsumexp = ctx.saved_tensors
    head_dim, scale, bit_gradient, backend = ctx.options
    if query is None and key is None:
        bit_gradient = "none"
    weight_gradient = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    grad_query_weight, grad_key_weight, grad_value, grad_query, grad_key = _hamming_attention_backward(
        grad_output,
        query_bits,
        key_bits,
        query_weight,
        key_weight,
        value,
        output,
        logsumexp,
        grad_logsumexp,
        seed,
        head_dim,
        scale,
        bit_gradient,
        weight_gradient,
        backend,
    )
    return (
        None,
        None,
        grad_query_weight.to(query_weight.dtype) if weight_gradient else None,
        grad_key_weight.to(key_weight.dtype) if weight_gradient else None,
        grad_value,
        _straight_through(grad_query, query),
        _straight_through(grad_key, key),
        *[None] * 5,
    )


def _straight_through(grad_sign: Tensor, x: Tensor | None) -> Tensor | None:
    """Gradient of the sign passed on to x where abs(x) <= 1 (paper Eq. 3)."""
    if x is None:
        return None
    dtype = torch.promote_types(x.dtype, grad_sign.dtype)
    # hardtanh's is many times as fast as torch.where, 0 at the limits themselves, and compiled with the strides of x.
    limit = 1 + torch.finfo(dtype).eps
    return torch.ops.aten.hardtanh_backward(grad_sign.to(dtype), x.to(dtype), -limit, limit).contiguous().to(x.dtype)


_hamming_attention.register_autograd(_backward, setup_context=_setup_context)


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
    dtype = _compute_dtype(value)
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
    """Readable backward; scores are computed again tile by tile.

    Args:
        grad_output: (B, H, Nq, d_v).
        query_bits, key_bits, query_weight, key_weight, value, head_dim, scale, bit_gradient: as in :func:`hamming_attention`.
        output, logsumexp: (B, H, Nq, d_v) and (B, H, Nq), what the forward returned.
        grad_logsumexp: (B, H, Nq), or None for zeros.
        seed: 0-d int64 tensor of the ternary draws.
        weight_gradient: whether the gradients of the weights are wanted.

    Returns:
        Gradients of query_weight, key_weight, value, sgn(query), sgn(key), that of the value in its type, the others in
        float32 (float64 for float64 values); those not asked for have no element.
    """
    sizes = (query_bits, key_bits, query_weight, key_weight, value, head_dim, bit_gradient, weight_gradient)
    gradients = _zero_gradients(*sizes)
    dtype = _compute_dtype(value)
    delta = (grad_output.to(dtype) * output).sum(-1)
    if grad_logsumexp is not None:  # an output too: its gradient enters dS = P * (dP - delta) through delta
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
            scores = (signed_query[:, rows] * scale) @ signed_key.mT  # noqa: B023 (used within this turn of the loop)
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
    """Heads to take at one time, and the blocks of query rows to cut them into; at most CHUNK_ELEMENTS scores a tile."""
    if queries * keys == 0:
        return
    together = max(1, CHUNK_ELEMENTS // (queries * keys))
    height = max(1, CHUNK_ELEMENTS // keys // BLOCK) * BLOCK  # whole blocks of ternary draws
    row_blocks = [slice(i, min(i + height, queries)) for i in range(0, queries, height)]
    for first in range(0, groups, together):
        yield slice(first, min(first + together, groups)), row_blocks


def token_major(like: Tensor, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """An uninitialised (B, H, N, d) tensor whose heads lie side by side in memory, as projections give and take them."""
    batch, heads, tokens, channels = shape
    return like.new_empty((batch, tokens, heads, channels), dtype=dtype).transpose(1, 2)


def _compute_dtype(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)


register_backend(
    Backend("reference", reference_forward, reference_backward, (), "readable PyTorch, any device, O(N) memory")
)
