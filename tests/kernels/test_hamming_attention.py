"""Forward and every gradient of `hamming_attention` against a float64 evaluation of its formulas."""

import math

import pytest
import torch
from hamming_cases import assert_matches, make_case, on_every_target
from hamming_oracle import TOLERANCE, assert_close, hamming_oracle

from hf_binaryformer.kernels import hamming_attention, pack_sign_bits

# queries, keys, head_dim, value_dim, batch, heads
SHAPES = [
    (1, 1, 64, 16, 2, 3),
    (1, 63, 64, 16, 2, 3),
    (63, 1, 31, 16, 2, 3),
    (63, 63, 64, 16, 2, 3),
    (100, 100, 64, 64, 1, 6),
    (63, 100, 65, 16, 2, 2),
    (100, 63, 100, 1, 2, 2),
    (5, 1601, 64, 16, 1, 2),
    (1601, 5, 128, 16, 1, 2),
    (1601, 1601, 64, 16, 1, 1),
]
DTYPES = list(TOLERANCE)


def test_formula_evaluated_pair_by_pair() -> None:
    """Python integers and loops: checks the operator and the dense oracle that every other test relies on."""
    case = make_case(3, 4, head_dim=65, value_dim=2, batch=1, heads=1)
    q_bits, k_bits, w_q, w_k, v = (tensor[0, 0].tolist() for tensor in case.inputs())
    d_o, scale = case.output_gradient[0, 0].tolist(), 1 / math.sqrt(65)
    dot = [
        [65 - 2 * sum(((a ^ b) & (2**64 - 1)).bit_count() for a, b in zip(q, k, strict=True)) for k in k_bits]
        for q in q_bits
    ]
    output, logsumexp, d_w_q = [], [], []
    d_v, d_w_k = [[0.0, 0.0] for _ in range(4)], [0.0] * 4
    for i in range(3):
        exponentials = [math.exp(scale * w_q[i] * w_k[j] * dot[i][j]) for j in range(4)]
        p = [e / sum(exponentials) for e in exponentials]
        d_p = [sum(d_o[i][c] * v[j][c] for c in range(2)) for j in range(4)]
        delta = sum(p[j] * d_p[j] for j in range(4))
        d_s = [p[j] * (d_p[j] - delta) for j in range(4)]
        output.append([sum(p[j] * v[j][c] for j in range(4)) for c in range(2)])
        logsumexp.append(math.log(sum(exponentials)))
        d_w_q.append(scale * sum(d_s[j] * dot[i][j] * w_k[j] for j in range(4)))
        for j in range(4):
            d_w_k[j] += scale * d_s[j] * dot[i][j] * w_q[i]
            for c in range(2):
                d_v[j][c] += p[j] * d_o[i][c]

    by_hand = {"output": output, "value": d_v, "query_weight": d_w_q, "key_weight": d_w_k}
    oracle, results = case.expected(), case.run()
    assert_close(torch.tensor(logsumexp, dtype=torch.float64)[None, None], oracle.logsumexp, "logsumexp of the oracle")
    for name, numbers in by_hand.items():
        wanted = torch.tensor(numbers, dtype=torch.float64)[None, None]
        assert_close(wanted, getattr(oracle, name), f"{name} of the oracle")
        assert_close(results[name], wanted, name)


@on_every_target
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("queries", "keys", "head_dim", "value_dim", "batch", "heads"), SHAPES)
def test_odd_lengths(queries, keys, head_dim, value_dim, batch, heads, dtype, backend, device) -> None:
    case = make_case(queries, keys, head_dim, value_dim, batch=batch, heads=heads, dtype=dtype, device=device)
    # With one key attention is constant: every gradient but the value's is zero up to rounding.
    floor = 1.0 if keys == 1 else 0.0
    assert_matches(case.run(bit_gradient="ste", backend=backend), case.expected(), floor=floor)


@on_every_target
@pytest.mark.parametrize("value_dim", [1, 16, 64])
@pytest.mark.parametrize("head_dim", [1, 31, 64, 65, 100, 128])
def test_head_dims(head_dim, value_dim, backend, device) -> None:
    case = make_case(13, 11, head_dim, value_dim, dtype=torch.float32, device=device)
    expected = case.expected()
    without, with_ste = case.run(backend=backend), case.run(backend=backend, bit_gradient="ste")
    assert_matches(without, expected)
    assert_matches(with_ste, expected)


@on_every_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("planes", [None, 2])
def test_dtypes(dtype, planes, backend, device) -> None:
    case = make_case(63, 100, 65, 16, planes=planes, dtype=dtype, device=device)
    results = case.run(backend=backend, bit_gradient="ste" if planes is None else "none")
    assert {result.dtype for result in results.values()} == {dtype}
    assert_matches(results, case.expected())


@on_every_target
def test_explicit_scale_replaces_the_default(backend, device) -> None:
    """lambda = 4, as the authors' segmentation code has it, is scale = 4 / sqrt(d)."""
    case = make_case(device=device, dtype=torch.float32)
    results = case.run(bit_gradient="ste", scale=4 / math.sqrt(64), backend=backend)
    assert_matches(results, case.expected(scale=0.5))
    assert not torch.allclose(results["output"], case.run(backend=backend)["output"])


@on_every_target
def test_no_queries(backend, device) -> None:
    case = make_case(queries=0, device=device, dtype=torch.float32)
    results = case.run(bit_gradient="ste", backend=backend)
    assert results["output"].shape == (2, 3, 0, 16)
    assert_matches(results, case.expected())
    assert not results["value"].any() and not results["key_weight"].any() and not results["key"].any()


@on_every_target
def test_no_keys_gives_zeros(backend, device) -> None:
    case = make_case(keys=0, device=device, dtype=torch.float32)
    results = case.run(bit_gradient="ste", backend=backend)
    assert torch.equal(results["output"], torch.zeros(2, 3, 9, 16, device=device))
    assert torch.equal(results["query_weight"], torch.zeros(2, 3, 9, device=device))
    assert torch.equal(results["query"], torch.zeros(2, 3, 9, 64, device=device))
    assert results["value"].shape == (2, 3, 0, 16)


@on_every_target
@pytest.mark.parametrize(("batch", "heads"), [(0, 3), (2, 0)])
def test_no_batch_or_heads(batch, heads, backend, device) -> None:
    case = make_case(batch=batch, heads=heads, device=device, dtype=torch.float32)
    assert_matches(case.run(bit_gradient="ste", backend=backend), case.expected())


@on_every_target
@pytest.mark.parametrize("planes", [None, 2])
def test_strides_do_not_matter(planes, backend, device) -> None:
    """Heads after tokens, every second channel, stride 0: what `transpose`, slicing and `expand` hand over."""
    case = make_case(planes=planes, device=device, dtype=torch.float32)

    def tokens_first(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([tensor, torch.full_like(tensor, -1)], dim=-1)[..., 0]

    names = ["query_bits", "key_bits", "query_weight", "key_weight", "value", "output_gradient"]
    names += ["query", "key"] if planes is None else []
    mode = "ste" if planes is None else "none"
    expected = case.expected()
    for change in (tokens_first, spread):
        strided = case.with_(**{name: change(getattr(case, name)) for name in names})
        assert not strided.value.is_contiguous() and not strided.query_bits.is_contiguous()
        assert_matches(strided.run(bit_gradient=mode, backend=backend), expected)

    constant = case.with_(
        query_weight=torch.ones((), device=device).expand_as(case.query_weight),
        output_gradient=torch.ones((), device=device).expand_as(case.output_gradient),
    )
    assert_matches(constant.run(bit_gradient=mode, backend=backend), constant.expected())


@on_every_target
def test_two_planes_are_the_four_term_sum(backend, device) -> None:
    """Scores of a two-plane call equal the sum of the four one-plane score matrices, taken from the signs."""
    case = make_case(6, 8, 40, 5, planes=2, device=device)
    scores = torch.zeros(2, 3, 6, 8, dtype=torch.float64)
    for m in range(2):
        for n in range(2):
            # The log-sum-exp of a single key is its score: one call for each pair of planes and each key.
            for j in range(8):
                _, score = torch.ops.hf_binaryformer.hamming_attention(
                    case.query_bits[:, :, :, m], case.key_bits[:, :, j : j + 1, n], case.query_weight[:, :, :, m],
                    case.key_weight[:, :, j : j + 1, n], case.value[:, :, j : j + 1], None, None,
                    torch.tensor(0, device=device), 40, 40**-0.5, "none", backend,
                )  # fmt: skip
                scores[..., j] += score.cpu()
    output = case.run(backend=backend)["output"]
    assert_close(output, scores.softmax(-1) @ case.value.cpu(), "output")
    assert_matches(case.run(backend=backend), case.expected())


@on_every_target
def test_equal_planes_with_halved_weights_are_one_plane(backend, device) -> None:
    one = make_case(device=device)

    def twice(tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([tensor, tensor], dim=3)

    two = one.with_(
        query_bits=twice(one.query_bits), key_bits=twice(one.key_bits), query=None, key=None,
        query_weight=twice(one.query_weight / 2), key_weight=twice(one.key_weight / 2),
    )  # fmt: skip
    assert_close(two.run(backend=backend)["output"], one.run(backend=backend)["output"], "output")


@on_every_target
def test_zero_weights_average_the_values(backend, device) -> None:
    case = make_case(device=device, dtype=torch.float32)
    zero_query = case.with_(query_weight=torch.zeros_like(case.query_weight))
    results = zero_query.run(bit_gradient="ste", backend=backend)
    assert_close(results["output"], case.value.mean(2, keepdim=True).expand(2, 3, 9, 16), "output")
    assert_matches(results, zero_query.expected())
    assert not results["query"].any() and not results["key_weight"].any()
    assert results["query_weight"].any()


@on_every_target
def test_negated_weight_equals_complemented_bits(backend, device) -> None:
    """-w sgn(q) = w sgn(-q): a negative weight reverses the order of the keys."""
    case = make_case(device=device)
    negated = case.with_(query_weight=-case.query_weight).run(backend=backend)["output"]
    complemented = case.with_(query_bits=~case.query_bits).run(backend=backend)["output"]
    assert_close(negated, complemented, "output")
    assert not torch.allclose(negated, case.run(backend=backend)["output"])


@on_every_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_large_weights_stay_finite(dtype, sign, backend, device) -> None:
    """Logits of several hundred to about a hundred thousand, where exp overflows every dtype."""
    case = make_case(63, 100, dtype=dtype, device=device)
    for size in (8.0, 120.0):
        large = case.with_(
            query_weight=sign * size * (1 + torch.rand_like(case.query_weight)),
            key_weight=size * (1 + torch.rand_like(case.key_weight)),
        )
        expected = large.expected()
        assert abs(expected.logsumexp).max() > 100
        for name, result in large.run(bit_gradient="ste", backend=backend).items():
            assert result.isfinite().all(), f"{name} at weight {size}"
        if dtype == torch.float64:
            _, logsumexp = torch.ops.hf_binaryformer.hamming_attention(
                *large.inputs(), None, None, torch.tensor(0, device=device), 64, 0.125, "none", backend
            )
            assert_close(logsumexp, expected.logsumexp, "logsumexp")
    # Moderate peaks must also be right, not only finite: one weight of 8 against weights near 1.
    peaky = case.with_(query_weight=torch.full_like(case.query_weight, 8.0 * sign))
    assert_close(peaky.run(backend=backend)["output"], peaky.expected().output, "output")


@on_every_target
def test_real_tensors_are_read_for_nothing_but_the_gradient_mask(backend, device) -> None:
    case = make_case(device=device)
    other = case.with_(query=case.query.sign() * 0.5, key=case.key.sign() * 3)
    results = other.run(bit_gradient="ste", backend=backend)
    assert torch.equal(results["output"], case.run(backend=backend)["output"])
    assert not results["key"].any(), "abs(k) = 3 is outside the straight-through window"
    assert (results["query"] != 0).all()
    assert_matches(results, other.expected())


@on_every_target
def test_straight_through_window_is_closed(backend, device) -> None:
    """Eq. 3: gradient 1 where abs(x) <= 1, so exactly +1 and -1 still learn and the next float does not."""
    case = make_case(keys=7, head_dim=4, device=device, dtype=torch.float32)
    beyond = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()
    query = torch.tensor([1.0, -1.0, beyond, -beyond], device=device).expand(2, 3, 9, 4)
    case = case.with_(query=query, query_bits=pack_sign_bits(query))
    gradient = case.run(bit_gradient="ste", backend=backend)["query"]
    assert (gradient[..., :2] != 0).all()
    assert not gradient[..., 2:].any()


@on_every_target
def test_without_bit_gradient_nothing_reaches_the_real_tensors(backend, device) -> None:
    case = make_case(device=device)
    query, key = case.query.requires_grad_(), case.key.requires_grad_()
    weight = case.query_weight.requires_grad_()
    output = hamming_attention(
        case.query_bits, case.key_bits, weight, case.key_weight, case.value,
        head_dim=64, query=query, key=key, backend=backend,
    )  # fmt: skip
    output.backward(case.output_gradient)
    assert weight.grad is not None and weight.grad.any()
    for tensor in (query, key):
        assert tensor.grad is None or not tensor.grad.any()


@on_every_target
@pytest.mark.parametrize("wanted", ["query_weight", "key_weight", "value", "query", "key"])
def test_each_input_can_learn_alone(wanted, backend, device) -> None:
    """Only one input requires a gradient; it gets the same one as when all do."""
    case = make_case(device=device)
    names = ("query_weight", "key_weight", "value", "query", "key")
    inputs = {name: getattr(case, name).detach().requires_grad_(name == wanted) for name in names}
    output = hamming_attention(
        case.query_bits, case.key_bits, head_dim=64, bit_gradient="ste", backend=backend, **inputs
    )
    (gradient,) = torch.autograd.grad(output, inputs[wanted], case.output_gradient)
    assert_close(gradient, getattr(case.expected(), wanted), wanted)


@on_every_target
def test_inputs_are_left_unchanged(backend, device) -> None:
    case = make_case(device=device)
    before = [tensor.clone() for tensor in (*case.inputs(), case.query, case.key, case.output_gradient)]
    case.run(bit_gradient="ste", backend=backend)
    after = (*case.inputs(), case.query, case.key, case.output_gradient)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@on_every_target
@pytest.mark.parametrize("masked", [False, True])
def test_autocast_rounds_no_product(masked, backend, device) -> None:
    """The operator computes in the types of its inputs; under autocast a product in it would be rounded to bfloat16."""
    case = make_case(20, 30, device=device, dtype=torch.float32)
    mask = torch.arange(30, device=device) < torch.tensor([[30], [11]], device=device) if masked else None
    options = {"head_dim": 64, "backend": backend, "key_mask": mask}
    expected = hamming_attention(*case.inputs(), **options)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        found = hamming_attention(*case.inputs(), **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@on_every_target
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_weights_with_half_precision_values(dtype, backend, device) -> None:
    """Under autocast the weights may stay in float32 while the values are rounded; each gradient keeps its dtype."""
    case = make_case(63, 100, device=device, dtype=dtype)
    mixed = case.with_(
        query_weight=torch.randn(2, 3, 63, device=device), key_weight=torch.randn(2, 3, 100, device=device)
    )
    results = mixed.run(backend=backend)
    assert results["output"].dtype == results["value"].dtype == dtype
    assert results["query_weight"].dtype == results["key_weight"].dtype == torch.float32
    expected = hamming_oracle(*mixed.inputs(), mixed.output_gradient, head_dim=64)
    for name in ("output", "value"):
        assert_close(results[name], getattr(expected, name), name)
    for name in ("query_weight", "key_weight"):
        assert_close(results[name], getattr(expected, name), name, dtype=dtype)
