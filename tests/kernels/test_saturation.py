"""Saturated tokens and their signs: the compiled pass on every instruction set, and its gradient."""

import numpy as np
import pytest
import torch
from cpu_cases import LIBRARY, RUNNABLE, each_instruction_set

from hf_binaryformer.kernels.saturation import saturate_and_sign

# Largest relative error: rounding of the type, and the arithmetic of float32.
TOLERANCE = {torch.float64: 1e-15, torch.float32: 5e-6, torch.float16: 6e-4, torch.bfloat16: 4.2e-3}
BETAS = [0.5, 1.3]
SPECIAL = [0.0, -0.0, 1e-38, -1e-38, 0.0156, -0.0157, 8.9, -9.1, 60000.0, -60000.0, np.inf, -np.inf]

instruction_set = pytest.fixture(params=RUNNABLE)(each_instruction_set)


def check(x: torch.Tensor, beta: float) -> None:
    tanh, sign = saturate_and_sign(x, beta)
    assert tanh.dtype == sign.dtype == x.dtype and tanh.is_contiguous() and sign.is_contiguous()
    numbers = x.double().numpy()
    np.testing.assert_allclose(tanh.double(), np.tanh(beta * numbers), rtol=TOLERANCE[x.dtype], atol=1e-7)
    np.testing.assert_array_equal(sign.double(), np.where(numbers >= 0, 1.0, -1.0))


@pytest.mark.skipif(LIBRARY is None, reason="no compiled library")
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 63, 64, 65, 384])
@pytest.mark.parametrize("beta", BETAS)
def test_every_instruction_set_agrees_with_float64(dtype, channels, beta) -> None:
    check((4 * torch.randn(70, channels)).to(dtype), beta)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_small_large_and_zero(dtype) -> None:
    x = torch.tensor([SPECIAL]).to(dtype)
    check(x, 0.5)
    check(torch.logspace(-6, 1, 500).to(dtype)[None], 0.5)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_not_a_number_stays_at_its_place(dtype) -> None:
    x = torch.ones(3, 5, dtype=dtype)
    x[1, 2] = torch.nan
    tanh, sign = saturate_and_sign(x, 0.5)
    assert torch.equal(tanh.isnan(), x.isnan())
    assert sign[1, 2] == -1 and sign.sum() == 13


@pytest.mark.parametrize("rows", [0, 1, 500])
def test_strides_and_threads_do_not_matter(rows) -> None:
    wide = torch.randn(rows, 3 * 384)
    for view in (wide[:, 384:768], wide.T.contiguous().T, wide[:, ::3]):
        for part, whole in zip(saturate_and_sign(view, 0.5), saturate_and_sign(view.contiguous(), 0.5), strict=True):
            assert torch.equal(part, whole)


# `opcheck` itself reads `.grad` of the non-leaf copies that it makes.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operator_contract(dtype) -> None:
    x = torch.randn(5, 70, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.hf_binaryformer.saturate_and_sign.default, (x, 0.5))


def test_gradient_is_that_of_tanh() -> None:
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda t: saturate_and_sign(t, 0.7)[0], x)
    single = torch.randn(4, 9, requires_grad=True)
    grad = torch.randn(4, 9)
    saturate_and_sign(single, 0.7)[0].backward(grad)
    expected = grad * 0.7 * (1 - torch.tanh(0.7 * single.detach()) ** 2)
    torch.testing.assert_close(single.grad, expected)
