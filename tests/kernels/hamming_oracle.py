"""Hamming attention evaluated in float64 straight from the formulas, independent of the package.

Scores    S_ij = sum over planes m, n of w_q[i, m] w_k[j, n] S1, S1 = scale (d - 2 popcount(q[i, m] xor k[j, n])),
          scale = lambda / sqrt(d)
Forward   P = softmax(S), O = P V
Backward  dV = P^T dO, dP = dO V^T, delta_i = sum_j P_ij dP_ij, dS = P (dP - delta)
          dw_q[i, m] = sum_j,n dS_ij w_k[j, n] S1, dw_k[j, n] = sum_i,m dS_ij w_q[i, m] S1
STE       dq_i = scale w_q,i sum_j dS_ij w_k,j sgn(k_j) where abs(q_i) <= 1, else 0; dk likewise

Everything below works on NumPy arrays; one-plane input is treated as two-plane input with a single plane.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Largest error allowed, as a fraction of the largest expected magnitude: first for the output and the gradient of the
# values, one rounding in half precision; then for what passes through delta_i = dO_i O_i, where O is already rounded.
TOLERANCE = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (5e-6, 2e-5),
    torch.float16: (1e-3, 8e-3),
    torch.bfloat16: (8e-3, 6e-2),
}
THROUGH_DELTA = {"query_weight", "key_weight", "query", "key"}


@dataclass
class Expected:
    """What the operator must return, and the gradients for one incoming `output_gradient`."""

    output: np.ndarray
    logsumexp: np.ndarray
    score_gradient: np.ndarray
    value: np.ndarray
    query_weight: np.ndarray
    key_weight: np.ndarray
    query_weight_terms: float  # norm of the sums of sizes whose signed sums are the gradient of the query weights
    query: np.ndarray | None = None
    key: np.ndarray | None = None


def pack_by_hand(real: Tensor) -> Tensor:
    """(..., d) -> (..., ceil(d/64)) int64: bit j of word w is real[..., 64 w + j] >= 0."""
    positive = real.detach().double().cpu().numpy() >= 0
    head_dim = positive.shape[-1]
    padded = np.zeros((*positive.shape[:-1], 64 * math.ceil(head_dim / 64)), dtype=np.uint8)
    padded[..., :head_dim] = positive
    return torch.from_numpy(np.packbits(padded, axis=-1, bitorder="little").view(np.int64).copy()).to(real.device)


def signs_by_hand(bits: Tensor, head_dim: int) -> np.ndarray:
    """(..., words) int64 -> (..., head_dim) of -1 and +1, float64."""
    as_bytes = np.ascontiguousarray(bits.cpu().numpy()).view(np.uint8)
    return 2.0 * np.unpackbits(as_bytes, axis=-1, bitorder="little")[..., :head_dim] - 1.0


def to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


def hamming_oracle(
    query_bits: Tensor,
    key_bits: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value: Tensor,
    output_gradient: Tensor,
    *,
    head_dim: int,
    scale: float | None = None,
    query: Tensor | None = None,
    key: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Expected:
    """Dense evaluation of the module's formulas; `query` and `key` ask for the straight-through gradient.

    The score of a key outside `key_mask` is minus infinity.
    """
    two_planes = query_weight.ndim == 4
    scale = head_dim**-0.5 if scale is None else scale
    q_bits, k_bits = (bits.cpu().numpy().view(np.uint64) for bits in (query_bits.contiguous(), key_bits.contiguous()))
    q_weight, k_weight = to_numpy(query_weight), to_numpy(key_weight)
    if not two_planes:
        q_bits, k_bits, q_weight, k_weight = (
            q_bits[..., None, :], k_bits[..., None, :], q_weight[..., None], k_weight[..., None]
        )  # fmt: skip
    values, d_output = to_numpy(value), to_numpy(output_gradient)

    planes = [(m, n) for m in range(q_bits.shape[3]) for n in range(k_bits.shape[3])]
    dots = {}
    for m, n in planes:
        differing = q_bits[:, :, :, None, m, :] ^ k_bits[:, :, None, :, n, :]
        dots[m, n] = scale * (head_dim - 2.0 * np.bitwise_count(differing).sum(-1, dtype=np.int64))
    scores = sum(dots[m, n] * q_weight[:, :, :, None, m] * k_weight[:, :, None, :, n] for m, n in planes)

    if key_mask is not None:
        scores = np.where(key_mask.cpu().numpy()[:, None, None, :], scores, -np.inf)
    maximum = scores.max(-1, keepdims=True) if scores.shape[-1] else np.zeros((*scores.shape[:-1], 1))
    maximum = np.where(np.isfinite(maximum), maximum, 0)
    exponentials = np.exp(scores - maximum)
    total = exponentials.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        logsumexp = (maximum + np.log(total))[..., 0]
    probabilities = exponentials / np.where(total > 0, total, 1)

    d_probabilities = d_output @ values.swapaxes(-1, -2)
    delta = (probabilities * d_probabilities).sum(-1, keepdims=True)
    d_scores = probabilities * (d_probabilities - delta)
    sizes = probabilities * (np.abs(d_probabilities) + np.abs(delta))
    terms = sum((sizes * np.abs(dots[m, n] * k_weight[:, :, None, :, n])).sum(-1) for m, n in planes)
    d_q_weight, d_k_weight = np.zeros_like(q_weight), np.zeros_like(k_weight)
    for m, n in planes:
        d_q_weight[..., m] += np.einsum("bhij,bhij,bhj->bhi", d_scores, dots[m, n], k_weight[..., n])
        d_k_weight[..., n] += np.einsum("bhij,bhij,bhi->bhj", d_scores, dots[m, n], q_weight[..., m])
    if not two_planes:
        d_q_weight, d_k_weight = d_q_weight[..., 0], d_k_weight[..., 0]

    expected = Expected(
        output=probabilities @ values,
        logsumexp=logsumexp,
        score_gradient=d_scores,
        value=probabilities.swapaxes(-1, -2) @ d_output,
        query_weight=d_q_weight,
        key_weight=d_k_weight,
        query_weight_terms=float(np.linalg.norm(terms)),
    )
    if query is not None and key is not None:
        q_signs, k_signs = signs_by_hand(query_bits, head_dim), signs_by_hand(key_bits, head_dim)
        through_query = (d_scores * k_weight[:, :, None, :, 0]) @ k_signs
        through_key = (d_scores * q_weight[:, :, :, None, 0]).swapaxes(-1, -2) @ q_signs
        expected.query = scale * q_weight * through_query * (np.abs(to_numpy(query)) <= 1)
        expected.key = scale * k_weight * through_key * (np.abs(to_numpy(key)) <= 1)
    return expected


def assert_close(
    actual: Tensor,
    expected: np.ndarray | Tensor,
    name: str,
    *,
    floor: float = 0.0,
    dtype: torch.dtype | None = None,
) -> None:
    """Compare with the tolerance of `dtype`, by default the tensor's own.

    `name` picks the column of the table; `floor` replaces the magnitude of results that are zero up to rounding.
    """
    wanted = to_numpy(expected) if isinstance(expected, Tensor) else expected
    got = to_numpy(actual)
    assert got.shape == wanted.shape, f"{name}: shape {got.shape}, expected {wanted.shape}"
    if not wanted.size:
        return
    assert np.isfinite(got).all(), f"{name}: {np.count_nonzero(~np.isfinite(got))} values are not finite"
    magnitude = max(float(np.abs(wanted).max()), floor)
    error = float(np.abs(got - wanted).max())
    allowed = TOLERANCE[dtype or actual.dtype][name in THROUGH_DELTA] * magnitude
    assert error <= allowed, f"{name} ({actual.dtype}): error {error:.3g} of {magnitude:.3g}, allowed {allowed:.3g}"
