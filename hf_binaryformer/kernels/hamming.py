r"""Hamming attention: formulas, schema, fake and autograd; backends compute it (:mod:`hf_binaryformer.kernels.backends`).

For each head, with sign bits q and k of d channels, weights w_q and w_k, values v (paper Sec. 2.2, Eq. 2):

    S1_ij = d - 2 popcount(q_i xor k_j) = sgn(q_i) . sgn(k_j)
    S_ij  = scale * w_q,i * w_k,j * S1_ij            (two planes: the sum of the four such terms)
    O     = softmax(S) v

Backward, with P = softmax(S), delta_i = dO_i . O_i:

    dV = P^T dO,  dS = P * (dO V^T - delta),  dw_q,i = scale * sum_j dS_ij S1_ij w_k,j,  dw_k,j alike

and for the gradient of the real tensors whose signs were packed (``bit_gradient``), masked to abs(x) <= 1:

    ste:      dq_i = scale * w_q,i * sum_j g_ij sgn(k_j),  g_ij = dS_ij w_k,j   (dk by columns, with g_ij = dS_ij w_q,i)
    ternary:  the same with g_ij replaced by t_ij in {-s_i, 0, s_i}, P(t_ij != 0) = abs(g_ij) / s_i, s_i the
              largest abs(g_ij) of j's block of 64 (dk: of i's): unbiased, and a product of bits and ternary numbers only

Keys that a mask excludes (:mod:`hf_binaryformer.kernels.masks`) have P = 0, and their gradients are 0.

Nothing of size Nq x Nk is stored. Bits, weights, values, output and row log-sum-exp are saved; scores are recomputed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hf_binaryformer.kernels.backends import own_precision, select_backend
from hf_binaryformer.kernels.bits import clear_padding
from hf_binaryformer.kernels.checks import check_inputs, check_mask, on_one_device, seed_tensor
from hf_binaryformer.kernels.differentiation import differentiable
from hf_binaryformer.kernels.layout import compute_dtype, token_major, zero_gradients
from hf_binaryformer.kernels.masks import backward_by_sample, forward_by_sample, kept_first
from hf_binaryformer.kernels.reference import reference_backward, reference_forward


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
    window: float | None = 1.0,
    seed: int | Tensor | None = None,
    key_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention whose query-key product is 1 bit wide (paper Sec. 2.2; formulas in this module's docstring).

    Differentiable in both weights and in ``value``; with ``bit_gradient`` also in ``query`` and ``key``.

    Args:
        query_bits: (B, H, Nq, words) int64 of :func:`pack_sign_bits`, or (B, H, Nq, 2, words) for two Bernoulli samples.
            Padding bits of the last word are never counted, whatever they are.
        key_bits: (B, H, Nk, words) or (B, H, Nk, 2, words) int64.
        query_weight: (B, H, Nq) or (B, H, Nq, 2) real weight of each query.
        key_weight: (B, H, Nk) or (B, H, Nk, 2) real weight of each key.
        value: (B, H, Nk, d_v), float64, float32, bfloat16 or float16; any d_v >= 1, any strides.
        head_dim: channels d >= 1 that were packed.
        scale: factor of the scores; None means 1 / sqrt(head_dim).
        query: (B, H, Nq, d) real tensor whose signs were packed; used only for the bit gradient, which it receives.
        key: (B, H, Nk, d), likewise.
        bit_gradient: "none" (only the weights learn, as in the paper), "ste" (paper Eq. 3), "ternary".
        window: the bit gradient passes where abs(x) <= window; None: everywhere, for callers that apply their own
            window (:func:`~hf_binaryformer.kernels.balance.balance`).
        seed: seed of the ternary draws, an int of 64 bits or a 0-d int64 tensor (on the CPU or with the other tensors);
            None draws one from torch's generator.
        key_mask: (B, Nk) bool, True for keys that take part, False for padding; None: all take part.
        backend: a name from :func:`available_backends`; None chooses the fastest for the device, each time it runs.

    Returns:
        (B, H, Nq, d_v) in the type of ``value``; zeros where no key takes part.

    Raises:
        ValueError: shapes, types, devices or options do not fit together.
        TypeError: the seed is not a whole number.
        BackendUnavailableError: the requested backend cannot run here.
        NotImplementedError: forward-mode or second derivatives are asked for.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 5, 32)
        >>> ones = torch.ones(1, 2, 5)
        >>> hamming_attention(pack_sign_bits(q), pack_sign_bits(k), ones, ones, v, head_dim=32).shape
        torch.Size([1, 2, 5, 32])
    """
    check_inputs(query_bits, key_bits, query_weight, key_weight, value, query, key, head_dim, bit_gradient)
    check_mask(key_mask, value)
    if scale is None:
        scale = head_dim**-0.5
    if seed is None:
        # On a GPU the seed is drawn there, so that nothing waits for it and a CUDA graph draws anew when it is replayed.
        device = value.device if value.is_cuda else None
        seed = torch.randint(2**62, (), device=device) if bit_gradient == "ternary" else 0
    if bit_gradient == "none":
        query = key = None
    if backend is not None:
        select_backend(backend, value.device.type)
    lengths = None
    if key_mask is not None:
        lengths, key_bits, key_weight, value, key = kept_first(key_mask, key_bits, key_weight, value, key)
    tensors = (query_bits, key_bits, query_weight, key_weight, value, query, key, seed_tensor(seed))
    limit = math.inf if window is None else window
    return _attend(*tensors, head_dim, scale, bit_gradient, backend, limit, lengths)[0]


@torch.library.custom_op("hf_binaryformer::hamming_attention", mutates_args=())
@on_one_device
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
    backend: str | None,
    window: float = 1.0,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The registered op: output (B, H, Nq, d_v) and row log-sum-exp (B, H, Nq); keys from ``key_lengths`` on are padding."""
    bits = clear_padding(query_bits, head_dim), clear_padding(key_bits, head_dim)
    inputs = *bits, query_weight, key_weight, value, head_dim, scale
    chosen = select_backend(backend, value.device.type)

    def compute(*inputs: Any) -> tuple[Tensor, Tensor]:
        return chosen.forward(*inputs) or reference_forward(*inputs)

    with own_precision(value.device):
        if key_lengths is None:
            return compute(*inputs)
        found = chosen.forward(*inputs, key_lengths=key_lengths) if chosen.takes_key_lengths else None
        return found or forward_by_sample(compute, *inputs, key_lengths)


@_hamming_attention.register_fake
@on_one_device
def _(query_bits, key_bits, query_weight, key_weight, value, query, key, seed, *options) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    output = token_major(value, (*query_bits.shape[:3], value.shape[-1]), value.dtype)
    return output, value.new_empty(output.shape[:3], dtype=compute_dtype(value))


@torch.library.custom_op("hf_binaryformer::hamming_attention_backward", mutates_args=())
@on_one_device
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
    backend: str | None,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query_weight, key_weight, value, and the sign values of query and key (empty if not requested)."""
    bits = clear_padding(query_bits, head_dim), clear_padding(key_bits, head_dim)
    given = grad_output, *bits, query_weight, key_weight, value, output, logsumexp, grad_logsumexp
    options = seed, head_dim, scale, bit_gradient, weight_gradient
    chosen = select_backend(backend, value.device.type)

    def compute(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return chosen.backward(*inputs) or _backward_by_reference(*inputs)

    with own_precision(value.device):
        if key_lengths is None:
            return compute(*given, *options)
        found = chosen.backward(*given, *options, key_lengths=key_lengths) if chosen.takes_key_lengths else None
        return found or backward_by_sample(compute, *given, *options, key_lengths=key_lengths)


def _backward_by_reference(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The reference, with the log-sum-exp of scores that have its own rounding.

    With another one, the difference would be an error in every probability of a row.
    """
    grad_output, *tensors, output, _logsumexp, grad_logsumexp, seed, head_dim, scale, gradient, weighs = inputs
    logsumexp = reference_forward(*[*tensors, head_dim, scale])[1]
    last = [logsumexp, grad_logsumexp, seed, head_dim, scale, gradient, weighs]
    return reference_backward(*[grad_output, *tensors, output, *last])


@_hamming_attention_backward.register_fake
@on_one_device
def _(  # type: ignore[no-untyped-def]
    grad_output, query_bits, key_bits, query_weight, key_weight, value, output, logsumexp, grad_logsumexp,
    seed, head_dim, scale, bit_gradient, weight_gradient, backend, key_lengths=None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return zero_gradients(
        query_bits, key_bits, query_weight, key_weight, value, head_dim, bit_gradient, weight_gradient
    )


_attend_backward = differentiable(_hamming_attention_backward)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    (
        query_bits,
        key_bits,
        query_weight,
        key_weight,
        value,
        query,
        key,
        seed,
        head_dim,
        scale,
        bit_gradient,
        backend,
        window,
        key_lengths,
    ) = inputs
    tensors = query_bits, key_bits, query_weight, key_weight, value, query, key, seed, key_lengths
    ctx.save_for_backward(*tensors, *output)
    ctx.options = head_dim, scale, bit_gradient, window, backend
    ctx.set_materialize_grads(False)  # the gradient of the log-sum-exp is None unless it is used


def _backward(ctx, grad_output: Tensor | None, grad_logsumexp: Tensor | None):  # type: ignore[no-untyped-def]
    *inputs, query, key, seed, key_lengths, output, logsumexp = ctx.saved_tensors
    query_bits, key_bits, query_weight, key_weight, value = inputs
    head_dim, scale, bit_gradient, window, backend = ctx.options
    if query is None and key is None:
        bit_gradient = "none"
    weight_gradient = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    grad_query_weight, grad_key_weight, grad_value, grad_query, grad_key = _attend_backward(
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
        key_lengths,
    )
    return (
        None,
        None,
        grad_query_weight.to(query_weight.dtype) if weight_gradient else None,
        grad_key_weight.to(key_weight.dtype) if weight_gradient else None,
        grad_value,
        _straight_through(grad_query, query, window),
        _straight_through(grad_key, key, window),
        *[None] * 7,
    )


def _straight_through(grad_sign: Tensor, x: Tensor | None, window: float) -> Tensor | None:
    """Pass the gradient of the sign on to x where abs(x) <= window (paper Eq. 3: 1)."""
    if x is None:
        return None
    if math.isinf(window):
        return grad_sign.to(x.dtype)
    dtype = torch.promote_types(x.dtype, grad_sign.dtype)
    # The gradient of hardtanh is many times as fast as torch.where. It is 0 at the limits themselves, so they are moved
    # outwards by one rounding step. Compiled code gives it the strides of x, so it is made contiguous.
    limit = window * (1 + torch.finfo(dtype).eps)
    return torch.ops.aten.hardtanh_backward(grad_sign.to(dtype), x.to(dtype), -limit, limit).contiguous().to(x.dtype)


_attend = differentiable(_hamming_attention, _backward, _setup_context)
