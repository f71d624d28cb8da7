"""Key-padding masks of the operator, against a dense float64 softmax over the keys that take part."""

import pytest
import torch
from hamming_cases import TARGETS, assert_matches, make_case, on_every_target
from torch import Tensor

from hf_binaryformer.kernels import hamming_attention, sign_attention
from hf_binaryformer.kernels.draws import seed_from_head, uniform


def random_mask(batch: int, keys: int, device: str = "cpu") -> Tensor:
    """A different number of keys for each sample: holes anywhere, then none at all for the last sample."""
    mask = torch.rand(batch, keys, device=device) < 0.6
    mask[0, 0], mask[0, -1] = False, True
    mask[-1] = False
    return mask


@on_every_target
@pytest.mark.parametrize("bit_gradient", ["none", "ste"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("queries", "keys", "head_dim", "value_dim"),
    [(9, 7, 64, 16), (65, 130, 31, 33), (1, 200, 100, 1), (200, 3, 64, 64)],
)
def test_output_and_gradients(queries, keys, head_dim, value_dim, dtype, bit_gradient, backend, device) -> None:
    """Catches a key that is not skipped, gradients in the order of the moved keys, and samples that are mixed up."""
    case = make_case(queries, keys, head_dim, value_dim, batch=4, heads=2, dtype=dtype, device=device)
    mask = random_mask(4, keys, device)
    found = case.run(bit_gradient=bit_gradient, backend=backend, key_mask=mask)
    assert_matches(found, case.expected(key_mask=mask), floor=1.0 if keys == 3 else 0.0)
    for name in ("key_weight", "value", "key"):
        if name in found:
            assert not found[name].movedim(2, 1)[~mask].any(), f"{name}: a key outside the mask has a gradient"
    assert not found["output"][-1].any()


@on_every_target
def test_two_planes(backend, device) -> None:
    case = make_case(33, 70, 65, 5, batch=3, planes=2, dtype=torch.float32, device=device)
    mask = random_mask(3, 70, device)
    assert_matches(case.run(backend=backend, key_mask=mask), case.expected(key_mask=mask))


@on_every_target
@pytest.mark.parametrize("bit_gradient", ["none", "ste", "ternary"])
def test_all_keys_taking_part_is_no_mask(bit_gradient, backend, device) -> None:
    """Bit by bit, ternary draws of all samples and heads included."""
    case = make_case(40, 70, 64, 16, batch=3, heads=2, dtype=torch.float32, device=device)
    mask = torch.ones(3, 70, dtype=torch.bool, device=device)
    options = {"bit_gradient": bit_gradient, "seed": 2**40 + 3, "backend": backend}
    masked, plain = case.run(**options, key_mask=mask), case.run(**options)
    for name, tensor in plain.items():
        assert torch.equal(masked[name], tensor), name


@pytest.mark.parametrize("backend", [name for name, device in TARGETS if device == "cpu" and name != "reference"])
def test_ternary_gradient_is_the_reference_one(backend) -> None:
    case = make_case(130, 150, 64, 16, batch=3, dtype=torch.float32)
    case = case.with_(query=case.query.clamp(-1, 1), key=case.key.clamp(-1, 1))
    options = {"bit_gradient": "ternary", "seed": -5, "key_mask": random_mask(3, 150)}
    runs = [case.run(backend=name, **options) for name in (backend, "reference")]
    for name in ("query", "key"):
        apart = (runs[0][name] - runs[1][name]).norm(dim=-1) > 1e-3 * runs[1][name].norm(dim=-1).mean()
        assert apart.float().mean() < 0.02, f"{name}: other draws"


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 7, -1, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("first", [0, 1, 5, 2**20])
def test_seed_from_head_continues_the_draws(seed, first) -> None:
    whole = uniform(torch.tensor(seed), slice(first, first + 3), slice(0, 4), 5, torch.device("cpu"))
    part = uniform(seed_from_head(torch.tensor(seed), first), slice(0, 3), slice(0, 4), 5, torch.device("cpu"))
    assert torch.equal(part, whole)


def test_padding_does_not_change_what_a_shorter_sequence_gives() -> None:
    """The use that masks have: sequences of unequal length in one batch."""
    query, key, value = torch.randn(3, 2, 3, 50, 32).unbind()
    lengths = [50, 20]
    mask = torch.arange(50) < torch.tensor(lengths)[:, None]
    together = sign_attention(query, key, value, key_mask=mask)
    for b, n in enumerate(lengths):
        one = slice(b, b + 1)
        alone = sign_attention(query[one], key[one, :, :n], value[one, :, :n])
        torch.testing.assert_close(together[one], alone)


def test_compiled() -> None:
    case = make_case(9, 20, dtype=torch.float32)
    mask = random_mask(2, 20)
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(value: Tensor, mask: Tensor) -> Tensor:
        inputs = case.query_bits, case.key_bits, case.query_weight, case.key_weight, value
        return hamming_attention(*inputs, head_dim=64, key_mask=mask)

    value = case.value.requires_grad_()
    (found,) = torch.autograd.grad(attend(value, mask), value, case.output_gradient)
    torch.testing.assert_close(found, case.run(key_mask=mask)["value"])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 7), r"key_mask has type torch.float32, expected torch.bool"),
        (torch.ones(2, 8, dtype=torch.bool), r"key_mask has shape \(2, 8\), expected \(B, Nk\) = \(2, 7\)"),
        (torch.ones(7, dtype=torch.bool), r"key_mask has shape \(7,\)"),
    ],
)
def test_errors(mask, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_case().run(key_mask=mask)
