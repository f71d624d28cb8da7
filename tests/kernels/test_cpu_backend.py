"""The compiled backend on every instruction set of this processor, each held against float64 and the reference.

The tests of all backends use the best instruction set only, and most of them float64, which the reference computes here.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from cpu_cases import (
    ALLOWED,
    HALVES,
    LARGEST_BOUND,
    LIBRARY,
    RUNNABLE,
    SHAPES,
    assert_near,
    distance,
    each_instruction_set,
    row_bounds,
    threads,
    with_bounds,
)
from hamming_cases import Case, Results, make_case
from hamming_oracle import to_numpy

from hf_binaryformer.kernels import cpu, cpu_library
from hf_binaryformer.kernels.backends import get_backend

if LIBRARY is None:
    pytest.skip(f"no compiled library: {cpu_library.MISSING_REASON}", allow_module_level=True)

instruction_set = pytest.fixture(params=RUNNABLE)(each_instruction_set)
pytestmark = pytest.mark.usefixtures("instruction_set")

DTYPES = [torch.float32, *HALVES]


def bounded(case: Case) -> Case:
    case = with_bounds(case, 1, LARGEST_BOUND - 1)
    assert row_bounds(case).max() < LARGEST_BOUND
    return case


def running_maximum(case: Case) -> Case:
    case = with_bounds(case, LARGEST_BOUND + 1, LARGEST_BOUND + 5)
    assert row_bounds(case).min() > LARGEST_BOUND
    return case


def both_in_a_tile(case: Case) -> Case:
    return with_bounds(bounded(case), LARGEST_BOUND + 1, LARGEST_BOUND + 5, slice(0, None, 7))


def assert_same(results: Results, expected: Results) -> None:
    for name, result in expected.items():
        assert torch.equal(results[name], result), name


@pytest.mark.parametrize("weights", [bounded, running_maximum, both_in_a_tile])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys", "head_dim", "value_dim", "planes"), SHAPES)
def test_accuracy(queries, keys, head_dim, value_dim, planes, dtype, weights) -> None:
    """Scores up to 17, weights of both signs; catches wrong tails of tiles and blocks, and digits lost on either way."""
    case = weights(make_case(queries, keys, head_dim, value_dim, batch=1, heads=2, planes=planes, dtype=dtype))
    assert_near(case, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("planes", [None, 2])
def test_a_single_channel(planes, dtype) -> None:
    """All scores are plus or minus one number: 63 padding bits that were counted would show in every one."""
    case = with_bounds(make_case(33, 20, 1, 16, batch=1, planes=planes, dtype=dtype), 1, 10)
    assert_near(case, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_thousands(dtype) -> None:
    """A running maximum that is forgotten, or raised without the sums so far, overflows or loses rows here."""
    case = with_bounds(make_case(40, 300, batch=1, heads=2, dtype=dtype), 1000, 20_000)
    results, expected = case.run(backend="cpu"), case.expected()
    assert expected.logsumexp.max() > 1000
    assert distance(results["output"], expected.output) < max(ALLOWED[dtype][0], 1e-3)
    assert all(result.isfinite().all() for result in results.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_zero(dtype) -> None:
    """A query or key without weight: its scores are 0, neither a missing bound nor a division by it."""
    case = bounded(make_case(40, 50, batch=1, heads=2, dtype=dtype))
    case.query_weight[:, :, ::3] = 0
    case.key_weight[:, 0, ::4] = -0.0
    case.key_weight[:, 1] = 0
    results = assert_near(case, dtype, "cpu")
    assert results["query_weight"][:, 0].all() and not results["query_weight"][:, 1].any()


@pytest.mark.parametrize("bit_gradient", ["none", "ternary"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_whoever_computes(dtype, bit_gradient) -> None:
    """Again, on two and three threads, PyTorch's and the library's own: catches sums in the order of the threads' arrival."""
    case = make_case(530, 700, batch=1, heads=3, dtype=dtype)
    options = {"bit_gradient": bit_gradient, "seed": 5, "backend": "cpu"}
    with threads(1):
        alone = case.run(**options)
        assert_same(case.run(**options), alone)
    for number in (2, 3):
        with threads(number):
            assert_same(case.run(**options), alone)
            LIBRARY._library.hf_set_team(None)
            try:
                assert_same(case.run(**options), alone)
            finally:
                LIBRARY._library.hf_set_team(LIBRARY._team)


def test_python_threads_at_once() -> None:
    """Calls of other shapes and types at the same time: catches scratch memory or a packed head taken for another call's."""
    shapes = [(70, 300, 64, 16), (130, 60, 100, 5), (513, 40, 31, 33), (20, 600, 65, 16)]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float16]
    cases = [make_case(*shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]

    def run(case: Case) -> Results:
        return case.run(bit_gradient="ternary", seed=1, backend="cpu")

    alone = [run(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for results, expected in zip(pool.map(run, cases * 5), alone * 5, strict=True):
            assert_same(results, expected)


NANS = {  # quiet, signalling, and every bit set: arithmetic on the bits of a NaN may make a number of it
    torch.float32: (torch.int32, [0x7FC00000, 0x7F800001, -1]),
    torch.bfloat16: (torch.int16, [0x7FC0, 0x7F81, -1]),
    torch.float16: (torch.int16, [0x7E00, 0x7C01, -1]),
}
PLACES = {
    "query_weight": (0, 1, 5),
    "key_weight": (0, 1, 8),
    "value": (0, 1, 8, 3),
    "output_gradient": (0, 1, 5, 3),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bit_gradient", ["none", "ternary"])
def test_not_a_number_stays_where_it_belongs(bit_gradient, dtype, place) -> None:
    """One NaN makes NaN of what depends on it and of nothing else, as in the reference; the rest stays right."""
    clean = bounded(make_case(37, 21, heads=2, dtype=dtype))
    clean = clean.with_(query=clean.query.clamp(-1, 1), key=clean.key.clamp(-1, 1))
    tensor = getattr(clean, place)
    integers, patterns = NANS[tensor.dtype]
    for pattern in patterns:
        changed = tensor.clone()
        changed.view(integers)[PLACES[place]] = pattern
        case = clean.with_(**{place: changed})
        results, expected = (
            case.run(bit_gradient=bit_gradient, seed=2, backend=backend)
            | {"logsumexp": get_backend(backend).forward(*case.inputs(), case.head_dim, 0.125)[1]}
            for backend in ("cpu", "reference")
        )
        for name, result in results.items():
            assert torch.equal(result.isnan(), expected[name].isnan()), f"{name} with {pattern:#x} in {place}"
            if name not in ("query", "key") and not result.isnan().all():
                error = distance(result.nan_to_num(), expected[name].nan_to_num())
                assert error <= 10 * ALLOWED[dtype][0], name
        nan = results["output"].isnan()
        rows, channels = nan[0, 1].any(1).nonzero().flatten().tolist(), nan[0, 1].any(0).nonzero().flatten().tolist()
        assert rows == {"query_weight": [5], "output_gradient": []}.get(place, list(range(37)))
        assert channels == {"value": [3], "output_gradient": []}.get(place, list(range(16)))
        assert not nan[0, 0].any() and not nan[1].any(), "another head"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value_dim", [5, 16])
def test_projections_are_read_where_they_lie(value_dim, dtype, monkeypatch) -> None:
    """Values and gradients as parts of (B, N, 3 H d) arrays: same bits as from copies, and no copy made."""
    plain = make_case(37, 70, value_dim=value_dim, dtype=dtype)
    calls = []
    for name in ("forward", "backward"):
        run = getattr(LIBRARY, name)
        monkeypatch.setattr(LIBRARY, name, lambda call, run=run: (calls.append(call), run(call)))

    def part_of_projection(tensor: torch.Tensor) -> torch.Tensor:
        batch, heads, tokens, channels = tensor.shape
        whole = torch.full((batch, tokens, 3 * heads * channels), torch.nan, dtype=dtype)
        part = whole[..., heads * channels : 2 * heads * channels].unflatten(-1, (heads, channels)).transpose(1, 2)
        return part.copy_(tensor)

    value, output_gradient = part_of_projection(plain.value), part_of_projection(plain.output_gradient)
    results = plain.with_(value=value, output_gradient=output_gradient).run(backend="cpu")
    assert [call.value.data for call in calls] == [value.data_ptr()] * 2
    assert calls[1].grad_output.data == output_gradient.data_ptr()
    assert_same(results, plain.run(backend="cpu"))


def test_channels_apart_are_copied() -> None:
    """Values transposed so that the channels of a token are not neighbours; a single channel may have any stride."""
    for value_dim in (1, 16):
        plain = make_case(37, 70, value_dim=value_dim, dtype=torch.float32)
        value, output_gradient = (t.mT.contiguous().mT for t in (plain.value, plain.output_gradient))
        results = plain.with_(value=value, output_gradient=output_gradient).run(backend="cpu")
        for name, expected in plain.run(backend="cpu").items():
            assert torch.allclose(results[name], expected, rtol=1e-4, atol=1e-5), name


def test_float64_is_left_to_the_reference(monkeypatch) -> None:
    """Not computed in float32 behind the caller's back."""
    monkeypatch.setattr(cpu, "_library", None)
    case = make_case()
    for bit_gradient in ("none", "ste", "ternary"):
        options = {"bit_gradient": bit_gradient, "seed": 3}
        assert_same(case.run(backend="cpu", **options), case.run(backend="reference", **options))


def in_units(case: Case, difference: Results) -> dict[str, np.ndarray]:
    """Differences of the ternary gradient over scale abs(w) s, the most that one draw contributes to a channel."""
    d_scores, scale = np.abs(case.expected().score_gradient), case.head_dim**-0.5
    query, key = np.abs(to_numpy(case.query_weight)), np.abs(to_numpy(case.key_weight))
    units = {
        "query": scale * query * (d_scores * key[:, :, None]).max(3),
        "key": scale * key * (d_scores * query[..., None]).max(2),
    }
    return {name: to_numpy(difference[name]) / unit[..., None] for name, unit in units.items()}


@pytest.mark.parametrize(("queries", "keys", "head_dim"), [(130, 600, 64), (33, 257, 100), (70, 15, 31), (5, 64, 32)])
def test_draws_are_the_reference_ones(queries, keys, head_dim) -> None:
    """In float32, over several chunks of keys: apart in few rows, where rounding tips a draw."""
    # Small scores: where attention is peaked, what remains of a gradient is rounding.
    case = with_bounds(make_case(queries, keys, head_dim, dtype=torch.float32), 1, 20)
    case = case.with_(query=case.query.clamp(-1, 1), key=case.key.clamp(-1, 1))
    ours, theirs = (
        case.run(bit_gradient="ternary", seed=2**40 + 7, backend=backend) for backend in ("cpu", "reference")
    )
    for name, apart in in_units(case, {name: ours[name] - theirs[name] for name in ("query", "key")}).items():
        assert (np.abs(apart) > 1e-3).any(-1).mean() < 0.02, f"{name}: other draws"
    assert_same(ours, case.run(backend="cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ternary_mean_is_the_exact_gradient(dtype) -> None:
    """Over seeds, in every type: catches a maximum of part of the row, a draw that is not uniform, a scale left out."""
    case = with_bounds(make_case(12, 70, 16, 4, batch=1, heads=2, dtype=dtype), 1, 20)
    case = case.with_(query=case.query.clamp(-1, 1), key=case.key.clamp(-1, 1))
    exact = case.expected()
    runs = [case.run(bit_gradient="ternary", seed=seed, backend="cpu") for seed in range(200)]
    for name in ("query", "key"):
        samples, wanted = np.stack([to_numpy(run[name]) for run in runs]), getattr(exact, name)
        standard_error = samples.std(0, ddof=1) / len(runs) ** 0.5
        rounding = 2 * ALLOWED[dtype][1] * np.abs(wanted).max()
        assert (np.abs(samples.mean(0) - wanted) <= 5 * standard_error + rounding).all(), name
        assert standard_error.mean() < 0.5 * np.abs(wanted).mean(), f"{name}: too wide to tell"
