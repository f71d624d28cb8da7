"""What the operator checks each time that it runs: devices, padding bits, seeds; and which backend it takes then."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hamming_cases import Case, make_case, on_every_target
from torch import Tensor

from hf_binaryformer.kernels import (
    BackendUnavailableError,
    available_backends,
    backends,
    hamming_attention,
    pack_sign_bits,
    sign_attention,
)
from hf_binaryformer.kernels.balance import balance
from hf_binaryformer.kernels.saturation import saturate_and_sign

TENSORS = ["query_bits", "key_bits", "query_weight", "key_weight", "value", "query", "key", "seed"]


def arguments(**changes: Any) -> dict[str, Any]:
    case = make_case(9, 16, 40, 4, dtype=torch.float32)
    names = ("query_bits", "key_bits", "query_weight", "key_weight", "value", "query", "key", "head_dim")
    given = {name: getattr(case, name) for name in names} | {"bit_gradient": "ternary", "seed": torch.tensor(3)}
    return given | changes


def through_the_function(given: dict[str, Any]) -> Tensor:
    return hamming_attention(**given)


def through_the_operator(given: dict[str, Any]) -> Tensor:
    options = [given.pop(name) for name in ("head_dim", "bit_gradient")]
    tensors = [given[name] for name in TENSORS]
    return torch.ops.hf_binaryformer.hamming_attention(*tensors, options[0], 0.3, options[1], None)[0]


@pytest.mark.parametrize("call", [through_the_function, through_the_operator])
@pytest.mark.parametrize("name", TENSORS)
def test_one_tensor_on_another_device(name, call) -> None:
    """ "meta" stands for a GPU, whose addresses the compiled library must never see."""
    given = arguments()
    given[name] = given[name].to("meta")
    with pytest.raises(ValueError) as error:
        call(given)
    for word in ("meta", "cpu", name if name != "value" else "query_bits", "move"):
        assert word in str(error.value), error.value


@pytest.mark.parametrize("index", range(10))
def test_one_tensor_of_the_backward_pass_on_another_device(index) -> None:
    given = arguments()
    inputs = [given[name] for name in TENSORS[:5]]
    output = torch.zeros(2, 3, 9, 4)
    tensors = [output, *inputs, output, output[..., 0], output[..., 0], given["seed"]]
    assert len(tensors) == 10
    tensors[index] = tensors[index].to("meta")
    with pytest.raises(ValueError, match=r"is on (meta|cpu), grad_output on (meta|cpu), expected one device"):
        torch.ops.hf_binaryformer.hamming_attention_backward(*tensors, 40, 0.3, "none", True, None)


@pytest.mark.parametrize("index", range(3))
def test_one_tensor_of_the_balancing_on_another_device(index) -> None:
    tensors = [torch.zeros(2, 3, 9, 4), torch.zeros(2, 3, 9, 4), torch.zeros(2, 3, 9)]
    tensors[index] = tensors[index].to("meta")
    with pytest.raises(ValueError, match="grad on (meta|cpu), expected one device"):
        torch.ops.hf_binaryformer.balance_backward(*tensors, True, True, 1.0)


def test_a_seed_may_stay_on_the_cpu() -> None:
    given = {name: t.to("meta") if isinstance(t, Tensor) and name != "seed" else t for name, t in arguments().items()}
    assert hamming_attention(**given).device.type == "meta"


def test_meta_tensors_give_meta_tensors() -> None:
    query, key, value = torch.randn(3, 2, 3, 7, 20, device="meta").requires_grad_()
    output = sign_attention(query, key, value)
    assert output.device.type == "meta" and output.shape == (2, 3, 7, 20)
    results = [*balance(query), *saturate_and_sign(query.flatten(0, 2), 0.5), pack_sign_bits(query)]
    assert {t.device.type for t in results} == {"meta"}
    assert torch.autograd.grad(output.sum(), value)[0].device.type == "meta"


def with_padding_set(bits: Tensor, head_dim: int) -> Tensor:
    """All bits beyond `head_dim` set to 1."""
    words = bits.clone().numpy().view(np.uint64)
    words[..., -1] |= ~np.uint64(2 ** (head_dim % 64) - 1)
    return torch.from_numpy(words.view(np.int64))


@on_every_target
@pytest.mark.parametrize("head_dim", [1, 20, 32, 40, 63, 70, 127])
@pytest.mark.parametrize("planes", [None, 2])
def test_bits_beyond_the_channels_are_never_counted(planes, head_dim, backend, device) -> None:
    """Output and every gradient, whatever a caller leaves in the padding of either side."""
    if device != "cpu":
        pytest.skip("numpy sets the bits")
    case = make_case(9, 70, head_dim, 4, planes=planes, dtype=torch.float32)
    options: dict[str, Any] = {"backend": backend}
    if planes is None:
        options |= {"bit_gradient": "ternary", "seed": 3}
    expected = case.run(**options)
    for names in (("query_bits",), ("key_bits",), ("query_bits", "key_bits")):
        dirty = case.with_(**{name: with_padding_set(getattr(case, name), head_dim) for name in names})
        assert not torch.equal(dirty.query_bits, case.query_bits) or "query_bits" not in names
        for name, result in dirty.run(**options).items():
            assert torch.equal(result, expected[name]), (names, name)


@pytest.mark.parametrize(
    ("seed", "error", "words"),
    [
        (1.5, TypeError, ["seed", "float", "int"]),
        ("1", TypeError, ["seed", "str", "int"]),
        (torch.tensor(1.5), TypeError, ["seed", "float32", "int64"]),
        (torch.tensor(1, dtype=torch.int32), TypeError, ["seed", "int32", "int64"]),
        (torch.tensor([1, 2]), ValueError, ["seed", "(2,)", "one number"]),
        (2**63, ValueError, ["seed", str(2**63), "64 bits"]),
        (-(2**63) - 1, ValueError, ["seed", "64 bits"]),
    ],
)
@pytest.mark.parametrize("bit_gradient", ["none", "ternary"])
def test_a_seed_of_another_kind(bit_gradient, seed, error, words) -> None:
    query, key, value = torch.randn(3, 1, 2, 5, 8)
    with pytest.raises(error) as found:
        sign_attention(query, key, value, bit_gradient=bit_gradient, seed=seed)
    missing = [word for word in words if word not in str(found.value)]
    assert not missing, f"{missing} not in: {found.value}"


@pytest.mark.parametrize("seed", [7, np.int64(7), torch.tensor(7)])
def test_seeds_of_every_allowed_kind_draw_the_same(seed) -> None:
    case = make_case(dtype=torch.float32)
    expected = case.run(bit_gradient="ternary", seed=7)
    for name, result in case.run(bit_gradient="ternary", seed=seed).items():
        assert torch.equal(result, expected[name])


class Attend(torch.nn.Module):
    def __init__(self, backend: str | None) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sign_attention(query, key, value, backend=self.backend)


def exported(backend: str | None, strict: bool) -> torch.nn.Module:
    inputs = tuple(torch.randn(3, 2, 3, 7, 20))
    return torch.export.export(Attend(backend), inputs, strict=strict).module()


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A backend registered after the export, with the highest priority, and the calls that it gets."""
    calls: list[str] = []
    reference = backends.get_backend("reference")

    def forward(*inputs: Any) -> Any:
        calls.append("forward")
        return reference.forward(*inputs)

    late = dataclasses.replace(reference, name="late", forward=forward, priority=99)
    monkeypatch.setitem(backends._registered, "late", late)
    return calls


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_graph_chooses_its_backend_when_it_runs(strict, request) -> None:
    program = exported(None, strict)
    calls = request.getfixturevalue("counting")
    query, key, value = torch.randn(3, 2, 3, 7, 20)
    output = program(query, key, value)
    assert calls == ["forward"]
    torch.testing.assert_close(output, sign_attention(query, key, value, backend="reference"))


def test_an_exported_graph_keeps_the_backend_that_was_asked_for(request) -> None:
    program = exported("reference", False)
    calls = request.getfixturevalue("counting")
    program(*torch.randn(3, 2, 3, 7, 20))
    assert not calls


def test_an_exported_graph_checks_the_device_of_its_backend_again(monkeypatch) -> None:
    program = exported("reference", False)
    elsewhere = dataclasses.replace(backends.get_backend("reference"), device_types=("cuda",))
    monkeypatch.setitem(backends._registered, "reference", elsewhere)
    with pytest.raises(BackendUnavailableError, match="serves cuda, the tensors are on 'cpu'"):
        program(*torch.randn(3, 2, 3, 7, 20))


def test_the_backward_pass_checks_the_device_of_its_backend_too(monkeypatch) -> None:
    case: Case = make_case(dtype=torch.float32)
    value = case.value.requires_grad_()
    inputs = (*case.inputs()[:4], value)
    output = hamming_attention(*inputs, head_dim=64, backend=available_backends()[0])
    moved = dataclasses.replace(backends.get_backend(available_backends()[0]), device_types=("cuda",))
    monkeypatch.setitem(backends._registered, moved.name, moved)
    with pytest.raises(BackendUnavailableError, match="serves cuda"):
        output.sum().backward()
