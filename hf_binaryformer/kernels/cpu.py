"""The backend "cpu": compiled Hamming attention, forward and backward in O(N) memory (sources in ``kernels/cpu``)."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from hf_binaryformer.kernels import cpu_library
from hf_binaryformer.kernels.backends import Backend, register_backend, register_missing
from hf_binaryformer.kernels.balance import EPSILON
from hf_binaryformer.kernels.bits import words_for
from hf_binaryformer.kernels.cpu_library import TYPES, Balance, Call, Rows
from hf_binaryformer.kernels.layout import channels_adjacent, token_major


def forward(
    query_bits: Tensor,
    key_bits: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value: Tensor,
    head_dim: int,
    scale: float,
) -> tuple[Tensor, Tensor] | None:
    """As :func:`hf_binaryformer.kernels.reference.reference_forward`; None for float64 and for empty inputs."""
    if not _served(query_bits, value):
        return None
    batch, heads, queries = query_bits.shape[:3]
    output = token_major(value, (batch, heads, queries, value.shape[3]), value.dtype)
    logsumexp = value.new_empty((batch, heads, queries), dtype=torch.float32)
    call, _held = _prepare(query_bits, key_bits, query_weight, key_weight, value, head_dim, scale)
    call.output, call.logsumexp = Rows.of(output), logsumexp.data_ptr()
    _library().forward(call)
    return output, logsumexp


def backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """As :func:`hf_binaryformer.kernels.reference.reference_backward`; None for float64 and for empty inputs."""
    if not _served(query_bits, value):
        return None
    call, _held = _prepare(query_bits, key_bits, query_weight, key_weight, value, head_dim, scale)
    grad_output, output, logsumexp = (
        channels_adjacent(grad_output.to(value.dtype)),
        channels_adjacent(output),
        logsumexp.contiguous(),
    )
    call.grad_output, call.output, call.logsumexp = Rows.of(grad_output), Rows.of(output), logsumexp.data_ptr()
    if grad_logsumexp is not None:
        grad_logsumexp = grad_logsumexp.float().contiguous()
        call.grad_logsumexp = grad_logsumexp.data_ptr()

    def empty(like: Tensor, wanted: bool = True) -> Tensor:
        return value.new_empty(like.shape if wanted else (0,), dtype=torch.float32)

    signs = bit_gradient != "none"
    grad_value = token_major(value, value.shape, value.dtype)
    d_query_weight, d_key_weight = empty(query_weight, weight_gradient), empty(key_weight, weight_gradient)
    d_query, d_key = (
        value.new_empty((*bits.shape[:3], head_dim) if signs else (0,), dtype=torch.float32)
        for bits in (query_bits, key_bits)
    )
    call.grad_value = Rows.of(grad_value)
    if weight_gradient:
        call.grad_query_weight, call.grad_key_weight = d_query_weight.data_ptr(), d_key_weight.data_ptr()
    if signs:
        call.grad_query, call.grad_key = d_query.data_ptr(), d_key.data_ptr()
        call.straight_through = bit_gradient == "ste"
        call.seed = 0 if call.straight_through else int(seed) & (2**64 - 1)
    _library().backward(call)
    return d_query_weight, d_key_weight, grad_value, d_query, d_key


def pack_sign_bits(x: Tensor) -> Tensor | None:
    """As :func:`hf_binaryformer.kernels.pack_sign_bits`; None for float64, empty inputs, and more than four axes."""
    if x.dtype not in TYPES or x.dim() > 4 or not x.numel():
        return None
    return _library().pack_sign_bits(x)


def saturate_and_sign(x: Tensor, beta: float) -> tuple[Tensor, Tensor] | None:
    """As :func:`hf_binaryformer.kernels.saturation.saturate_and_sign`; None for float64."""
    return _library().saturate(x, beta) if x.dtype in TYPES else None


def balance(x: Tensor, centering: bool, norm: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    """As :func:`hf_binaryformer.kernels.balance.reference_balance`; None for float64 and for empty inputs."""
    if x.dtype not in TYPES or not x.numel():
        return None
    x = channels_adjacent(x)
    y = token_major(x, x.shape, x.dtype)
    bits = x.new_empty((*x.shape[:3], words_for(x.shape[3])), dtype=torch.int64)
    inverse_rms = x.new_empty(x.shape[:3], dtype=torch.float32)
    call = _balance_call(y, inverse_rms, centering, norm)
    call.x, call.bits = Rows.of(x), bits.data_ptr()
    _library().balance_forward(call)
    return y, bits, inverse_rms


def balance_backward(
    y: Tensor, grad: Tensor, inverse_rms: Tensor, centering: bool, norm: bool, window: float
) -> Tensor | None:
    """As :func:`hf_binaryformer.kernels.balance.reference_balance_backward`; None for float64 and for empty inputs."""
    if y.dtype not in TYPES or not y.numel():
        return None
    y, grad, inverse_rms = channels_adjacent(y), channels_adjacent(grad.to(y.dtype)), inverse_rms.contiguous()
    grad_x = token_major(y, y.shape, y.dtype)
    call = _balance_call(y, inverse_rms, centering, norm)
    call.grad, call.grad_x, call.window = Rows.of(grad), Rows.of(grad_x), window
    _library().balance_backward(call)
    return grad_x


def _balance_call(y: Tensor, inverse_rms: Tensor, centering: bool, norm: bool) -> Balance:
    batch, heads, tokens, dim = y.shape
    return Balance(
        batch=batch,
        heads=heads,
        tokens=tokens,
        dim=dim,
        threads=torch.get_num_threads(),
        type=TYPES[y.dtype],
        centering=centering,
        norm=norm,
        epsilon=EPSILON,
        y=Rows.of(y),
        inverse_rms=inverse_rms.data_ptr(),
    )


def _served(query_bits: Tensor, value: Tensor) -> bool:
    return value.dtype in TYPES and min(query_bits.shape[:3]) > 0 and min(value.shape) > 0


def _prepare(
    query_bits: Tensor,
    key_bits: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value: Tensor,
    head_dim: int,
    scale: float,
) -> tuple[Call, tuple[Tensor, ...]]:
    """The part of a call that forward and backward share, and the tensors that must outlive it."""
    query_bits, key_bits, value = query_bits.contiguous(), key_bits.contiguous(), channels_adjacent(value)
    query_weight, key_weight = query_weight.float().contiguous(), key_weight.float().contiguous()
    batch, heads, queries = query_bits.shape[:3]
    call = Call(
        batch=batch,
        heads=heads,
        queries=queries,
        keys=value.shape[2],
        head_dim=head_dim,
        value_dim=value.shape[3],
        planes=query_bits.shape[3] if query_bits.dim() == 5 else 1,
        threads=torch.get_num_threads(),
        type=TYPES[value.dtype],
        scale=scale,
        query_bits=query_bits.data_ptr(),
        key_bits=key_bits.data_ptr(),
        query_weight=query_weight.data_ptr(),
        key_weight=key_weight.data_ptr(),
        value=Rows.of(value),
    )
    return call, (query_bits, key_bits, query_weight, key_weight, value)


def _library() -> cpu_library.Library:
    assert cpu_library.LIBRARY is not None  # the backend is registered only if there is a library
    return cpu_library.LIBRARY


if cpu_library.LIBRARY is None:
    register_missing("cpu", cpu_library.MISSING_REASON)
    if cpu_library.INSTRUCTION_SET_VARIABLE in cpu_library.MISSING_REASON:
        warnings.warn(f"no compiled Hamming attention: {cpu_library.MISSING_REASON}", RuntimeWarning, stacklevel=2)
else:
    register_backend(
        Backend(
            "cpu",
            forward,
            backward,
            pack_sign_bits,
            saturate_and_sign,
            balance,
            balance_backward,
            device_types=("cpu",),
            priority=10,
            description=f"compiled, {cpu_library.LIBRARY.instruction_set} "
            f"(this processor runs {', '.join(cpu_library.LIBRARY.runnable)})",
        )
    )
