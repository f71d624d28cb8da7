"""Device code of the backend "triton" for the ternary gradient: the draws of :mod:`hf_binaryformer.kernels.draws`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place_of(tokens, TILE: tl.constexpr):
    """Tile of tokens and head of this program. Both are folded into the first axis of the grid, as the others end at 65 535."""
    tiles = tl.cdiv(tokens, TILE)
    return tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)


@triton.jit
def _multiply32(h):
    """As :func:`hf_binaryformer.kernels.draws._multiply32`, on uint32."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    return (h ^ (h >> 15)) * 0x846CA68B


@triton.jit
def _mix32(h):
    h = _multiply32(h)
    return h ^ (h >> 16)


@triton.jit
def row_hash(base, head, i):
    """Hash of each query of a head; base is that of the seed."""
    return _mix32(_mix32(base.to(tl.uint32) + head.to(tl.uint32)) + i.to(tl.uint32))


@triton.jit
def draws(row, j):
    """Whole numbers below 2^22, of which (n + 1/2) / 2^22 are the draws of :func:`hf_binaryformer.kernels.draws.uniform`."""
    return _multiply32(row + j.to(tl.uint32) * 0x9E3779B9) >> 10


@triton.jit(do_not_specialize=["seed"])
def hash_rows(hashes, seed, rows, SEED_ON_DEVICE: tl.constexpr, R: tl.constexpr):
    """Hashes (B·H, rows) of the queries; seed is the hash of the seed, a number or (SEED_ON_DEVICE) where it lies."""
    base = tl.load(seed) if SEED_ON_DEVICE else seed
    tile, group = place_of(rows, R)
    i = tile * R + tl.arange(0, R)
    tl.store(hashes + group * rows + i, row_hash(base, group, i).to(tl.int32, bitcast=True), mask=i < rows)


@triton.jit
def ternary(g, draw, poison):
    """Signs +1, 0, -1 (float16) of an unbiased ternary form of the rows of g, and their scales, the largest abs(g).

    max skips what is not a number. A poison that is NaN where a row has one makes the scale NaN, and all that is summed.
    """
    size = tl.abs(g)
    scale = tl.max(size, 1) + 0.0 * poison
    step = tl.expand_dims(scale * (1.0 / 4194304), 1)
    drawn = tl.fma(draw.to(tl.float32), step, 0.5 * step) < size
    # 1 with the sign of g, in one operation on its bits.
    sign = ((g.to(tl.int32, bitcast=True) & -2147483648) | 0x3F800000).to(tl.float32, bitcast=True)
    return tl.where(drawn, sign, 0.0).to(tl.float16), scale
