"""The Hub kernel against its formula; kernel-builder runs this on each kind of device."""

import hamming_attention
import pytest
import torch


@pytest.mark.kernels_ci
@pytest.mark.parametrize("tokens", [1, 63, 100])
def test_forward_and_gradients(tokens):
    """Output and gradient of the values are those of softmax over products of signs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, tokens, 40, device=device, requires_grad=True) for _ in range(3))
    signs = [torch.where(x >= 0, 1.0, -1.0) for x in (query, key)]
    expected = (signs[0] @ signs[1].mT / 40**0.5).softmax(-1) @ value
    found = hamming_attention.sign_attention(query, key, value, bit_gradient="ste")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    grad = torch.randn_like(found)
    (expected_grad,) = torch.autograd.grad(expected, value, grad)
    found.backward(grad)
    torch.testing.assert_close(value.grad, expected_grad, rtol=1e-3, atol=1e-4)
    assert query.grad.isfinite().all()
    assert tokens == 1 or query.grad.abs().sum() > 0
