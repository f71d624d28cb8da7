"""Random inputs of `hamming_attention`, one run of it with all gradients, and the (backend, device) pairs present."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hamming_oracle import Expected, assert_close, hamming_oracle, pack_by_hand
from torch import Tensor

from hf_binaryformer.kernels import available_backends, hamming_attention

BACKEND_DEVICES = {"reference": ["cpu", "cuda", "mps"], "cpu": ["cpu"], "triton": ["cuda"], "metal": ["mps"]}
DEVICE_PRESENT = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
TARGETS = [
    (backend, device)
    for backend in available_backends()
    for device in BACKEND_DEVICES[backend]
    if DEVICE_PRESENT[device]
]
on_every_target = pytest.mark.parametrize(("backend", "device"), TARGETS)

Results = dict[str, Tensor]


@dataclass
class Case:
    query_bits: Tensor
    key_bits: Tensor
    query_weight: Tensor
    key_weight: Tensor
    value: Tensor
    output_gradient: Tensor
    head_dim: int
    query: Tensor | None = None
    key: Tensor | None = None

    def inputs(self) -> tuple[Tensor, ...]:
        return self.query_bits, self.key_bits, self.query_weight, self.key_weight, self.value

    def run(self, *, bit_gradient: str = "none", **options: Any) -> Results:
        """Output and every gradient, by name; `query` and `key` are handed over only for a bit gradient."""
        learned = {
            name: getattr(self, name).detach().requires_grad_()
            for name in ("query_weight", "key_weight", "value", "query", "key")
            if getattr(self, name) is not None and (bit_gradient != "none" or name not in ("query", "key"))
        }
        output = hamming_attention(
            self.query_bits, self.key_bits, head_dim=self.head_dim, bit_gradient=bit_gradient, **learned, **options
        )
        gradients = torch.autograd.grad(output, list(learned.values()), self.output_gradient)
        return {"output": output.detach(), **dict(zip(learned, gradients, strict=True))}

    def expected(self, *, scale: float | None = None, key_mask: Tensor | None = None) -> Expected:
        options = {"head_dim": self.head_dim, "scale": scale, "key_mask": key_mask}
        return hamming_oracle(*self.inputs(), self.output_gradient, query=self.query, key=self.key, **options)

    def with_(self, **changes: Any) -> "Case":
        return replace(self, **changes)


def make_case(
    queries: int = 9,
    keys: int = 7,
    head_dim: int = 64,
    value_dim: int = 16,
    *,
    batch: int = 2,
    heads: int = 3,
    planes: int | None = None,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Case:
    """Signs, weights of both signs and values at random; with `planes` the two-plane layout, without real q and k."""

    if device == "mps" and dtype == torch.float64:
        pytest.skip("Apple GPUs have no float64")

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(device, dtype)

    plane = () if planes is None else (planes,)
    query, key = draw(batch, heads, queries, *plane, head_dim), draw(batch, heads, keys, *plane, head_dim)
    return Case(
        query_bits=pack_by_hand(query),
        key_bits=pack_by_hand(key),
        query_weight=draw(batch, heads, queries, *plane),
        key_weight=draw(batch, heads, keys, *plane),
        value=draw(batch, heads, keys, value_dim),
        output_gradient=draw(batch, heads, queries, value_dim),
        head_dim=head_dim,
        query=query if planes is None else None,
        key=key if planes is None else None,
    )


def assert_matches(results: Results, expected: Expected, *, floor: float = 0.0) -> None:
    for name, actual in results.items():
        assert_close(actual, getattr(expected, name), name, floor=floor)
