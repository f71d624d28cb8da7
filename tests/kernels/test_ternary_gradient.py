"""The stochastic ternary gradient of the sign bits.

g_ij = dS_ij w_k,j becomes t_ij in {-s_i, 0, s_i} with P(t_ij != 0) = abs(g_ij) / s_i, s_i the largest of row i within a block of
64 keys; for the keys by columns, with w_q and blocks of 64 queries. Everything else is the straight-through gradient.
"""

import numpy as np
import pytest
import torch
from hamming_cases import Case, make_case, on_every_target
from hamming_oracle import assert_close, signs_by_hand, to_numpy

from hf_binaryformer.kernels import hamming_attention, reference

SEEDS = 600


def full_rank_case(device: str = "cpu", **options) -> Case:  # type: ignore[no-untyped-def]
    """More channels than tokens and abs(q), abs(k) <= 1, so that the gradient determines every t_ij."""
    case = make_case(6, 5, head_dim=65, value_dim=4, batch=2, heads=2, device=device, **options)
    return case.with_(query=case.query.clamp(-1, 1), key=case.key.clamp(-1, 1))


def pair_gradients(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """g_ij = dS_ij w_k,j for the queries, and (transposed, keys first) dS_ij w_q,i for the keys."""
    d_scores = case.expected().score_gradient
    through_query = d_scores * to_numpy(case.key_weight)[:, :, None, :]
    through_key = (d_scores * to_numpy(case.query_weight)[:, :, :, None]).swapaxes(-1, -2)
    return through_query, through_key


def recovered_draws(case: Case, gradient: torch.Tensor, side: str) -> np.ndarray:
    """t / s of every pair: solve dq_i = w_q,i scale sum_j t_ij sgn(k_j) for t_i, or the same for the keys."""
    through_query, through_key = pair_gradients(case)
    pairs, weight, bits = {
        "query": (through_query, case.query_weight, case.key_bits),
        "key": (through_key, case.key_weight, case.query_bits),
    }[side]
    signs = signs_by_hand(bits, case.head_dim)
    per_weight = to_numpy(gradient) / (case.head_dim**-0.5 * to_numpy(weight)[..., None])
    draws = per_weight @ np.linalg.pinv(signs)
    assert np.abs(draws @ signs - per_weight).max() < 1e-9, "not a combination of the other side's signs"
    return draws / np.abs(pairs).max(-1, keepdims=True)


@on_every_target
@pytest.mark.parametrize("side", ["query", "key"])
def test_every_pair_is_minus_scale_zero_or_scale(side, backend, device) -> None:
    case = full_rank_case(device)
    pairs = pair_gradients(case)[side == "key"]
    draws = recovered_draws(case, case.run(bit_gradient="ternary", seed=3, backend=backend)[side], side)
    rounded = np.round(draws)
    assert np.abs(draws - rounded).max() < 1e-8
    assert set(np.unique(rounded)) == {-1.0, 0.0, 1.0}
    assert (rounded * pairs >= 0).all(), "t has the sign of g or is zero"
    largest = np.abs(pairs).argmax(-1)[..., None]
    assert (np.take_along_axis(np.abs(rounded), largest, -1) == 1).all(), "P(t != 0) = 1 for the row's maximum"


@on_every_target
@pytest.mark.parametrize("side", ["query", "key"])
def test_frequency_of_every_pair_is_its_share_of_the_maximum(side, backend, device) -> None:
    case = full_rank_case(device)
    pairs = pair_gradients(case)[side == "key"]
    share = np.abs(pairs) / np.abs(pairs).max(-1, keepdims=True)
    draws = np.stack([
        np.abs(np.round(recovered_draws(case, case.run(bit_gradient="ternary", seed=s, backend=backend)[side], side)))
        for s in range(SEEDS)
    ])  # fmt: skip
    standard_error = np.sqrt(share * (1 - share) / SEEDS)
    assert (np.abs(draws.mean(0) - share) <= 5 * standard_error + 1e-6).all()
    # Draws of different pairs, rows, heads and batch entries are independent of each other ...
    uncertain = (share > 0.05) & (share < 0.95)
    standardised = ((draws - share) / np.sqrt(share * (1 - share) + 1e-30))[:, uncertain]
    correlation = standardised.T @ standardised / SEEDS
    off_diagonal = correlation[~np.eye(len(correlation), dtype=bool)]
    assert np.abs(off_diagonal).max() < 6.5 / np.sqrt(SEEDS)
    assert abs(off_diagonal.std() * np.sqrt(SEEDS) - 1) < 0.1
    # ... and so are those of consecutive seeds.
    lagged = (standardised[1:] * standardised[:-1]).mean(0)
    assert np.abs(lagged).max() < 5 / np.sqrt(SEEDS)


@on_every_target
def test_draws_are_those_of_the_reference(backend, device) -> None:
    """One hash for every backend and device: not only the distribution agrees, each draw does."""
    case = full_rank_case(device)
    reference = case.with_(**{n: t.cpu() for n, t in vars(case).items() if isinstance(t, torch.Tensor)})
    for seed in (0, 2**40 + 3):
        runs = [
            (case, case.run(bit_gradient="ternary", seed=seed, backend=backend)),
            (reference, reference.run(bit_gradient="ternary", seed=seed, backend="reference")),
        ]
        for side in ("query", "key"):
            assert np.array_equal(*(np.round(recovered_draws(c, run[side], side)) for c, run in runs)), side


@on_every_target
def test_mean_over_seeds_is_the_straight_through_gradient(backend, device) -> None:
    case = make_case(12, 10, head_dim=16, value_dim=4, batch=1, heads=2, device=device)
    exact = case.expected()
    runs = [case.run(bit_gradient="ternary", seed=seed, backend=backend) for seed in range(SEEDS)]
    for name in ("query", "key"):
        samples = np.stack([to_numpy(run[name]) for run in runs])
        wanted = getattr(exact, name)
        standard_error = samples.std(0, ddof=1) / np.sqrt(SEEDS)
        assert (np.abs(samples.mean(0) - wanted) <= 5 * standard_error + 1e-12).all(), name
        assert standard_error.mean() > 1e-4 * np.abs(wanted).mean(), f"{name} is not random"


@on_every_target
def test_everything_else_is_exact(backend, device) -> None:
    """Output, value and weight gradients do not depend on the bit gradient, and the window abs(x) <= 1 holds."""
    case = make_case(device=device)
    ternary, exact = case.run(bit_gradient="ternary", seed=1, backend=backend), case.run(backend=backend)
    for name, result in exact.items():
        assert torch.equal(ternary[name], result), name
    for name in ("query", "key"):
        outside = getattr(case, name).abs() > 1
        assert outside.any()
        assert not ternary[name][outside].any()


@on_every_target
def test_identical_tokens_heads_and_batch_entries_draw_differently(backend, device) -> None:
    """2 x 2 copies of one head whose first three tokens are equal: twelve equal gradients but for the draws."""
    case = make_case(40, 40, batch=1, heads=1, device=device)
    # Small weights: attention is spread out, and many pairs of a row are left to chance.
    case = case.with_(query_weight=case.query_weight / 8)
    order = [0, 0, 0, *range(3, 40)]
    copies = {
        name: tensor[:, :, order].repeat(2, 2, *[1] * (tensor.ndim - 2))
        for name, tensor in vars(case).items()
        if isinstance(tensor, torch.Tensor)
    }
    copied = case.with_(**copies)
    exact = copied.run(bit_gradient="ste", backend=backend)
    ternary = copied.run(bit_gradient="ternary", seed=0, backend=backend)
    for name in ("query", "key"):
        assert_close(exact[name][:, :, :3], exact[name][:1, :1, :1].expand(2, 2, 3, 64), name)
        assert len(ternary[name][:, :, :3].flatten(0, 2).unique(dim=0)) == 12, name


@on_every_target
def test_seed_repeats_bit_for_bit(backend, device) -> None:
    case = make_case(63, 100, device=device, dtype=torch.float32)
    first = case.run(bit_gradient="ternary", seed=11, backend=backend)
    again = case.run(bit_gradient="ternary", seed=11, backend=backend)
    as_tensor = case.run(bit_gradient="ternary", seed=torch.tensor(11, device=device), backend=backend)
    other = case.run(bit_gradient="ternary", seed=12, backend=backend)
    for name in ("query", "key"):
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name], as_tensor[name])
        assert not torch.equal(first[name], other[name])


@on_every_target
@pytest.mark.parametrize("seed", [0, -1, 2**31, 2**63 - 1, -(2**63)])
def test_whole_range_of_seeds(seed, backend, device) -> None:
    case = full_rank_case(device)
    results = case.run(bit_gradient="ternary", seed=seed, backend=backend)
    draws = recovered_draws(case, results["query"], "query")
    assert np.abs(draws - np.round(draws)).max() < 1e-8
    assert torch.equal(results["query"], case.run(bit_gradient="ternary", seed=seed, backend=backend)["query"])


@on_every_target
def test_seeds_that_differ_in_their_high_bits_differ(backend, device) -> None:
    case = make_case(63, 100, device=device, dtype=torch.float32)
    gradients = [
        case.run(bit_gradient="ternary", seed=seed, backend=backend)["query"] for seed in (5, 5 + 2**32, 5 + 2**62)
    ]
    assert not torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])


@on_every_target
def test_without_a_seed_torch_generator_decides(backend, device) -> None:
    case = make_case(63, 100, device=device, dtype=torch.float32)
    torch.manual_seed(5)
    first, second = (case.run(bit_gradient="ternary", backend=backend)["query"] for _ in range(2))
    torch.manual_seed(5)
    repeated = case.run(bit_gradient="ternary", backend=backend)["query"]
    assert torch.equal(first, repeated)
    assert not torch.equal(first, second)


@on_every_target
def test_draws_belong_to_the_call_not_to_the_backward_pass(backend, device) -> None:
    """Two backward passes through one call use the same numbers, whatever happens in between."""
    case = make_case(device=device)
    query = case.query.detach().requires_grad_()
    output = hamming_attention(
        *case.inputs(), head_dim=64, query=query, key=case.key, bit_gradient="ternary", backend=backend
    )
    (first,) = torch.autograd.grad(output, query, case.output_gradient, retain_graph=True)
    torch.randn(3)
    (second,) = torch.autograd.grad(output, query, case.output_gradient)
    assert torch.equal(first, second)


@on_every_target
def test_zero_gradient_stays_zero(backend, device) -> None:
    """The row's maximum is zero: no division by it."""
    case = make_case(device=device, dtype=torch.float32)
    silent = case.with_(output_gradient=torch.zeros_like(case.output_gradient))
    single = make_case(keys=1, device=device, dtype=torch.float32)
    for quiet in (silent, single):
        results = quiet.run(bit_gradient="ternary", seed=0, backend=backend)
        for name in ("query", "key"):
            assert results[name].abs().max() < 1e-4, name
    zero_weight = case.with_(key_weight=torch.zeros_like(case.key_weight))
    results = zero_weight.run(bit_gradient="ternary", seed=0, backend=backend)
    assert not results["query"].any()
    assert not results["key"].any()


@on_every_target
@pytest.mark.parametrize(("queries", "keys"), [(0, 7), (9, 0), (1, 1), (1, 63), (63, 1), (100, 63)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lengths_and_dtypes(queries, keys, dtype, backend, device) -> None:
    case = make_case(queries, keys, device=device, dtype=dtype)
    results = case.run(bit_gradient="ternary", seed=0, backend=backend)
    for name in ("query", "key"):
        assert results[name].dtype == dtype
        assert results[name].shape == getattr(case, name).shape
        assert results[name].isfinite().all()


@pytest.mark.parametrize("chunk", [1, 50, 64 * 7, 10_000])
def test_chunks_change_neither_draws_nor_results(chunk, monkeypatch) -> None:
    """The reference backend works through a few rows at a time; a draw depends on (seed, head, i, j) alone."""
    cases = [full_rank_case(), make_case(63, 37, batch=1, heads=2)]

    def run_all() -> list[dict[str, torch.Tensor]]:
        return [case.run(bit_gradient="ternary", seed=9, backend="reference") for case in cases]

    whole = run_all()
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", chunk)
    chunked = run_all()
    for side in ("query", "key"):
        draws = [np.round(recovered_draws(cases[0], run[0][side], side)) for run in (whole, chunked)]
        assert np.array_equal(*draws), side
    for one, other in zip(chunked, whole, strict=True):
        for name, result in one.items():
            assert_close(result, other[name], name)
