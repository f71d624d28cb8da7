"""What the tests of the compiled backends share: shapes, tolerances, instruction sets in turn, threads.

Weights choose the kernel's way: with a bound of the scores, or with a running maximum.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hamming_cases import Case, Results
from hamming_oracle import to_numpy

from hf_binaryformer.kernels.cpu_library import LIBRARY

RUNNABLE = LIBRARY.runnable if LIBRARY else []
HALVES = [torch.bfloat16, torch.float16]
# Largest norm(x - exact) / norm(exact): of the output, and of the gradients, which pass through the rounded output.
ALLOWED = {torch.float32: (5e-6, 1e-5), torch.bfloat16: (5e-3, 1e-2), torch.float16: (1e-3, 2e-3)}
# queries, keys, head_dim, value_dim, planes: tiles of 4 to 16 lanes, blocks of 64, 128, 256 and 512, one word and more.
SHAPES = [
    (33, 20, 7, 1, None),
    (17, 15, 65, 17, None),
    (16, 16, 32, 16, None),
    (33, 130, 31, 40, None),
    (65, 63, 100, 33, None),
    (515, 40, 64, 16, None),
    (20, 1101, 64, 16, None),
    (9, 7, 7, 16, 2),
    (31, 65, 65, 33, 2),
    (20, 300, 100, 5, 2),
]
# Rows whose bound is below go without a maximum, others with a running one; a tile of 4 to 16 rows goes one way. The
# kernel's kBounded is for scores, which lie on both sides of 0: half of this.
LARGEST_BOUND = 2 * 80


def each_instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Body of a fixture over ``RUNNABLE``: selects one, and afterwards again the one that was in use."""
    assert LIBRARY is not None
    with LIBRARY.using(request.param):
        assert LIBRARY.instruction_set == request.param
        yield request.param


def row_bounds(case: Case) -> torch.Tensor:
    """(B, H, Nq): 2 abs(scale log2(e) d w_q) max abs(w_k), how far a row's scores can lie apart in powers of two."""
    query, key = (w if w.dim() == 4 else w[..., None] for w in (case.query_weight.double(), case.key_weight.double()))
    return 2 * math.log2(math.e) * case.head_dim**0.5 * query.abs().sum(-1) * key.abs().amax(2).sum(-1)[..., None]


def with_bounds(case: Case, low: float, high: float, rows: slice = slice(None)) -> Case:
    """The case with float32 weights, the query weights of `rows` scaled so that their bounds are uniform in low .. high."""
    bounds = row_bounds(case)[..., rows]
    factor = (low + (high - low) * torch.rand_like(bounds)) / bounds
    weight = case.query_weight.float()
    weight[:, :, rows] *= (factor if weight.dim() == 3 else factor[..., None]).float()
    return case.with_(query_weight=weight, key_weight=case.key_weight.float())


def distance(actual: torch.Tensor, expected: np.ndarray | torch.Tensor) -> float:
    """norm(actual - expected) / norm(expected)"""
    exact = to_numpy(expected) if isinstance(expected, torch.Tensor) else expected
    return float(np.linalg.norm(to_numpy(actual) - exact) / np.linalg.norm(exact))


def assert_near(case: Case, dtype: torch.dtype, backend: str, slack: float = 1, **options: Any) -> Results:
    """Errors as allowed, or three times the reference's: of peaked rows little is left but the rounding of the output.

    In the gradient of the query weights, terms of a peaked row cancel; four roundings of each term are allowed.
    """
    results, reference = (case.run(backend=name, **options) for name in (backend, "reference"))
    expected = case.expected()
    for name, result in results.items():
        error, theirs = (distance(tensor, getattr(expected, name)) for tensor in (result, reference[name]))
        allowed = slack * max(ALLOWED[dtype][name != "output"], 3 * theirs)
        if name == "query_weight":
            cancelled = expected.query_weight_terms / np.linalg.norm(expected.query_weight)
            allowed = max(allowed, 4 * torch.finfo(torch.float32).eps * float(cancelled))
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"  # NaN fails too
    return results


@contextmanager
def threads(number: int) -> Iterator[None]:
    """PyTorch's number of threads, which the backend takes over."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
