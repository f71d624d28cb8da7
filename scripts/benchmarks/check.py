"""Compares the kernel with the formulas before it is timed: evaluated densely in float64 without the kernel's code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_binaryformer.kernels import hamming_attention
from hf_binaryformer.kernels.draws import BLOCK, uniform
from measure import DTYPES
from subjects import (
    HEAD_DIM,
    HEADS,
    SCORE_LIMIT,
    SEED,
    VALUE_DIMS,
    Inputs,
    make_inputs,
    numpy_attention,
    numpy_counts_bits,
    plain_numpy_attention,
)

# Largest norm(x - exact) / norm(exact): of the output, and of the gradients.
TOLERANCE = {"float32": (5e-6, 1e-5), "bfloat16": (5e-3, 1e-2)}
# A ternary number may flip if its draw lies within rounding of the threshold. A wrong formula gives an error of 1.
TERNARY_TOLERANCE = 1e-2


@torch.no_grad()
def exact_attention(x: Inputs, grad_output: Tensor) -> dict[str, Tensor]:
    """Output and gradients by the formulas of ``hf_binaryformer.kernels.hamming``, in float64, head by head.

    Args:
        x: operands (1, H, N, ...), with their rounded values.
        grad_output: (1, H, N, d_v).

    Returns:
        "output"; the gradients "query_weight", "key_weight", "value"; the gradients "ternary query", "ternary key" with
        the ternary numbers of the seed SEED, and "ste query", "ste key"; and "largest score".
    """
    heads = [_exact_head(x, grad_output, head) for head in range(x.value.shape[1])]
    return {name: torch.stack([result[name] for result in heads])[None] for name in heads[0]}


def _exact_head(x: Inputs, grad_output: Tensor, head: int) -> dict[str, Tensor]:
    query, key, value, d_output = (t[0, head].double() for t in (x.query, x.key, x.value, grad_output))
    query_weight, key_weight = x.query_weight[0, head].double()[:, None], x.key_weight[0, head].double()
    query_sign, key_sign = (torch.where(t >= 0, 1.0, -1.0).double() for t in (query, key))
    scale = query.shape[-1] ** -0.5
    product = scale * (query_sign @ key_sign.T)
    scores = query_weight * key_weight * product
    probability = scores.softmax(-1)
    d_probability = d_output @ value.T
    d_scores = probability * (d_probability - (probability * d_probability).sum(-1, keepdim=True))
    draw = uniform(torch.tensor(SEED), slice(head, head + 1), slice(0, len(query)), len(key), query.device)[0].double()

    def ternary(g: Tensor, axis: int) -> Tensor:
        blocks = g.abs().split(BLOCK, axis)
        largest = torch.cat([block.amax(axis, keepdim=True).expand_as(block) for block in blocks], axis)
        return torch.where(draw < g.abs() / largest, g.sign() * largest, 0)

    return {
        "output": probability @ value,
        "query_weight": (d_scores * product) @ key_weight,
        "key_weight": (d_scores * product).T @ query_weight[:, 0],
        "value": probability.T @ d_output,
        "ternary query": scale * query_weight * (ternary(d_scores * key_weight, 1) @ key_sign) * (query.abs() <= 1),
        "ternary key": scale
        * key_weight[:, None]
        * (ternary(d_scores * query_weight, 0).T @ query_sign)
        * (key.abs() <= 1),
        "ste query": scale * query_weight * ((d_scores * key_weight) @ key_sign) * (query.abs() <= 1),
        "ste key": scale * key_weight[:, None] * ((d_scores * query_weight).T @ query_sign) * (key.abs() <= 1),
        "largest score": scores.abs().max(),
    }


def kernel_results(x: Inputs, grad_output: Tensor, backend: str, bit_gradient: str) -> dict[str, Tensor]:
    """The kernel's results for the same operands, under the names of :func:`exact_attention`."""
    leaves = {"query_weight": x.query_weight, "key_weight": x.key_weight, "value": x.value}
    if bit_gradient != "none":
        leaves |= {f"{bit_gradient} query": x.query, f"{bit_gradient} key": x.key}
    for leaf in leaves.values():
        leaf.requires_grad_()
    output = hamming_attention(
        x.query_bits,
        x.key_bits,
        x.query_weight,
        x.key_weight,
        x.value,
        head_dim=x.query.shape[-1],
        query=x.query,
        key=x.key,
        bit_gradient=bit_gradient,
        seed=SEED,
        backend=backend,
    )
    gradients = torch.autograd.grad(output, list(leaves.values()), grad_output)
    return {"output": output, **dict(zip(leaves, gradients, strict=True))}


def relative_error(x: Tensor, exact: Tensor) -> float:
    """norm(x - exact) / norm(exact)."""
    return float((x.detach().double() - exact).norm() / exact.norm())


def tolerance_of(quantity: str, dtype: str) -> float:
    """Largest relative error allowed."""
    if quantity.startswith("ternary"):
        return TERNARY_TOLERANCE
    return TOLERANCE[dtype][quantity != "output"]


def measure_errors(tokens: list[int], backend: str) -> Iterator[dict[str, Any]]:
    """Relative errors of every quantity that is timed afterwards, each with its tolerance."""
    for n in tokens:
        for dtype, torch_dtype in DTYPES.items():
            for value_dim in VALUE_DIMS:
                x = make_inputs(n, HEADS, HEAD_DIM, value_dim, torch_dtype)
                generator = torch.Generator().manual_seed(SEED + 1)
                grad_output = torch.randn(x.value.shape, generator=generator).to(torch_dtype)
                exact = exact_attention(x, grad_output)
                kinds = ("ternary", "ste") if dtype == "float32" else ("none",)
                computed: dict[str, Tensor] = {}
                for kind in kinds:
                    computed |= kernel_results(x, grad_output, backend, kind)
                largest = float(exact["largest score"].max())
                if not 0.9 * SCORE_LIMIT < largest < 1.1 * SCORE_LIMIT:
                    raise AssertionError(f"the largest score is {largest:.1f}, the check is meant for {SCORE_LIMIT}")
                for quantity, result in computed.items():
                    yield _record(backend, n, value_dim, dtype, quantity, relative_error(result, exact[quantity]))
                if dtype == "float32" and numpy_counts_bits():
                    for name, rival in (("numpy", plain_numpy_attention), ("numpy in place", numpy_attention)):
                        yield _record(name, n, value_dim, dtype, "output", _numpy_error(rival, x, exact["output"]))


def _numpy_error(rival: Callable[..., np.ndarray], x: Inputs, exact: Tensor) -> float:
    """Error of a NumPy rival on the first head."""
    query, key = (bits[0, 0, :, 0].numpy().view(np.uint64) for bits in (x.query_bits, x.key_bits))
    query_weight, key_weight, value = (t.detach()[0, 0].numpy() for t in (x.query_weight, x.key_weight, x.value))
    scaled = query_weight[:, None] * np.float32(HEAD_DIM**-0.5)
    output = rival(query, key, scaled, key_weight, value, HEAD_DIM)
    return relative_error(torch.from_numpy(output), exact[0, 0])


def _record(backend: str, tokens: int, value_dim: int, dtype: str, quantity: str, error: float) -> dict[str, Any]:
    allowed = tolerance_of(quantity, dtype)
    return {
        "backend": backend,
        "tokens": tokens,
        "head_dim": HEAD_DIM,
        "value_dim": value_dim,
        "dtype": dtype,
        "quantity": quantity if quantity == "output" else f"gradient of {quantity}",
        "error": float(f"{error:.3g}"),
        "tolerance": allowed,
        "passed": error <= allowed,  # NaN does not pass
    }
