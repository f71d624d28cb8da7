"""Stochastic ternary numbers for the bit gradient, from a counter-based hash that every backend reproduces exactly."""

from __future__ import annotations

import torch
from torch import Tensor

DRAW_BITS = 22
# Number of queries, and of keys, in a block whose ternary numbers share one scale.
BLOCK = 64


def ternary(g: Tensor, draw: Tensor, dim: int) -> Tensor:
    """Unbiased stochastic ternary form of g: ``sgn(g) * s`` where ``draw < abs(g) / s``, else 0, so that the mean is g.

    s is the largest abs(g) of each BLOCK entries along ``dim``. Any s that is at least as large keeps the mean, and the
    smallest one has the least variance. The block size is fixed, so a kernel knows s before it draws.

    Args:
        g: real numbers.
        draw: uniform in (0, 1), with the shape of g.
        dim: axis that the result is to be summed over.
    """
    size = g.abs()
    blocks = [block.amax(dim, keepdim=True).expand_as(block) for block in size.split(BLOCK, dim)]
    scale = torch.cat(blocks, dim)
    drawn = draw < size.div_(scale)
    return scale.copysign_(g).mul_(drawn)


def uniform(seed: Tensor, group: slice, rows: slice, keys: int, device: torch.device) -> Tensor:
    """Uniform float32 in (0, 1) for every (head, query, key), which depends only on (seed, head, i, j).

    head counts batch x heads. All arithmetic is modulo 2^32, mix is :func:`_mix32`, and mix' is its part before the
    last xor-shift: ``row = mix(mix(mix(mix(seed_low) + seed_high) + head) + i)``,
    ``number = mix'(row + 0x9E3779B9 * j)``. The result is ``((number >> 10) + 1/2) / 2^22``. This leaves one bit of a
    float32 unused, so that 1 + draw stays below 2.
    """
    head = torch.arange(group.start, group.stop, dtype=torch.int32, device=device)[:, None, None]
    i = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=device)[None, :, None]
    j = torch.arange(keys, dtype=torch.int32, device=device)
    row = _mix32(_mix32(seed_hash(seed.to(device)) + head) + i)
    number = _multiply32(row + j * -1640531527)
    return number.bitwise_right_shift_(10).bitwise_and_(2**DRAW_BITS - 1).float().add_(0.5).mul_(2.0**-DRAW_BITS)


def seed_hash(seed: Tensor) -> Tensor:
    """``mix(mix(seed_low) + seed_high)`` as a 0-d int32 tensor: what all draws of a seed have in common."""
    return _mix32(_mix32(_low32(seed)) + _low32(seed >> 32))


def seed_from_head(seed: Tensor, first: int) -> Tensor:
    """The seed whose head 0 has the draws that head ``first`` has with ``seed``: for a part of a batch."""
    number = int(seed)
    low = number & _MASK
    start = _mixed(_mixed(low) + (number >> 32) & _MASK) + first & _MASK
    high = _unmixed(start) - _mixed(low) & _MASK
    return torch.tensor((high << 32 | low) - (1 << 64 if high >> 31 else 0), dtype=torch.int64)


_MASK = 2**32 - 1
_MULTIPLIERS = 0x7FEB352D, 0x846CA68B


def _mixed(h: int) -> int:
    """:func:`_mix32` of a Python number."""
    h = (h ^ h >> 16) * _MULTIPLIERS[0] & _MASK
    h = (h ^ h >> 15) * _MULTIPLIERS[1] & _MASK
    return h ^ h >> 16


def _unmixed(h: int) -> int:
    """The inverse of :func:`_mixed`."""
    h = (h ^ h >> 16) * pow(_MULTIPLIERS[1], -1, 2**32) & _MASK
    h = (h ^ h >> 15 ^ h >> 30) * pow(_MULTIPLIERS[0], -1, 2**32) & _MASK
    return h ^ h >> 16


def _low32(x: Tensor) -> Tensor:
    """The low 32 bits of an int64 tensor as int32 (two's complement)."""
    x = x & 0xFFFFFFFF
    return torch.where(x >= 2**31, x - 2**32, x).to(torch.int32)


def _mix32(h: Tensor) -> Tensor:
    """A 32-bit integer finaliser: xor-shift 16, multiply, xor-shift 15, multiply, xor-shift 16 (logical shifts)."""
    h = _multiply32(h)
    return h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF))


def _multiply32(h: Tensor) -> Tensor:
    """Xor-shift 16, multiply by 0x7FEB352D, xor-shift 15, multiply by 0x846CA68B."""
    h = h ^ (h >> 16).bitwise_and_(0xFFFF)
    h.mul_(0x7FEB352D)
    h.bitwise_xor_((h >> 15).bitwise_and_(0x1FFFF))
    return h.mul_(-2073254261)
