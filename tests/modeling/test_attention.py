"""Every attention type against a dense float64 evaluation of its formula with the module's own parameters."""

import math
from types import SimpleNamespace

import pytest
import torch
from attention_oracle import (
    DIM,
    HEAD_DIM,
    HEADS,
    VALUE_DIM,
    assert_same,
    make_attention,
    make_config,
    output_and_gradients,
    tokens,
)
from torch import Tensor

from hf_binaryformer.kernels import hamming_attention
from hf_binaryformer.modeling import attention_forms
from hf_binaryformer.modeling.attention import BinaryAttention
from hf_binaryformer.modeling.attention_forms import PADDED_TOKENS
from hf_binaryformer.modeling.networks import BinaryFormerModel

TYPES = ["softmax", "sign", "sign_stopgrad", "hamming", "hamming_grouped", "uniform"]
LEARNED = ["hamming", "hamming_grouped"]
# Does a gradient reach W_q and W_k?
QUERY_KEY_LEARN = {
    "softmax": True,
    "sign": True,
    "sign_stopgrad": False,
    "hamming": True,
    "hamming_grouped": True,
    "hamming_bernoulli": True,
}


@pytest.mark.parametrize("attention_type", TYPES)
@pytest.mark.parametrize("count", [1, 11, 63])
def test_output_and_every_gradient(attention_type: str, count: int) -> None:
    assert_same(make_attention(attention_type), tokens(count))


def test_softmax_with_values_filled_up_to_the_width_of_queries() -> None:
    assert VALUE_DIM < HEAD_DIM
    assert_same(make_attention("softmax"), tokens(PADDED_TOKENS))


@pytest.mark.parametrize("attention_type", [t for t in TYPES if t != "uniform"])
def test_logit_scale(attention_type: str) -> None:
    module = make_attention(attention_type, logit_scale=4.0)
    assert module.config.logit_scale == 4
    assert make_config(attention_type).logit_scale == 1, "the default is the paper's"
    assert_same(module, tokens())


@pytest.mark.parametrize("attention_type", [t for t in TYPES if t != "uniform"])
def test_learned_logit_scale(attention_type: str) -> None:
    """Output and gradients, that of the scales among them, with scales that differ between heads."""
    module, plain = make_attention(attention_type, learned_logit_scale=True), make_attention(attention_type)
    started = plain.load_state_dict(module.state_dict(), strict=False)
    assert started.unexpected_keys == ["log_scale"]
    x = tokens()
    with torch.no_grad():
        module.log_scale.zero_()
        torch.testing.assert_close(module(x), plain(x))
        module.log_scale.copy_(torch.linspace(-1.0, 1.5, HEADS))
    assert_same(module, x)
    assert output_and_gradients(module, module(x), x)["log_scale"].all()


@pytest.mark.parametrize("weight_activation", ["identity", "softplus", "bounded"])
@pytest.mark.parametrize("attention_type", LEARNED)
def test_weight_activation(attention_type: str, weight_activation: str) -> None:
    assert make_config(attention_type).weight_activation == "identity"
    assert_same(make_attention(attention_type, weight_activation=weight_activation), tokens())


def test_the_authors_grouped_layout() -> None:
    """Groups cut from the concatenation: the weights of the second half of the heads never see sigma(q)."""
    assert make_config("hamming_grouped").grouped_layout == "per_head"
    assert_same(make_attention("hamming_grouped", grouped_layout="concatenated"), tokens())


@pytest.mark.parametrize(
    ("attention_type", "bit_gradient"), [("sign", "none"), ("hamming", "ste"), ("hamming_grouped", "ste")]
)
def test_bit_gradient_none_and_ste(attention_type: str, bit_gradient: str) -> None:
    assert_same(make_attention(attention_type, bit_gradient=bit_gradient), tokens())


@pytest.mark.parametrize("attention_type", ["sign", *LEARNED])
def test_ternary_bit_gradient_replaces_the_exact_one(attention_type: str) -> None:
    """Same output; a random gradient of W_q and W_k, whose mean is the straight-through one; all others exact."""
    ternary = make_attention(attention_type, bit_gradient="ternary")
    exact = make_attention(attention_type, bit_gradient="ste")
    exact.load_state_dict(ternary.state_dict())
    x = tokens()
    wanted = output_and_gradients(exact, exact(x), x)
    torch.manual_seed(0)
    outputs = [ternary(x) for _ in range(300)]
    runs = [output_and_gradients(ternary, output, x) for output in outputs]
    assert torch.equal(runs[0]["output"], wanted["output"])
    torch.testing.assert_close(runs[0]["proj.weight"], wanted["proj.weight"])
    samples = torch.stack([run["qkv.weight"] for run in runs])
    error = (samples.mean(0) - wanted["qkv.weight"]).abs()
    standard_error = samples.std(0) / len(runs) ** 0.5
    assert (error <= 5 * standard_error + 1e-10).all()
    assert (standard_error[: 2 * DIM] > 0).float().mean() > 0.5
    torch.testing.assert_close(samples[0, 2 * DIM :], wanted["qkv.weight"][2 * DIM :])


def seen_by_weight(module: BinaryAttention, head: int) -> Tensor:
    """Which of the (H, d) query channels move the weight of `head`."""
    x = torch.randn(1, HEADS, 5, HEAD_DIM, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(module.query_theta(x)[:, head].sum(), x)
    return gradient.abs().sum((0, 2)) > 0


@pytest.mark.parametrize("weight_input_norm", [False, True])
def test_whose_channels_a_head_weight_sees(weight_input_norm: bool) -> None:
    grouped = make_attention("hamming_grouped", weight_input_norm=weight_input_norm)
    ungrouped = make_attention("hamming", weight_input_norm=weight_input_norm)
    for head in range(HEADS):
        assert seen_by_weight(ungrouped, head).all()
        own = seen_by_weight(grouped, head)
        assert own[head].all()
        assert own.sum() == HEAD_DIM, "a grouped weight sees its own head only"


@pytest.mark.parametrize("attention_type", LEARNED)
def test_weight_input_norm(attention_type: str) -> None:
    assert not make_config(attention_type).weight_input_norm
    module, plain = make_attention(attention_type, weight_input_norm=True), make_attention(attention_type)
    plain.load_state_dict(module.state_dict())
    x = tokens()
    assert not torch.allclose(module(x), plain(x))
    assert_same(module, x)


@pytest.mark.parametrize("start", [1.0, 0.5])
@pytest.mark.parametrize("weight_activation", ["identity", "softplus", "bounded"])
@pytest.mark.parametrize("attention_type", LEARNED)
def test_weights_start_at_weight_bias_init(attention_type: str, weight_activation: str, start: float) -> None:
    assert make_config(attention_type).weight_bias_init == 1
    config = make_config(
        attention_type, weight_activation=weight_activation, weight_bias_init=start, initializer_range=0.02
    )
    module = BinaryAttention(DIM, HEADS, config=config)
    x = torch.randn(2, HEADS, 50, HEAD_DIM)
    for theta in (module.query_theta, module.key_theta):
        assert (theta(x) - start).abs().max() < 0.1
    assert not torch.equal(module.query_theta.fc1.weight, module.key_theta.fc1.weight), "each side has its own theta"


@pytest.mark.parametrize("attention_type", LEARNED)
def test_gradient_to_the_query_projection_is_not_lost_at_the_start(attention_type: str) -> None:
    """The authors' start leaves about 1e-11, below Adam's epsilon of 1e-8."""
    config = make_config(attention_type, initializer_range=0.02)
    module = BinaryAttention(DIM, HEADS, qkv_bias=True, config=config)
    output = module(torch.randn(2, 63, DIM))
    output.backward(torch.randn_like(output))
    assert module.qkv.weight.grad is not None
    assert module.qkv.weight.grad[: 2 * DIM].square().mean().sqrt() > 1e-6


@pytest.mark.parametrize("attention_type", list(QUERY_KEY_LEARN))
def test_whether_the_query_and_key_projections_learn(attention_type: str) -> None:
    module = make_attention(attention_type)
    x = tokens()
    gradient = output_and_gradients(module, module(x), x)["qkv.weight"]
    for rows in (slice(DIM), slice(DIM, 2 * DIM)):
        assert bool(gradient[rows].any()) == QUERY_KEY_LEARN[attention_type]
    assert gradient[2 * DIM :].any()


def test_uniform_ignores_queries_and_keys() -> None:
    module = make_attention("uniform")
    assert module.qkv.weight.shape == (HEADS * VALUE_DIM, DIM), "no projection that could never learn"
    output = module(tokens())
    torch.testing.assert_close(output, output[:, :1].expand_as(output))


@pytest.mark.parametrize("attention_type", [*TYPES, "hamming_bernoulli"])
def test_value_channels(attention_type: str) -> None:
    narrow, wide = make_attention(attention_type), make_attention(attention_type, value_head_dim=None)
    assert narrow.proj.weight.shape == (DIM, HEADS * VALUE_DIM)
    assert wide.proj.weight.shape == (DIM, DIM)
    assert wide(tokens()).shape == (2, 11, DIM)


def test_shared_attention_is_one_module_for_all_blocks() -> None:
    sizes = {"image_size": 16, "num_channels": 1, "num_hidden_layers": 3}
    assert not make_config("hamming").share_attention
    shared = BinaryFormerModel(make_config("hamming", share_attention=True, **sizes)).eval()
    single = BinaryFormerModel(make_config("hamming", **sizes)).eval()

    def modules(model: torch.nn.Module) -> list[BinaryAttention]:
        return [m for m in model.modules() if isinstance(m, BinaryAttention)]

    assert len(modules(shared)) == 1
    assert len(modules(single)) == 3
    (owner,) = modules(shared)
    single.load_state_dict(shared.state_dict(), strict=False)
    for module in modules(single):
        module.load_state_dict(owner.state_dict())
    pixels = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(shared(pixels)[0], single(pixels)[0])
    shared(pixels)[0].square().sum().backward()
    single(pixels)[0].square().sum().backward()
    gradients = [m.qkv.weight.grad for m in modules(single)]
    assert owner.qkv.weight.grad is not None
    torch.testing.assert_close(owner.qkv.weight.grad, sum(gradients), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("attention_type", [*TYPES, "hamming_bernoulli"])
def test_autocast(attention_type: str) -> None:
    """Training in bfloat16: finite output and gradients, parameters' gradients in the parameters' own type."""
    module = make_attention(attention_type).float()
    x = torch.randn(2, 11, DIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(x)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.isfinite().all(), name
    assert module.proj.weight.grad is not None and module.proj.weight.grad.any()


TEMPERATURES = 21


@pytest.mark.parametrize("attention_type", ["sign", "hamming", "hamming_grouped", "hamming_bernoulli"])
def test_autocast_leaves_the_learned_scales_in_float32(attention_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator computes in float32: factors of 21 heads that differ by 0.2 % reach it as 21, not as 6."""
    weights: list[Tensor] = []

    def record(
        query_bits: Tensor, key_bits: Tensor, query_weight: Tensor, *others: Tensor, **options: object
    ) -> Tensor:
        weights.append(query_weight)
        return hamming_attention(query_bits, key_bits, query_weight, *others, **options)

    monkeypatch.setattr(attention_forms, "hamming_attention", record)
    dim = 4 * TEMPERATURES
    fields = {"hidden_size": dim, "num_heads": TEMPERATURES, "learned_logit_scale": True}
    module = BinaryAttention(dim, TEMPERATURES, config=make_config(attention_type, **fields))
    scales = torch.linspace(1.0, 1.04, TEMPERATURES)
    x = torch.randn(1, 5, dim)
    for one in (torch.ones(TEMPERATURES), scales):
        module.log_scale.data.copy_(one.log())
        torch.manual_seed(1)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert module(x).dtype == torch.bfloat16
    assert weights[1].dtype == torch.float32
    found = weights[1].flatten(2)[0] / weights[0].float().flatten(2)[0]
    torch.testing.assert_close(found, scales[:, None].expand_as(found))


def test_autocast_does_not_round_the_scale_of_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queries are bfloat16, but a factor that is rounded before them would be 1 here."""
    seen: list[Tensor] = []

    def record(query: Tensor, *others: Tensor, **options: object) -> Tensor:
        seen.append(query)
        return torch.nn.functional.scaled_dot_product_attention(query, *others, **options)

    functions = SimpleNamespace(scaled_dot_product_attention=record, pad=torch.nn.functional.pad)
    monkeypatch.setattr(attention_forms, "F", functions)
    module = BinaryAttention(DIM, HEADS, config=make_config("softmax", learned_logit_scale=True))
    x = torch.randn(1, 400, DIM)
    for scale in (1.0, 1.0035):  # half way between two numbers of bfloat16
        module.log_scale.data.fill_(math.log(scale))
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            module(x)
    assert seen[1].dtype == torch.bfloat16
    assert float(seen[1].float().norm() / seen[0].float().norm()) == pytest.approx(1.0035, abs=1.5e-3)


@pytest.mark.parametrize("attention_type", ["sign", "hamming"])
def test_compiles_without_a_graph_break(attention_type: str) -> None:
    torch._dynamo.reset()
    module, x = make_attention(attention_type), tokens()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    actual, expected = (output_and_gradients(module, run(x), x) for run in (compiled, module))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)


def test_a_mask_is_refused() -> None:
    module = make_attention("hamming")
    with pytest.raises(ValueError, match="mask"):
        module(tokens(), attn_mask=torch.ones(11, 11, dtype=torch.bool))


def test_heads_must_divide_the_channels() -> None:
    with pytest.raises(ValueError, match=r"25.*3") as error:
        BinaryAttention(25, 3, config=make_config("hamming"))
    assert "num_heads" in str(error.value)
