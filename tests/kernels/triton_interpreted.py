"""The Triton kernels in Triton's interpreter, against float64 and the reference. ``test_triton.py`` runs this file.

Triton reads ``TRITON_INTERPRET`` when it is imported, so this needs a process of its own.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from cpu_cases import ALLOWED, HALVES, SHAPES, assert_near, distance, row_bounds, with_bounds
from hamming_cases import Case, make_case

from hf_binaryformer.kernels import backend_report, pack_sign_bits, self_check, triton_balance, triton_draws
from hf_binaryformer.kernels import triton as backend
from hf_binaryformer.kernels.balance import reference_balance, reference_balance_backward
from hf_binaryformer.kernels.draws import seed_hash, uniform

# The interpreter cuts numbers off where a GPU rounds them to bfloat16.
CUT = {torch.bfloat16: 2, torch.float16: 1}
SMALL = [shape for shape in SHAPES if shape[0] * shape[1] <= 5000]


def both_ways(case: Case) -> Case:
    """Rows with a bound in place of a maximum, tiles with a running one, and tiles that have rows of both kinds."""
    limit = 2 * backend.BOUND_LIMITS[case.value.dtype]
    case = with_bounds(case, 1, 0.9 * limit)
    return with_bounds(case, 1.1 * limit, 1.5 * limit, slice(0, min(128, case.query_bits.shape[2] // 2), 7))


def bounded(case: Case) -> Case:
    case = with_bounds(case, 1, 0.9 * 2 * backend.BOUND_LIMITS[case.value.dtype])
    assert row_bounds(case).max() < 2 * backend.BOUND_LIMITS[case.value.dtype]
    return case


def test_the_interpreter_is_what_runs() -> None:
    assert "interpreted" in backend_report()["triton"]


@pytest.mark.parametrize("weights", [bounded, both_ways])
@pytest.mark.parametrize(("queries", "keys", "head_dim", "value_dim", "planes"), SHAPES)
def test_accuracy(queries, keys, head_dim, value_dim, planes, weights) -> None:
    """float32: catches wrong tails of tiles, a lost factor, a maximum that is forgotten."""
    case = weights(make_case(queries, keys, head_dim, value_dim, batch=1, heads=2, planes=planes, dtype=torch.float32))
    assert_near(case, torch.float32, "triton", bit_gradient="none" if planes else "ste")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("gradient", ["none", "ste"])
@pytest.mark.parametrize(("queries", "keys", "head_dim", "value_dim", "planes"), SMALL)
def test_accuracy_of_halves(queries, keys, head_dim, value_dim, planes, gradient, dtype) -> None:
    """The exponent of a weight must not leave the range of float16."""
    case = both_ways(make_case(queries, keys, head_dim, value_dim, batch=2, heads=1, planes=planes, dtype=dtype))
    assert_near(case, dtype, "triton", slack=CUT[dtype], bit_gradient="none" if planes else gradient)


def test_draws_are_the_reference_ones_bit_by_bit() -> None:
    @triton.jit
    def draw(found, base, group, M: tl.constexpr, N: tl.constexpr):
        i, j = tl.arange(0, M), tl.arange(0, N)
        number = triton_draws.draws(
            triton_draws.row_hash(base, tl.full((), 0, tl.int64) + group, i)[:, None], j[None, :]
        )
        tl.store(found + i[:, None] * N + j[None, :], number)

    for seed in (0, 2**40 + 7, -5):
        found = torch.empty(64, 128)
        draw[(1,)](found, int(seed_hash(torch.tensor(seed))), 3, 64, 128)
        expected = uniform(torch.tensor(seed), slice(3, 4), slice(0, 64), 128, torch.device("cpu"))
        assert torch.equal((found + 0.5) / 2**22, expected[0])


@pytest.mark.parametrize(("queries", "keys", "head_dim"), [(130, 200, 64), (33, 257, 100), (70, 15, 31)])
def test_ternary_gradient_is_the_reference_one(queries, keys, head_dim) -> None:
    """The same draws and scales: apart in the few rows where rounding tips a draw."""
    case = with_bounds(make_case(queries, keys, head_dim, dtype=torch.float32, batch=1), 1, 20)
    case = case.with_(query=case.query.clamp(-1, 1), key=case.key.clamp(-1, 1))
    runs = [case.run(bit_gradient="ternary", seed=2**40 + 7, backend=name) for name in ("triton", "reference")]
    for name in ("query", "key"):
        apart = (runs[0][name] - runs[1][name]).norm(dim=-1) > 1e-3 * runs[1][name].norm(dim=-1).mean()
        assert apart.float().mean() < 0.02, f"{name}: other draws"


@pytest.mark.parametrize(("queries", "keys", "planes"), [(70, 150, None), (33, 20, None), (31, 65, 2)])
def test_key_mask(queries, keys, planes) -> None:
    """Samples of different numbers of keys, one of them without any; a whole tile, or part of one, takes no part."""
    case = bounded(make_case(queries, keys, 65, 5, batch=3, heads=2, planes=planes, dtype=torch.float32))
    mask = torch.rand(3, keys) < 0.3
    mask[2] = False
    for gradient in ("none",) if planes else ("ste", "ternary"):
        options = {"bit_gradient": gradient, "seed": 7, "key_mask": mask}
        found, expected = (case.run(backend=name, **options) for name in ("triton", "reference"))
        for name, tensor in expected.items():
            drawn = gradient == "ternary" and name in ("query", "key")
            assert distance(found[name], tensor) < (0.1 if drawn else 1e-4), (gradient, name)
            assert torch.equal(found[name][2], torch.zeros_like(found[name][2])), (gradient, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(dtype) -> None:
    """Values and gradients as parts of (B, N, 3 H d) arrays, and transposed: the same as from copies."""
    plain = with_bounds(make_case(37, 70, value_dim=5, dtype=dtype), 1, 5)
    whole = [torch.full((2, n, 3 * 3 * 5), torch.nan, dtype=dtype) for n in (70, 37)]
    parts = [
        array[..., 15:30].unflatten(-1, (3, 5)).transpose(1, 2).copy_(tensor)
        for array, tensor in zip(whole, (plain.value, plain.output_gradient), strict=True)
    ]
    turned = [tensor.mT.contiguous().mT for tensor in (plain.value, plain.output_gradient)]
    expected = plain.run(backend="triton")
    for value, gradient in (parts, turned):
        found = plain.with_(value=value, output_gradient=gradient).run(backend="triton")
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name


def test_scores_of_thousands() -> None:
    """A running maximum that is forgotten, or raised without the sums so far, overflows or loses rows here."""
    case = with_bounds(make_case(40, 300, batch=1, heads=2, dtype=torch.float32), 1000, 20_000)
    results = case.run(backend="triton")
    assert distance(results["output"], case.expected().output) < 1e-3
    assert all(result.isfinite().all() for result in results.values())


def test_all_keys_far_below_zero() -> None:
    """The tail of the last tile must not weigh more than keys whose scores are all negative."""
    case = make_case(20, 70, 64, batch=1, heads=1, dtype=torch.float32)
    case = with_bounds(case, 400, 500).with_(key_bits=~case.query_bits[:, :, :1].expand(1, 1, 70, 1).contiguous())
    case.query_weight.abs_(), case.key_weight.abs_()
    assert_near(case, torch.float32, "triton")


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("place", ["query_weight", "key_weight", "value", "output_gradient"])
def test_not_a_number_stays_where_it_belongs(place) -> None:
    case = with_bounds(make_case(37, 21, heads=2, dtype=torch.float32), 1, 20)
    case = case.with_(query=case.query.clamp(-1, 1), key=case.key.clamp(-1, 1))
    changed = getattr(case, place).clone()
    changed[(0, 1, 5, 3)[: changed.dim()]] = torch.nan
    case = case.with_(**{place: changed})
    found, expected = (case.run(bit_gradient="ternary", seed=2, backend=name) for name in ("triton", "reference"))
    for name, result in found.items():
        assert torch.equal(result.isnan(), expected[name].isnan()), name


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("head_dim", [1, 31, 64, 100, 200])
def test_packing(head_dim, dtype) -> None:
    x = torch.randn(2, 3, 45, head_dim).to(dtype)
    x[0, 0, 0], x[0, 0, 1, ::2] = -0.0, 0.0
    x[1, 2, 3, -1] = torch.nan
    found = backend.pack_sign_bits(x)
    assert found is not None
    assert torch.equal(found, pack_sign_bits(x.double()))  # The reference packs float64.
    assert torch.equal(backend.pack_sign_bits(x.transpose(1, 2)), pack_sign_bits(x.transpose(1, 2).double()))


@pytest.mark.parametrize("window", [torch.inf, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 7, 24), (1, 2, 300, 65), (2, 1, 129, 130)])
def test_balance_is_the_reference_one(shape, dtype, window) -> None:
    """Catches padding that enters a mean, lost blocks of tokens, bits of numbers before rounding, strides."""
    batch, heads, tokens, dim = shape
    wide = (torch.randn(batch, tokens, 2 * heads * dim) + torch.randn(2 * heads * dim)).to(dtype)
    x = wide[..., : heads * dim].unflatten(-1, (heads, dim)).transpose(1, 2)
    grad = torch.randn(shape).to(dtype)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for centering in (True, False):
        for norm in (True, False):
            found, expected = triton_balance.balance(x, centering, norm), reference_balance(x, centering, norm)
            torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(found[2], expected[2], rtol=tolerance, atol=tolerance)
            assert torch.equal(found[1], pack_sign_bits(found[0].double())), "bits are not the signs of y"
            y, _, factors = expected
            gradient = triton_balance.balance_backward(y, grad, factors, centering, norm, window)
            wanted = reference_balance_backward(grad, y, factors, centering, norm, window)
            largest = float(wanted.abs().max()) + 1e-3
            assert float((gradient.float() - wanted.float()).abs().max()) <= tolerance * largest


def test_what_is_left_to_the_reference() -> None:
    for changes in ({"dtype": torch.float64}, {"keys": 0}, {"queries": 0}, {"value_dim": 257}, {"head_dim": 513}):
        case = make_case(**{"dtype": torch.float32, **changes})
        assert backend.forward(*case.inputs(), case.head_dim, 1.0) is None


def test_the_smallest() -> None:
    case = with_bounds(make_case(1, 1, 1, 1, batch=1, heads=1, dtype=torch.float32), 1, 2)
    results = case.run(backend="triton", bit_gradient="ste")
    assert np.allclose(results["output"], case.expected().output, rtol=ALLOWED[torch.float32][0])
    assert not results["query_weight"].any() and not results["query"].any()  # One key: nothing to choose.


@pytest.fixture
def small_checks(monkeypatch) -> None:
    """The comparison with the reference at a size that the interpreter does in seconds."""
    for name, size in (("QUERIES", 40), ("KEYS", 70), ("BATCH", 1)):
        monkeypatch.setattr(self_check, name, size)


@pytest.mark.parametrize("fault", [None, "dw_k", "scale", "tail"])
def test_a_broken_kernel_is_not_used(fault, small_checks, monkeypatch) -> None:
    """The comparison that precedes the first use on a device that nobody has measured."""
    run_forward, run_backward = backend.run_forward, backend.run_backward

    def forward(*inputs):
        output, logsumexp = run_forward(*inputs)
        if fault == "scale":
            return run_forward(*inputs[:6], 1.1 * inputs[6], *inputs[7:])
        if fault == "tail":
            output[:, :, -1] = 0
        return output, logsumexp

    def backward(*inputs):
        found = run_backward(*inputs)
        return (found[0], -found[1], *found[2:]) if fault == "dw_k" else found

    monkeypatch.setattr(self_check, "ENABLED", True)
    monkeypatch.setattr(self_check, "CHECKED", {})
    monkeypatch.setattr(backend, "run_forward", forward)
    monkeypatch.setattr(backend, "run_backward", backward)
    case = with_bounds(make_case(20, 30, dtype=torch.float32), 1, 5)
    if fault is None:
        case.run(backend="triton", bit_gradient="ternary", seed=1)
        return
    with pytest.warns(RuntimeWarning, match="disagree with the reference"):
        found = case.run(backend="triton")
    for name, tensor in case.run(backend="reference").items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("fault", ["numbers", "gradient", "bits", "compiler"])
def test_broken_balancing_is_not_used(fault, monkeypatch) -> None:
    run, run_backward = triton_balance.run_balance, triton_balance.run_balance_backward

    def balance(x, centering, norm):
        if fault == "compiler":
            raise ArithmeticError("out of resources")
        y, bits, factors = run(x, centering, norm)
        return 1.01 * y if fault == "numbers" else y, ~bits if fault == "bits" else bits, factors

    def backward(*inputs):
        return -run_backward(*inputs) if fault == "gradient" else run_backward(*inputs)

    monkeypatch.setattr(self_check, "ENABLED", True)
    monkeypatch.setattr(self_check, "CHECKED", {})
    monkeypatch.setattr(triton_balance, "run_balance", balance)
    monkeypatch.setattr(triton_balance, "run_balance_backward", backward)
    x = torch.randn(1, 2, 30, 24)
    with pytest.warns(RuntimeWarning, match="disagree with the reference"):
        assert triton_balance.balance(x, True, True) is None
    assert triton_balance.balance(x, True, True) is None, "the second call need not compare again"


def test_the_benchmark_runs_what_it_names(small_checks, monkeypatch, tmp_path) -> None:
    """All subjects of ``gpu.py`` that need no GPU of their own, at toy size."""
    sys.path.append(str(Path(__file__).parents[2] / "scripts" / "benchmarks"))
    import gpu

    subjects = [one for one in gpu.attention(40, 64, 16, "cpu") if "sdpa" not in one.name]
    assert len(subjects) == 7
    for subject in subjects:
        result = subject.prepare()()
        assert isinstance(result, tuple) == subject.step
    monkeypatch.setattr(gpu, "ROWS", 20)
    assert gpu.verify(40, 64, 16, "cpu") is None
    checked = gpu.check(gpu.kinds("cpu", ((24, 8),)), 1)
    assert [row["differs"] for row in checked] == [None] * 17
    record = gpu.Record(tmp_path, "command", checked, {"passed": True}, float("inf"))
    monkeypatch.setattr(gpu, "peak_bytes", lambda subject: None)
    record.add("toy", subjects, 1, 0.0)
    assert record.left_out == []
    assert len(json.loads((tmp_path / "gpu.json").read_text())["rows"]) == 7
    assert not (tmp_path / "gpu.png").exists(), "there is no ratio to draw"
    record.results[0].ratio_to_sdpa = 2.0
    record.write()
    assert (tmp_path / "gpu.png").is_file()
    assert (tmp_path / "gpu.md").read_text().splitlines()[2].startswith("| hamming | 40 | 64 | 16 | forward | ")
    record.until = 0
    record.add("late", subjects, 1, 0.0)
    assert record.left_out == ["late: no time left"]


def test_the_benchmark_does_not_time_what_is_wrong(monkeypatch, tmp_path) -> None:
    sys.path.append(str(Path(__file__).parents[2] / "scripts" / "benchmarks"))
    import gpu

    right = backend.run_backward

    def wrong(*inputs):
        found = right(*inputs)
        return *found[:2], -found[2], *found[3:]

    monkeypatch.setattr(backend, "run_backward", wrong)
    subjects = [one for one in gpu.attention(40, 64, 16, "cpu") if "sdpa" not in one.name]
    record = gpu.Record(tmp_path, "command", [], {}, float("inf"))
    record.add("toy", subjects, 1, 0.0)
    assert record.results == [] and len(record.left_out) == 7
    assert "value with the gradient 'none' is off by 2 of its size" in record.left_out[0]
