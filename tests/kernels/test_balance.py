"""Balanced bits against the formula, written here in float64 and differentiated by autograd."""

from __future__ import annotations

import math

import pytest
import torch
from cpu_cases import LIBRARY, RUNNABLE, each_instruction_set
from hamming_oracle import pack_by_hand
from torch import Tensor

from hf_binaryformer.kernels import backends, hamming_attention, pack_sign_bits
from hf_binaryformer.kernels.balance import (
    EPSILON,
    _balance,
    balance,
    reference_balance,
    reference_balance_backward,
)

# B, H, N, d: odd lengths, one token, more than a block of rows and of words.
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 7, 24),
    (1, 2, 63, 64),
    (2, 1, 100, 65),
    (1, 2, 129, 100),
    (1, 1, 401, 130),
    (3, 2, 2, 3),
]
# Of y, relative to its largest number; of gradients likewise.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
CHOICES = [(True, True), (True, False), (False, True), (False, False)]


def formula(x: Tensor, centering: bool, norm: bool) -> Tensor:
    if centering:
        x = x - x.mean(2, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() if norm else x


def numbers(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """Channels of different means and sizes; plain, as a projection of all heads lies, or with gaps everywhere."""
    batch, heads, tokens, dim = shape
    x = torch.randn(shape, dtype=torch.float64) * torch.rand(dim, dtype=torch.float64) + torch.randn(dim)
    if layout == "projected":
        wide = torch.full((batch, tokens, 3 * heads * dim), math.nan, dtype=dtype)
        wide[..., heads * dim : 2 * heads * dim] = x.transpose(1, 2).flatten(2)
        return wide[..., heads * dim : 2 * heads * dim].unflatten(-1, (heads, dim)).transpose(1, 2)
    if layout == "gaps":
        wide = torch.full((batch, 2 * heads, tokens + 1, 3 * dim), math.nan, dtype=dtype)
        wide[:, ::2, :tokens, ::3] = x
        return wide[:, ::2, :tokens, ::3]
    return x.to(dtype)


def assert_near(got: Tensor, wanted: Tensor, dtype: torch.dtype, times: float = 1.0, least: float = 1e-30) -> None:
    scale = max(float(wanted.abs().max()), least)
    worst = float((got.detach().double() - wanted).abs().max()) / scale
    assert worst <= times * TOLERANCE[dtype], worst


@pytest.mark.parametrize("layout", ["plain", "projected", "gaps"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [None, 1.0])
def test_it_is_the_formula(shape, dtype, layout, window) -> None:
    for centering, norm in CHOICES:
        x = numbers(shape, dtype, layout).requires_grad_()
        y, bits = balance(x, centering=centering, norm=norm, window=window)
        assert y.dtype == dtype and y.shape == shape and bits.shape == (*shape[:3], -(-shape[3] // 64))
        exact = x.detach().double().requires_grad_()
        wanted = formula(exact, centering, norm)
        assert_near(y, wanted.detach(), dtype)
        # The bits are the signs of what comes back, rounded as it is.
        torch.testing.assert_close(bits, pack_by_hand(y.detach()), rtol=0, atol=0)
        cotangent = torch.randn(shape, dtype=torch.float64).to(dtype)
        (got,) = torch.autograd.grad(y, x, cotangent)
        inside = cotangent.double() * (1.0 if window is None else y.detach().double().abs() <= window)
        (grad,) = torch.autograd.grad(wanted, exact, inside)
        # The rounded y enters the derivative. One channel alone has y = 1 or -1 whatever it is: what is left of its gradient
        # is a difference of equal numbers.
        least = float(cotangent.abs().max() / exact.detach().abs().min()) if shape[3] == 1 else 1e-30
        assert_near(got, grad, dtype, times=8.0, least=least)


def test_each_channel_splits_the_tokens() -> None:
    x = torch.randn(2, 2, 400, 24) + 3 * torch.randn(24)
    before = (x >= 0).float().mean(2)
    after = (balance(x)[0] >= 0).float().mean(2)
    assert (before - 0.5).abs().mean() > 0.3 > 0.1 > (after - 0.5).abs().max()


def test_a_single_token_is_all_plus_one_and_learns_nothing() -> None:
    x = torch.randn(2, 3, 1, 10, requires_grad=True)
    y, bits = balance(x)
    assert not y.any() and torch.equal(bits, torch.full_like(bits, 2**10 - 1))
    y.backward(torch.randn_like(y))
    assert not x.grad.any()


def test_a_token_of_zeros_stays_finite() -> None:
    x = torch.zeros(1, 1, 4, 8, requires_grad=True)
    y, _ = balance(x, centering=False)
    y.sum().backward()
    assert not y.any() and torch.isfinite(x.grad).all()


def test_samples_do_not_see_each_other() -> None:
    x = torch.randn(3, 2, 9, 16)
    y, bits = balance(x)
    for sample in range(3):
        alone = balance(x[sample : sample + 1])
        assert torch.equal(alone[0][0], y[sample]) and torch.equal(alone[1][0], bits[sample])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_padding_takes_no_part_in_the_mean(dtype) -> None:
    """Each sample with its padding is what the sample without padding gives, forward and backward."""
    x, lengths = numbers((3, 2, 9, 24), dtype, "projected"), [9, 4, 2]
    mask = torch.rand(3, 9).argsort(1) < torch.tensor(lengths)[:, None]
    grad = torch.randn(3, 2, 9, 24, dtype=dtype) * mask[:, None, :, None]
    leaf = x.detach().clone().requires_grad_()
    y, bits = balance(leaf, token_mask=mask, window=1.0)
    (found,) = torch.autograd.grad(y, leaf, grad)
    for b in range(3):
        alone = x[b : b + 1, :, mask[b]].detach().clone().requires_grad_()
        wanted, wanted_bits = balance(alone, window=1.0)
        assert_near(y[b, :, mask[b]], wanted[0].detach().double(), dtype)
        (wanted_grad,) = torch.autograd.grad(wanted, alone, grad[b : b + 1, :, mask[b]])
        assert_near(found[b, :, mask[b]], wanted_grad[0].double(), dtype, least=1.0)

        assert torch.equal(bits[b, :, mask[b]], wanted_bits[0])
        assert not found[b, :, ~mask[b]].any()


def test_a_mask_of_another_kind_is_refused() -> None:
    for mask in (torch.ones(2, 5), torch.ones(2, 4, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"token_mask has shape .*, expected bool \(B, N\) = \(2, 5\)"):
            balance(torch.randn(2, 3, 5, 8), token_mask=mask)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4)], ids=str)
def test_nothing_gives_nothing(shape) -> None:
    y, bits = balance(torch.empty(shape, requires_grad=True))
    assert y.shape == shape and bits.shape == (*shape[:3], 1)
    y.sum().backward()


@pytest.mark.parametrize(
    "x", [torch.zeros(2, 3, 4), torch.zeros(1, 2, 3, 4, dtype=torch.int64), torch.zeros(1, 2, 3, 0)]
)
def test_what_is_no_query_is_refused(x) -> None:
    with pytest.raises(ValueError, match=r"expected real numbers \(B, H, N, d\)"):
        balance(x)


def test_the_window_belongs_to_either_pass() -> None:
    """The operator's window and that of the balance give one gradient."""
    x = torch.randn(1, 2, 40, 20, dtype=torch.float64)
    key, value, ones = torch.randn(1, 2, 40, 20), torch.randn(1, 2, 40, 4, dtype=torch.float64), torch.ones(1, 2, 40)
    gradients = []
    for of_balance, of_operator in ((1.0, None), (None, 1.0), (None, None)):
        query = x.clone().requires_grad_()
        y, bits = balance(query, window=of_balance)
        out = hamming_attention(
            bits, pack_sign_bits(key), ones, ones, value, head_dim=20, query=y, key=key, bit_gradient="ste",
            window=of_operator,
        )  # fmt: skip
        out.square().sum().backward()
        gradients.append(query.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert not torch.allclose(gradients[0], gradients[2])


# `opcheck` itself reads `.grad` of the non-leaf copies that it makes.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("window", [math.inf, 1.0])
def test_the_operator_is_well_registered(window) -> None:
    x = numbers((2, 3, 9, 20), torch.float32, "plain").requires_grad_()
    torch.library.opcheck(_balance, (x, True, True, window))
    compiled = torch.compile(lambda t: balance(t, window=1.0)[0].square().sum(), fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(x), x)
    (wanted,) = torch.autograd.grad(balance(x, window=1.0)[0].square().sum(), x)
    torch.testing.assert_close(got, wanted)


instruction_set = pytest.fixture(params=RUNNABLE)(each_instruction_set)


@pytest.mark.skipif(LIBRARY is None, reason="no compiled library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_instruction_set_and_number_of_threads(instruction_set, dtype) -> None:
    x, grad = numbers((2, 3, 131, 70), dtype, "projected"), torch.randn(2, 3, 131, 70).to(dtype)
    y, bits, factors = reference_balance(x, True, True)
    wanted = reference_balance_backward(grad, y, factors, True, True, 1.0)
    backend = backends.get_backend("cpu")
    results = []
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            mine = backend.balance(x, True, True)
            results.append((*mine, backend.balance_backward(y, grad, factors, True, True, 1.0)))
        finally:
            torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    got_y, got_bits, got_factors, got = results[0]
    assert_near(got_y, y.double(), dtype)
    assert_near(got_factors, factors.double(), torch.float32)
    assert_near(got, wanted.double(), dtype, times=2.0)
    torch.testing.assert_close(got_bits, pack_by_hand(got_y), rtol=0, atol=0)
    # A number that rounds to the other side of 0 may change its bit; no more than a few do.
    assert (got_bits != bits).float().mean() < 0.02
