"""Sign bits, packed 64 to an int64 word."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_binaryformer.kernels.backends import first_result

WORD_BITS = 64


def words_for(head_dim: int) -> int:
    """Number of int64 words that hold ``head_dim`` bits."""
    return -(-head_dim // WORD_BITS)


@torch.library.custom_op("hf_binaryformer::pack_sign_bits", mutates_args=())
def pack_sign_bits(x: Tensor) -> Tensor:
    """Pack signs into words: bit ``j`` of word ``w`` is 1 where ``x[..., 64 w + j] >= 0`` (paper Eq. 1: sgn(0) = +1).

    Args:
        x: (..., d) real numbers, d >= 1, any strides. NaN packs as 0.

    Returns:
        (..., ceil(d / 64)) int64; the padding bits of the last word are 0.

    Example:
        >>> pack_sign_bits(torch.tensor([[0.5, -1.0, 0.0]]))
        tensor([[5]])
    """
    head_dim = x.shape[-1]
    if head_dim < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last axis must hold at least one channel")
    if (packed := first_result("pack_sign_bits", x)) is not None:
        return packed
    padding = words_for(head_dim) * WORD_BITS - head_dim
    bits = torch.nn.functional.pad((x >= 0).to(torch.uint8), (0, padding))
    place = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=x.device)
    octets = (bits.unflatten(-1, (-1, 8)) * place).sum(-1, dtype=torch.uint8)
    return octets.view(torch.int64)


@pack_sign_bits.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], words_for(x.shape[-1])), dtype=torch.int64)


def clear_padding(bits: Tensor, head_dim: int) -> Tensor:
    """Words whose padding bits, those beyond ``head_dim``, are 0; the same tensor if there is no padding."""
    used = head_dim % WORD_BITS
    if used == 0:
        return bits
    mask = (1 << used) - 1
    if bits.shape[-1] == 1:
        return bits & mask
    cleared = bits.clone()
    cleared[..., -1] &= mask
    return cleared


def unpack_sign_bits(bits: Tensor, head_dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unpack the signs, so that ``unpack_sign_bits(pack_sign_bits(x), d) == sgn(x)``.

    Args:
        bits: (..., words) int64.
        head_dim: number of channels d that were packed, ``words == ceil(d / 64)``.
        dtype: type of the result.

    Returns:
        (..., d) of -1 and +1.

    Raises:
        ValueError: the number of words does not fit ``head_dim``.
    """
    if bits.shape[-1] != words_for(head_dim):
        raise ValueError(
            f"bits has {bits.shape[-1]} words, head_dim {head_dim} needs {words_for(head_dim)}: "
            f"pass the head_dim that was packed"
        )
    octets = bits.contiguous().view(torch.uint8)
    shift = torch.arange(8, dtype=torch.uint8, device=bits.device)
    ones = (octets.unsqueeze(-1) >> shift) & 1
    return ones.flatten(-2)[..., :head_dim].to(dtype) * 2 - 1
