"""Checks of the arguments of Hamming attention, each with its own error message."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_binaryformer.kernels.bits import words_for

BIT_GRADIENTS = ("none", "ste", "ternary")


def check_inputs(
    query_bits: Tensor,
    key_bits: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    head_dim: int,
    bit_gradient: str,
) -> None:
    """Raise ValueError for arguments of :func:`hf_binaryformer.kernels.hamming_attention` that do not fit together."""
    if bit_gradient not in BIT_GRADIENTS:
        raise ValueError(f"bit_gradient is '{bit_gradient}', expected one of {', '.join(BIT_GRADIENTS)}")
    if query_bits.dim() not in (4, 5) or key_bits.dim() != query_bits.dim():
        raise ValueError(
            f"query_bits has {query_bits.dim()} axes and key_bits {key_bits.dim()}; both need (B, H, N, words), "
            f"or (B, H, N, 2, words) for two samples"
        )
    if query_bits.dim() == 5 and not query_bits.shape[3] == key_bits.shape[3] == 2:
        raise ValueError(
            f"query_bits has {query_bits.shape[3]} planes and key_bits {key_bits.shape[3]}; with a plane axis both need 2"
        )
    for name, tensor in (("value", value), ("query_weight", query_weight), ("key_weight", key_weight)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has type {tensor.dtype}, expected a floating-point type: convert it first")
    if value.dim() != 4:
        raise ValueError(f"value has shape {tuple(value.shape)}, expected (B, H, Nk, d_v)")
    if value.shape[2] != key_bits.shape[2]:
        raise ValueError(
            f"value has {value.shape[2]} key tokens, key_bits has {key_bits.shape[2]}; both come from the same sequence"
        )
    if not query_bits.shape[:2] == key_bits.shape[:2] == value.shape[:2]:
        raise ValueError(
            f"batch and heads differ: query_bits {tuple(query_bits.shape[:2])}, key_bits {tuple(key_bits.shape[:2])}, "
            f"value {tuple(value.shape[:2])}"
        )
    check_side("query", query_bits, query_weight, query, head_dim, bit_gradient)
    check_side("key", key_bits, key_weight, key, head_dim, bit_gradient)


def check_side(name: str, bits: Tensor, weight: Tensor, real: Tensor | None, head_dim: int, bit_gradient: str) -> None:
    """Raise ValueError if bits, weights and real numbers of the queries, or of the keys, do not fit together."""
    if bits.dtype != torch.int64:
        raise ValueError(f"{name}_bits has type {bits.dtype}, expected torch.int64 as pack_sign_bits returns it")
    if bits.shape[-1] != words_for(head_dim):
        raise ValueError(
            f"{name}_bits has {bits.shape[-1]} words, head_dim {head_dim} needs {words_for(head_dim)}: "
            f"pass the head_dim that was packed"
        )
    if weight.shape != bits.shape[:-1]:
        raise ValueError(
            f"{name}_weight has shape {tuple(weight.shape)}, {name}_bits asks for {tuple(bits.shape[:-1])}"
        )
    if bit_gradient == "none":
        return
    if bits.dim() == 5:
        raise ValueError(
            f"bit_gradient '{bit_gradient}' needs one plane of sign bits; two samples learn by their weights"
        )
    if real is None:
        raise ValueError(f"bit_gradient '{bit_gradient}' needs {name}=, the real tensor whose signs were packed")
    if real.shape != (*bits.shape[:3], head_dim):
        raise ValueError(f"{name} has shape {tuple(real.shape)}, expected {(*bits.shape[:3], head_dim)}")


def check_mask(key_mask: Tensor | None, value: Tensor) -> None:
    """Raise ValueError unless a key-padding mask is bool (B, Nk)."""
    if key_mask is None:
        return
    if key_mask.dtype != torch.bool:
        raise ValueError(f"key_mask has type {key_mask.dtype}, expected torch.bool: True for keys that take part")
    expected = (value.shape[0], value.shape[2])
    if key_mask.shape != expected:
        raise ValueError(f"key_mask has shape {tuple(key_mask.shape)}, expected (B, Nk) = {expected}")


def on_one_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate what an operator runs, or its fake: ValueError unless all tensors are on one device.

    Compiled code takes addresses, and an exported graph may have been moved since the arguments were first checked. A seed
    may always be on the CPU.
    """
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*arguments: Any) -> Any:
        first: tuple[str, torch.device] | None = None
        for name, argument in zip(names, arguments, strict=False):
            if not isinstance(argument, Tensor) or (name == "seed" and argument.device.type == "cpu"):
                continue
            first = first or (name, argument.device)
            if argument.device != first[1]:
                raise ValueError(
                    f"{name} is on {argument.device}, {first[0]} on {first[1]}, expected one device for all: move them"
                )
        return function(*arguments)

    return checked


def seed_tensor(seed: Any) -> Tensor:
    """A seed as a 0-d int64 tensor.

    Raises:
        TypeError: it is not a whole number.
        ValueError: it is no single number, or needs more than 64 bits.
    """
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed is a tensor of {seed.dtype}, expected torch.int64: convert it, or pass an int")
        if seed.dim():
            raise ValueError(
                f"seed has shape {tuple(seed.shape)}, expected one number: a tensor of shape (), or an int"
            )
        return seed
    try:
        number = operator.index(seed)
    except TypeError:
        raise TypeError(
            f"seed is {seed!r} of type {type(seed).__name__}, expected an int or a 0-d int64 tensor"
        ) from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"seed is {number}, expected a number that fits into 64 bits, from -2^63 to 2^63 - 1")
    return torch.tensor(number, dtype=torch.int64)
