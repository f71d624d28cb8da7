"""`torch.func` and forward-mode differentiation of every operator: the gradient of `backward()`, or an error that says why."""

from collections.abc import Callable

import pytest
import torch
from hamming_cases import on_every_target
from torch import Tensor

from hf_binaryformer.kernels import sign_attention
from hf_binaryformer.kernels.balance import balance
from hf_binaryformer.kernels.saturation import saturate_and_sign

# The forward mode of torch compiles scripts when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

Function = Callable[[Tensor], Tensor]


def loss_of(bit_gradient: str, backend: str, differentiated: str) -> Function:
    """A loss of queries, keys or values (2, 3, 7, 20); the other two are fixed."""
    fixed = dict(zip(("query", "key", "value"), torch.randn(3, 2, 3, 7, 20), strict=True))

    def loss(x: Tensor) -> Tensor:
        inputs = fixed | {differentiated: x}
        return sign_attention(**inputs, bit_gradient=bit_gradient, seed=3, backend=backend).square().sum()

    return loss


OTHERS: dict[str, Function] = {
    "balance": lambda x: balance(x, window=1.0)[0].pow(3).sum(),
    "saturate_and_sign": lambda x: saturate_and_sign(x.flatten(0, 2), 0.5)[0].pow(3).sum(),
}


def assert_func_agrees(loss: Function) -> None:
    x = torch.randn(2, 3, 7, 20)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert expected.any()
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    value, pull_back = torch.func.vjp(loss, x)
    torch.testing.assert_close(pull_back(torch.ones_like(value))[0], expected)
    gradient, value = torch.func.grad_and_value(loss)(x)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(value, loss(x))


@on_every_target
@pytest.mark.parametrize(
    ("bit_gradient", "differentiated"),
    [("none", "value"), ("ste", "query"), ("ste", "key"), ("ternary", "query"), ("ternary", "key")],
)
def test_func_grad_is_the_gradient(bit_gradient, differentiated, backend, device) -> None:
    if device != "cpu":
        pytest.skip("the fixed tensors are on the CPU")
    assert_func_agrees(loss_of(bit_gradient, backend, differentiated))


@pytest.mark.parametrize("name", OTHERS)
def test_func_grad_of_the_other_operators(name) -> None:
    assert_func_agrees(OTHERS[name])


def test_functional_call_of_a_module() -> None:
    """What meta-learning and per-parameter tools do: the gradient of all parameters of a module as a function."""
    layer = torch.nn.Linear(20, 60)
    x = torch.randn(2, 3, 7, 20)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        query, key, value = torch.func.functional_call(layer, parameters, (x,)).chunk(3, -1)
        return sign_attention(query, key, value, seed=1).square().sum()

    parameters = dict(layer.named_parameters())
    found = torch.func.grad(loss)({name: p.detach() for name, p in parameters.items()})
    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for name, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(found[name], gradient)


def test_func_grad_in_compiled_code() -> None:
    torch._dynamo.reset()
    loss, x = loss_of("ste", "reference", "query"), torch.randn(2, 3, 7, 20)
    compiled = torch.compile(lambda x: torch.func.grad(loss)(x), backend="aot_eager")
    torch.testing.assert_close(compiled(x), torch.func.grad(loss)(x))


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
def test_a_gradient_for_each_sample() -> None:
    query, key, value = torch.randn(3, 4, 1, 2, 7, 20)

    def loss(value: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sign_attention(query, key, value, bit_gradient="none").square().sum()

    found = torch.func.vmap(torch.func.grad(loss))(value, query, key)
    expected = torch.stack([torch.func.grad(loss)(*one) for one in zip(value, query, key, strict=True)])
    torch.testing.assert_close(found, expected)


FORWARD_MODE = {
    "values": loss_of("none", "reference", "value"),
    "queries": loss_of("ste", "reference", "query"),
    **OTHERS,
}


@pytest.mark.parametrize("name", FORWARD_MODE)
def test_forward_mode_is_refused(name) -> None:
    """A tangent of 0 without a word would be a wrong derivative."""
    loss, x = FORWARD_MODE[name], torch.randn(2, 3, 7, 20)
    with pytest.raises(
        NotImplementedError, match=r"hf_binaryformer::.*forward-mode.*torch\.func\.grad or backward\(\)"
    ):
        torch.func.jvp(loss, (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        loss(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jacfwd(loss)(x)


def test_forward_mode_of_what_does_not_pass_through_the_operator() -> None:
    loss, x = FORWARD_MODE["values"], torch.randn(2, 3, 7, 20)
    value, tangent = torch.func.jvp(lambda shift: loss(x) + shift, (torch.ones(()),), (torch.ones(()),))
    torch.testing.assert_close((value, tangent), (loss(x) + 1, torch.ones(())))


@pytest.mark.parametrize("name", ["values", "queries", "balance"])
def test_second_derivatives_are_refused(name) -> None:
    x = torch.randn(2, 3, 7, 20, requires_grad=True)
    (gradient,) = torch.autograd.grad(FORWARD_MODE[name](x), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"hf_binaryformer::.*second derivative"):
        gradient.square().sum().backward()


def test_second_derivative_of_the_saturation() -> None:
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda t: saturate_and_sign(t, 0.7)[0], x)
