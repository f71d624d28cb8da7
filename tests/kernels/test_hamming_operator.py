"""The registered operator: schema, fake, autograd, compilation and memory."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hamming_cases import Case, make_case, on_every_target
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_binaryformer.kernels import hamming_attention, pack_sign_bits

MODES = ["none", "ste", "ternary"]
# `opcheck` itself reads `.grad` of the non-leaf copies that it makes.
from_opcheck = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


def operator_arguments(case: Case, bit_gradient: str, backend: str) -> tuple[Any, ...]:
    real = (None, None) if bit_gradient == "none" else (case.query, case.key)
    learned = [t.detach().requires_grad_() for t in (case.query_weight, case.key_weight, case.value)]
    real = tuple(t if t is None else t.detach().requires_grad_() for t in real)
    seed = torch.tensor(3, device=case.value.device)
    return (case.query_bits, case.key_bits, *learned, *real, seed, case.head_dim, 0.3, bit_gradient, backend)


@from_opcheck
@on_every_target
@pytest.mark.parametrize("bit_gradient", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(bit_gradient, dtype, backend, device) -> None:
    case = make_case(5, 7, 65, 3, dtype=dtype, device=device)
    torch.library.opcheck(
        torch.ops.hf_binaryformer.hamming_attention.default, operator_arguments(case, bit_gradient, backend)
    )


@from_opcheck
@on_every_target
def test_opcheck_two_planes(backend, device) -> None:
    case = make_case(5, 7, 65, 3, planes=2, dtype=torch.float32, device=device)
    torch.library.opcheck(
        torch.ops.hf_binaryformer.hamming_attention.default, operator_arguments(case, "none", backend)
    )


@on_every_target
@pytest.mark.parametrize("planes", [None, 2])
def test_gradcheck_of_weights_and_values(planes, backend, device) -> None:
    """Finite differences, which know nothing of the formulas; both outputs. The bit gradients are no derivatives."""
    case = make_case(4, 5, 65, 3, batch=1, heads=2, planes=planes, device=device)

    def attend(*learned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seed = torch.tensor(0, device=device)
        return torch.ops.hf_binaryformer.hamming_attention(
            case.query_bits, case.key_bits, *learned, None, None, seed, 65, 0.3, "none", backend
        )

    inputs = [t.detach().requires_grad_() for t in (case.query_weight, case.key_weight, case.value)]
    assert torch.autograd.gradcheck(attend, inputs)


@on_every_target
@pytest.mark.parametrize("with_output", [False, True])
@pytest.mark.parametrize("planes", [None, 2])
def test_gradient_of_the_log_sum_exp(planes, with_output, backend, device) -> None:
    case = make_case(37, 70, 65, 5, planes=planes, device=device)
    grad_logsumexp = torch.randn(case.query_bits.shape[:3], dtype=torch.float64, device=device)

    def gradients_in(dtype: torch.dtype, backend: str) -> tuple[torch.Tensor, ...]:
        learned = [t.detach().to(dtype).requires_grad_() for t in (case.query_weight, case.key_weight, case.value)]
        seed = torch.tensor(0, device=device)
        output, logsumexp = torch.ops.hf_binaryformer.hamming_attention(
            case.query_bits, case.key_bits, *learned, None, None, seed, 65, 0.3, "none", backend
        )
        loss = (logsumexp * grad_logsumexp).sum()
        if with_output:
            loss = loss + (output * case.output_gradient).sum()
        return torch.autograd.grad(loss, learned)

    exact = gradients_in(torch.float64, "reference")
    for actual, expected in zip(gradients_in(torch.float32, backend), exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@on_every_target
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fake_agrees_with_the_run(dtype, backend, device) -> None:
    case = make_case(5, 7, 65, 3, dtype=dtype, device=device)
    arguments = operator_arguments(case, "none", backend)
    real = torch.ops.hf_binaryformer.hamming_attention(*arguments)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake_arguments = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        fake = torch.ops.hf_binaryformer.hamming_attention(*fake_arguments)
    for actual, expected in zip(fake, real, strict=True):
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        assert actual.stride() == expected.stride()
    assert real[0].shape == (2, 3, 5, 3)
    assert real[1].shape == (2, 3, 5)
    assert real[1].dtype in (torch.float32, torch.float64)


def step(backend: str, bit_gradient: str) -> Callable[..., torch.Tensor]:
    """Pack, attend and reduce, as a model does; the gradient reaches all five real inputs."""

    def forward(query, key, query_weight, key_weight, value, seed):  # type: ignore[no-untyped-def]
        output = hamming_attention(
            pack_sign_bits(query), pack_sign_bits(key), query_weight, key_weight, value,
            head_dim=query.shape[-1], query=query, key=key, bit_gradient=bit_gradient, seed=seed, backend=backend,
        )  # fmt: skip
        return output.square().sum()

    return forward


def gradients(function: Callable[..., torch.Tensor], case: Case) -> list[torch.Tensor]:
    inputs = [
        t.detach().requires_grad_() for t in (case.query, case.key, case.query_weight, case.key_weight, case.value)
    ]
    loss = function(*inputs, torch.tensor(4, device=case.value.device))
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [loss.detach(), *(torch.zeros(()) if g is None else g for g in found)]


@on_every_target
@pytest.mark.parametrize("bit_gradient", MODES)
def test_compiles_without_a_graph_break(bit_gradient, backend, device) -> None:
    torch._dynamo.reset()
    eager = step(backend, bit_gradient)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager", dynamic=True)
    for queries, keys in ((12, 9), (31, 17)):
        case = make_case(queries, keys, dtype=torch.float32, device=device)
        for actual, expected in zip(gradients(compiled, case), gradients(eager, case), strict=True):
            torch.testing.assert_close(actual, expected)


@on_every_target
def test_compiles_when_the_seed_is_drawn_inside(backend, device) -> None:
    torch._dynamo.reset()
    case = make_case(dtype=torch.float32, device=device)
    eager = step(backend, "ternary")
    compiled = torch.compile(lambda *inputs: eager(*inputs[:-1], None), fullgraph=True, backend="aot_eager")
    first, second = gradients(compiled, case), gradients(compiled, case)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1]), "a compiled step must not freeze its random numbers"


@on_every_target
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="Inductor needs a compiler")
def test_compiles_with_inductor(backend, device, monkeypatch, tmp_path) -> None:
    # What an earlier version of the operator left in the cache knows that version's strides.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    eager = step(backend, "ternary")
    case = make_case(12, 9, dtype=torch.float32, device=device)
    compiled = torch.compile(eager, fullgraph=True)
    for actual, expected in zip(gradients(compiled, case), gradients(eager, case), strict=True):
        torch.testing.assert_close(actual, expected)


def peak_bytes(function: Callable[[], object], trace: Path) -> int:
    """Largest amount of memory that PyTorch's CPU allocator held for `function`, beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    profile.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    held, peak = 0, 0
    for event in sorted(events, key=lambda event: event["args"]["Ev Idx"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("bit_gradient", MODES)
def test_memory_is_linear_in_the_number_of_tokens(bit_gradient, tmp_path) -> None:
    def measure(tokens: int) -> int:
        case = make_case(tokens, tokens, 16, 4, batch=1, heads=1, dtype=torch.float32)
        return peak_bytes(lambda: case.run(bit_gradient=bit_gradient, backend="reference"), tmp_path / "trace.json")

    short, long = measure(2048), measure(4096)
    assert long < 4 * 4096 * 4096 / 2, "less than half of one float32 matrix of all pairs"
    assert long < 2.2 * short, "twice the tokens, twice the memory"


def test_memory_does_not_grow_with_heads_and_batch_times_pairs(tmp_path) -> None:
    def measure(batch: int) -> int:
        case = make_case(256, 256, 16, 4, batch=batch, heads=4, dtype=torch.float32)
        return peak_bytes(lambda: case.run(bit_gradient="ternary", backend="reference"), tmp_path / "trace.json")

    assert measure(64) < 4 * 64 * 4 * 256 * 256 / 2


def test_nothing_of_all_pairs_is_saved_for_backward() -> None:
    case = make_case(300, 200, 16, 4, batch=1, heads=1, dtype=torch.float32)
    saved: list[int] = []

    def record(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        case.run(bit_gradient="ternary", backend="reference")
    assert saved
    assert max(saved) <= 300 * 16
