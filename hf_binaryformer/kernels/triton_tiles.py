"""What the Triton kernels are compiled for: sizes, tiles, and the types that products are taken in."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_binaryformer.kernels.draws import BLOCK

# Weights exp2(score - bound) lie between 2^(-2 bound) and 1, and must not be lost in the type they are rounded to.
BOUND_LIMITS = {torch.float32: 50.0, torch.bfloat16: 50.0, torch.float16: 5.0}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Tiles(NamedTuple):
    """Sizes of a kernel's tiles, M queries and N keys, its warps, and the stages of its pipeline."""

    M: int
    N: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a kernel is compiled for.

    Args:
        head_dim, value_dim: channels.
        planes: 1, or 2 for two Bernoulli samples.
        dtype: of the values.
        bit_gradient: "none", "ste" or "ternary".
        weight_gradient: whether the backward pass returns gradients of the weights.
        unit: what multiplies: "wgmma", groups of four warps with operands in shared memory (NVIDIA's Hopper); "tcgen05",
            likewise with sums in a memory of their own (data-centre Blackwell); "mma", single warps with operands in
            registers, so that tiles must be smaller (NVIDIA's other GPUs); "mfma", AMD's, whose threads have up to 512
            registers if there are few of them.
    """

    head_dim: int
    value_dim: int
    planes: int
    dtype: torch.dtype
    bit_gradient: str = "none"
    weight_gradient: bool = True
    unit: str = "wgmma"

    @property
    def d(self) -> int:
        """Padded channels of signs."""
        return padded(self.head_dim, 32)

    @property
    def v(self) -> int:
        """Padded channels of values."""
        return padded(self.value_dim, 16)

    def forward_tiles(self) -> Tiles:
        """Tiles of :func:`.triton_kernels.attend`."""
        wide = max(self.d, self.v * self.dtype.itemsize)
        if wide <= 128:
            return Tiles(128, 64, 8, 3 if self.unit in ("wgmma", "tcgen05") else 2)
        return Tiles(64, 64, 4, 2) if wide <= 256 else Tiles(64, 32, 8, 2)

    def key_tiles(self) -> Tiles:
        """Tiles of :func:`.triton_kernels.backward_of_keys`: M is a block of draws."""
        rows, warps, stages = self._owned()
        return Tiles(BLOCK, rows, warps, stages)

    def query_tiles(self) -> Tiles:
        """Tiles of :func:`.triton_kernels.backward_of_queries`: N is a block of draws."""
        rows, warps, stages = self._owned()
        return Tiles(rows, BLOCK, warps, stages)

    def _owned(self) -> tuple[int, int, int]:
        """Rows that a program of the backward pass owns, its warps and stages: as many as find registers.

        ``scripts/benchmarks/assembly.py`` shows what each choice costs.
        """
        if self.bit_gradient == "none":
            rows, warps = 64, 4 if self.v <= 64 else 8
        elif self.unit in ("wgmma", "tcgen05"):
            # Matrix units take 64 rows of four warps: with 64 rows, eight warps would compute each score twice.
            rows = 128 if self.d <= 64 else 64 if self.d <= 128 else 32 if self.d <= 256 else 16
            warps = 8
        else:
            rows, warps = 32 if 64 <= self.d <= 128 else 16, 8 if self.unit == "mma" and self.d > 64 else 4
        if self.dtype.itemsize > 2:
            rows = max(16, rows // 2)
        return rows, warps, 1 if rows < 64 or (self.unit == "tcgen05" and self.d > 64) else 2

    def constants(self, tiles: Tiles, *, backward: bool) -> dict[str, Any]:
        """Compile-time arguments of a kernel, and options of the compiler."""
        found: dict[str, Any] = {
            "HEAD_DIM": self.head_dim,
            "VALUE_DIM": self.value_dim,
            "D": self.d,
            "V": self.v,
            "PLANES": self.planes,
            "M": tiles.M,
            "N": tiles.N,
            # Of float32 numbers: three products of TF32, or as they are.
            "PRECISION": "ieee" if self.unit == "mfma" else "tf32x3",
            "DOT": dot_type(self.dtype),
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
            "enable_fp_fusion": True,
        }
        if not backward:
            return {**found, "LIMIT": BOUND_LIMITS[self.dtype]}
        return {**found, "WEIGHT_GRADIENT": self.weight_gradient, "BIT_GRADIENT": self.bit_gradient}


def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that launches kernels, with the GPU of its first argument as the current one: launches go there."""

    @functools.wraps(function)
    def run(first: Tensor, *rest: Any) -> Any:
        with torch.cuda.device_of(first):
            return function(first, *rest)

    return run


def padded(size: int, least: int) -> int:
    """The next power of two."""
    return max(least, 1 << (size - 1).bit_length())


def dot_type(dtype: torch.dtype) -> Any:
    """The type that products of values are taken in. The interpreter's products of bfloat16 are wrong."""
    import triton.language as language

    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    return getattr(language, "float32" if INTERPRETED else names[dtype])
