"""Packing and unpacking of sign bits."""

import math
import re

import pytest
import torch

from hf_binaryformer.kernels import pack_sign_bits, unpack_sign_bits

HEAD_DIMS = [1, 31, 63, 64, 65, 100, 128, 129]
FLOAT_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_every_bit_is_the_sign_of_its_channel(head_dim: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, head_dim).to(dtype)
    bits = pack_sign_bits(x)
    words = math.ceil(head_dim / 64)
    assert bits.shape == (3, words)
    assert bits.dtype == torch.int64
    for row, packed in zip(x.tolist(), bits.tolist(), strict=True):
        for word in range(words):
            unsigned = packed[word] % 2**64
            for j in range(64):
                channel = 64 * word + j
                expected = int(channel < head_dim and row[channel] >= 0)
                assert (unsigned >> j) & 1 == expected, f"channel {channel} of {head_dim}"


def test_zero_and_minus_zero_are_positive() -> None:
    tiny = torch.finfo(torch.float32).tiny
    assert pack_sign_bits(torch.tensor([0.0, -0.0, tiny, -tiny, math.inf, -math.inf])).tolist() == [0b010111]


def test_all_positive_fills_whole_words_only_up_to_head_dim() -> None:
    assert pack_sign_bits(torch.ones(64)).tolist() == [-1]
    assert pack_sign_bits(torch.ones(66)).tolist() == [-1, 0b11]
    assert pack_sign_bits(-torch.ones(66)).tolist() == [0, 0]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_unpack_inverts_pack(head_dim: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, head_dim).to(dtype)
    x[0, 0, 0] = 0
    signs = unpack_sign_bits(pack_sign_bits(x), head_dim, dtype=dtype)
    assert signs.dtype == dtype
    assert torch.equal(signs, torch.where(x >= 0, 1.0, -1.0).to(dtype))


def test_unpack_is_float32_by_default_and_inverted_by_pack() -> None:
    bits = torch.randint(-(2**63), 2**63 - 1, (4, 7, 2))
    signs = unpack_sign_bits(bits, 128)
    assert signs.dtype == torch.float32
    assert torch.equal(pack_sign_bits(signs), bits)


@pytest.mark.parametrize("shape", [(65,), (0, 65), (2, 0, 65), (2, 3, 1, 4, 65)])
def test_any_number_of_leading_axes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    bits = pack_sign_bits(x)
    assert bits.shape == (*shape[:-1], 2)
    assert unpack_sign_bits(bits, 65).shape == shape


def test_strides_do_not_matter() -> None:
    x = torch.randn(100, 6, 3)
    views = [x.permute(2, 1, 0), x[::2].permute(1, 2, 0), x[:, :, :1].expand(100, 6, 4).permute(1, 2, 0)]
    for view in views:
        assert not view.is_contiguous()
        bits = pack_sign_bits(view)
        assert torch.equal(bits, pack_sign_bits(view.contiguous()))
        spread = torch.stack([bits, bits], dim=-1)[..., 0]
        assert torch.equal(unpack_sign_bits(spread, view.shape[-1]), torch.where(view >= 0, 1.0, -1.0))


def test_no_gradient_reaches_the_bits() -> None:
    bits = pack_sign_bits(torch.randn(2, 5, requires_grad=True))
    assert not bits.requires_grad


def test_unpack_names_the_words_it_expected() -> None:
    with pytest.raises(ValueError) as error:
        unpack_sign_bits(torch.zeros(3, 1, dtype=torch.int64), 65)
    assert {"65", "2", "1"} <= set(re.findall(r"\d+", str(error.value)))


def test_pack_and_unpack_compile_without_a_graph_break() -> None:
    def round_trip(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        bits = pack_sign_bits(x)
        return bits, unpack_sign_bits(bits, x.shape[-1])

    x = torch.randn(2, 9, 100)
    compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(x), round_trip(x), strict=True):
        assert torch.equal(actual, expected)
