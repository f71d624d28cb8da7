"""What only a GPU can show of the Triton backend; `scripts/benchmarks/gpu.py` runs this with the other tests there."""

import pytest
import torch
from hamming_cases import make_case

from hf_binaryformer.kernels import available_backends, sign_attention
from hf_binaryformer.kernels.balance import balance, reference_balance, reference_balance_backward

pytestmark = pytest.mark.skipif("triton" not in available_backends(), reason="needs a GPU that Triton serves")


def test_triton_in_a_cuda_graph_draws_anew_at_each_replay() -> None:
    """Catches a host synchronisation in either pass, and a seed that was drawn once for the graph."""
    query, key, value = (torch.randn(1, 2, 200, 64, device="cuda", requires_grad=True) for _ in range(3))
    inputs = query, key, value

    def step() -> tuple[torch.Tensor, ...]:
        output = sign_attention(*inputs, backend="triton")
        return output, *torch.autograd.grad(output, inputs, torch.ones_like(output))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append([tensor.clone() for tensor in found])
    expected = sign_attention(*inputs, bit_gradient="none", backend="reference")
    torch.testing.assert_close(replays[0][0], expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(replays[0][0], replays[1][0])
    assert not torch.equal(replays[0][1], replays[1][1]), "the second replay drew the same ternary numbers"


def test_triton_repeats_its_results() -> None:
    """No sum is atomic."""
    case = make_case(700, 900, 64, 16, dtype=torch.float32, device="cuda")
    first, second = (case.run(bit_gradient="ternary", seed=3, backend="triton") for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_balances_as_the_reference(dtype) -> None:
    x = torch.randn(2, 6, 1601, 64, device="cuda", dtype=dtype, requires_grad=True)
    y, bits = balance(x, window=1.0)
    expected = reference_balance(x.detach(), True, True)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(y, expected[0], rtol=tolerance, atol=tolerance)
    assert (bits != expected[1]).float().mean() < 1e-2, "signs differ where y is not 0"
    (found,) = torch.autograd.grad(y, x, torch.ones_like(y))
    wanted = reference_balance_backward(torch.ones_like(y), y.detach(), expected[2], True, True, 1.0)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
