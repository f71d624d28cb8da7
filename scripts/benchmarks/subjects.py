"""What ``benchmarks/attention.py`` compares: Hamming attention, torch's SDPA, NumPy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_binaryformer.kernels import hamming_attention, pack_sign_bits
from hf_binaryformer.kernels.cpu_library import LIBRARY
from measure import DTYPES, Subject, one_pass

# The attention of one image in the paper's ViT-S/8 (Sec. 3.1, A.1).
HEADS = 6
HEAD_DIM = 64
REDUCED_VALUE_DIM = 16
VALUE_DIMS = (REDUCED_VALUE_DIM, HEAD_DIM)
# Largest absolute score that the inputs lead to.
SCORE_LIMIT = 17.0
# Fig. 4 divides the channels by the bits of a float32.
FIGURE_4_DIVISOR = 32
# Fig. 6 left.
PRODUCT_DIM = 32
SEED = 0
# Timed in addition to the best instruction set, because most processors have it.
SECOND_SET = "avx2"
NUMPY_PLAIN, NUMPY_TUNED = "numpy bitwise_count, 1 head", "numpy bitwise_count in place, 1 head"
# Number of query rows whose scores are held at one time to find the largest.
ROWS = 64


@dataclass
class Inputs:
    """q, k (1, H, N, d), their bits (1, H, N, words), weights (1, H, N) and v (1, H, N, d_v), all in one type."""

    query: Tensor
    key: Tensor
    query_bits: Tensor
    key_bits: Tensor
    query_weight: Tensor
    key_weight: Tensor
    value: Tensor


def make_inputs(
    tokens: int, heads: int, head_dim: int, value_dim: int, dtype: torch.dtype, device: str = "cpu"
) -> Inputs:
    """Random inputs, the weights such that the largest absolute score is SCORE_LIMIT (before rounding to the type)."""
    draw = partial(torch.randn, generator=torch.Generator(device).manual_seed(SEED), device=device)
    query, key = draw(2, 1, heads, tokens, head_dim)
    query_weight, key_weight = 1 + 0.5 * draw(2, 1, heads, tokens)
    signed_query, signed_key = (
        torch.where(x >= 0, w.unsqueeze(-1), -w.unsqueeze(-1)) for x, w in ((query, query_weight), (key, key_weight))
    )
    blocks = signed_query.split(ROWS, dim=2)
    largest = float(torch.stack([(rows @ signed_key.mT).abs().max() for rows in blocks]).max()) * head_dim**-0.5
    factor = (SCORE_LIMIT / largest) ** 0.5
    query, key, query_weight, key_weight, value = (
        x.to(dtype) for x in (query, key, query_weight * factor, key_weight * factor, draw(1, heads, tokens, value_dim))
    )
    return Inputs(query, key, pack_sign_bits(query), pack_sign_bits(key), query_weight, key_weight, value)


@dataclass(frozen=True, kw_only=True)
class Hamming(Subject):
    """This package's kernel.

    Args:
        packing: the time includes pack_sign_bits for q and k.
        leaves: inputs that get gradients.
        instruction_set: instruction set of the compiled library; None does not change it.
    """

    backend: str
    instruction_set: str | None = None
    heads: int = HEADS
    packing: bool = False
    bit_gradient: str = "none"
    leaves: tuple[str, ...] = ("query_weight", "key_weight", "value")

    def prepare(self) -> Callable[[], object]:
        """Kernel on random inputs."""
        assert self.value_dim is not None
        x = make_inputs(self.tokens, self.heads, self.head_dim, self.value_dim, DTYPES[self.dtype], self.device)

        def forward() -> Tensor:
            return hamming_attention(
                pack_sign_bits(x.query) if self.packing else x.query_bits,
                pack_sign_bits(x.key) if self.packing else x.key_bits,
                x.query_weight,
                x.key_weight,
                x.value,
                head_dim=self.head_dim,
                query=x.query,
                key=x.key,
                bit_gradient=self.bit_gradient,
                seed=SEED,
                backend=self.backend,
            )

        action = one_pass(forward, [getattr(x, leaf) for leaf in self.leaves], self.step)
        if self.instruction_set is None:
            return action
        assert LIBRARY is not None
        return LIBRARY.using(self.instruction_set)(action)


@dataclass(frozen=True, kw_only=True)
class Sdpa(Subject):
    """torch's scaled_dot_product_attention.

    Args:
        padding: zero channels are appended to v (within the time) up to d.
        kernel: name of the one of torch.nn.attention.SDPBackend that must compute it; None: torch chooses.
    """

    heads: int = HEADS
    padding: bool = False
    kernel: str | None = None

    def prepare(self) -> Callable[[], object]:
        """SDPA on random inputs."""
        assert self.value_dim is not None
        x = make_inputs(self.tokens, self.heads, self.head_dim, self.value_dim, DTYPES[self.dtype], self.device)
        missing = self.head_dim - self.value_dim if self.padding else 0

        def forward() -> Tensor:
            value = F.pad(x.value, (0, missing)) if missing else x.value
            with nullcontext() if self.kernel is None else sdpa_kernel(SDPBackend[self.kernel]):
                return F.scaled_dot_product_attention(x.query, x.key, value)[..., : self.value_dim]

        return one_pass(forward, [x.query, x.key, x.value], self.step)


@dataclass(frozen=True, kw_only=True)
class NumpyBits(Subject):
    """The attention of one head as NumPy does it with np.bitwise_count (paper Appendix D); forward only.

    Args:
        attention: the formula written literally (:func:`plain_numpy_attention`), or :func:`numpy_attention`.
    """

    attention: Callable[..., np.ndarray]

    def prepare(self) -> Callable[[], object]:
        """XOR of 64-bit words and bitwise_count, then weights, softmax and P V."""
        assert self.value_dim is not None and self.head_dim == HEAD_DIM
        x = make_inputs(self.tokens, 1, self.head_dim, self.value_dim, torch.float32)
        query, key = (bits[0, 0, :, 0].numpy().view(np.uint64) for bits in (x.query_bits, x.key_bits))
        query_weight = x.query_weight[0, 0, :, None].numpy() * np.float32(self.head_dim**-0.5)
        return partial(
            self.attention, query, key, query_weight, x.key_weight[0, 0].numpy(), x.value[0, 0].numpy(), self.head_dim
        )


def plain_numpy_attention(
    query: np.ndarray,
    key: np.ndarray,
    query_weight: np.ndarray,
    key_weight: np.ndarray,
    value: np.ndarray,
    head_dim: int,
) -> np.ndarray:
    """:func:`numpy_attention` written literally, with a new array for each operation; NumPy computes it in float64."""
    scores = query_weight * key_weight * (head_dim - 2 * np.bitwise_count(query[:, None] ^ key).astype(np.int32))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)) @ value


def numpy_attention(
    query: np.ndarray,
    key: np.ndarray,
    query_weight: np.ndarray,
    key_weight: np.ndarray,
    value: np.ndarray,
    head_dim: int,
) -> np.ndarray:
    """(Nq,) and (Nk,) uint64 words, (Nq, 1) scaled and (Nk,) weights, (Nk, d_v) values -> (Nq, d_v).

    In float32 and in place: about as fast as NumPy can be.
    """
    scores = np.bitwise_count(query[:, None] ^ key).astype(np.float32)
    scores *= -2
    scores += head_dim
    scores *= query_weight
    scores *= key_weight
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    return (scores @ value) / scores.sum(-1, keepdims=True)


@dataclass(frozen=True, kw_only=True)
class NumpyProduct(Subject):
    """The query-key product alone (paper Fig. 6 left): XOR and bitwise_count of 32-bit words, or a float32 matmul."""

    def prepare(self) -> Callable[[], object]:
        """Product of random operands."""
        rng = np.random.default_rng(SEED)
        if self.is_float:
            query, key = rng.standard_normal((2, self.tokens, self.head_dim), dtype=np.float32)
            return lambda: np.matmul(query, key.T)
        query, key = rng.integers(2**self.head_dim, size=(2, self.tokens), dtype=np.uint32)
        return lambda: np.bitwise_count(query[:, None] ^ key)


def numpy_counts_bits() -> bool:
    """Whether this NumPy has bitwise_count (2.0 and later)."""
    return hasattr(np, "bitwise_count")


def attention_subjects(tokens: int, backend: str, dense_limit: int) -> list[Subject]:
    """All heads: SDPA in its forms, and this kernel, in both types and both passes.

    Args:
        tokens: N.
        backend: backend of the kernel.
        dense_limit: largest N for the backward of SDPA with d_v != d, which holds N x N scores of every head.
    """
    subjects: list[Subject] = []
    for dtype in DTYPES:
        for step in (False, True):
            common: dict[str, Any] = {"family": "attention", "tokens": tokens, "dtype": dtype, "step": step}
            sdpa = partial(Sdpa, is_float=True, **common)
            hamming = partial(Hamming, backend=backend, head_dim=HEAD_DIM, **common)
            kernel = f"hamming ({backend})"
            dense = not step or tokens <= dense_limit
            subjects.append(sdpa(name="sdpa", head_dim=HEAD_DIM, value_dim=HEAD_DIM, is_baseline=True))
            subjects.append(
                sdpa(name="sdpa, V padded", head_dim=HEAD_DIM, value_dim=REDUCED_VALUE_DIM, padding=True),
            )
            if dense:
                subjects.append(sdpa(name="sdpa, V unpadded", head_dim=HEAD_DIM, value_dim=REDUCED_VALUE_DIM))
            if not step:
                channels = HEAD_DIM // FIGURE_4_DIVISOR
                few = partial(sdpa, is_float=False, head_dim=channels)
                subjects.append(few(name="sdpa, q k channels / 32", value_dim=HEAD_DIM))
                subjects.append(few(name="sdpa, q k v channels / 32", value_dim=channels))
            for value_dim in VALUE_DIMS:
                subjects.append(hamming(name=kernel, value_dim=value_dim))
                subjects.append(hamming(name=f"{kernel} + packing", value_dim=value_dim, packing=True))
                if backend == "cpu" and LIBRARY is not None and SECOND_SET in LIBRARY.runnable:
                    name = f"hamming ({backend}, {SECOND_SET})"
                    subjects.append(hamming(name=name, value_dim=value_dim, instruction_set=SECOND_SET))
                if step and dtype == "float32":
                    bits = ("value", "query", "key")
                    weights = ("query_weight", "key_weight")
                    for name, gradient in (("ternary", "ternary"), ("straight-through", "ste")):
                        learned = partial(hamming, value_dim=value_dim, bit_gradient=gradient)
                        subjects.append(learned(name=f"{kernel}, {name} q k", leaves=bits))
                        subjects.append(learned(name=f"{kernel}, {name} q k + weights", leaves=weights + bits))
    return subjects


def one_head_subjects(tokens: int, backend: str) -> list[Subject]:
    """One head, forward, float32: SDPA, this kernel and NumPy."""
    common: dict[str, Any] = {"family": "one head", "tokens": tokens, "head_dim": HEAD_DIM}
    subjects: list[Subject] = [
        Sdpa(name="sdpa, 1 head", value_dim=HEAD_DIM, heads=1, is_baseline=True, is_float=True, **common)
    ]
    numpy = partial(NumpyBits, **common)
    for value_dim in VALUE_DIMS:
        name = f"hamming ({backend}), 1 head"
        subjects.append(Hamming(name=name, value_dim=value_dim, heads=1, backend=backend, **common))
        if numpy_counts_bits():
            subjects.append(numpy(name=NUMPY_PLAIN, attention=plain_numpy_attention, value_dim=value_dim))
            subjects.append(numpy(name=NUMPY_TUNED, attention=numpy_attention, value_dim=value_dim))
    return subjects


def product_subjects(tokens: list[int]) -> list[Subject]:
    """Fig. 6 left: growing N at d = 32."""
    return [
        NumpyProduct(
            name=f"numpy {'matmul' if is_float else 'xor + bitwise_count'}, product alone",
            family="product",
            tokens=n,
            head_dim=PRODUCT_DIM,
            value_dim=None,
            dtype="float32" if is_float else "uint32",
            is_float=is_float,
        )
        for n in tokens
        for is_float in (False, True)
        if is_float or numpy_counts_bits()
    ]
