"""Every attention type against a dense float64 evaluation of its formula with the module's own parameters."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hf_binaryformer.modeling.attention as attention_module
from hf_binaryformer.kernels import unpack_sign_bits
from hf_binaryformer.modeling.attention import BinaryAttention
from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.modeling import BinaryFormerModel

DIM, HEADS, VALUE_DIM = 24, 3, 4
HEAD_DIM = DIM // HEADS
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


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(7)


def make_config(attention_type: str, **fields: Any) -> BinaryFormerConfig:
    sizes = {"hidden_size": DIM, "num_heads": HEADS, "value_head_dim": VALUE_DIM, "initializer_range": 0.3}
    return BinaryFormerConfig(attention_type=attention_type, **(sizes | fields))


def make_attention(attention_type: str, **fields: Any) -> BinaryAttention:
    """In float64, with parameters large enough that no term of a formula is negligible."""
    module = BinaryAttention(DIM, HEADS, qkv_bias=True, config=make_config(attention_type, **fields)).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def sigma(x: Tensor) -> Tensor:
    return 2 * torch.tanh(0.5 * x) / 0.5


def sign(x: Tensor) -> Tensor:
    return (x.detach() >= 0).double() * 2 - 1


def straight_through(x: Tensor) -> Tensor:
    """sgn(x) whose gradient is 1 where abs(x) <= 1 and 0 elsewhere (Eq. 3)."""
    inside = x * (x.detach().abs() <= 1)
    return sign(x) + inside - inside.detach()


def split_heads(x: Tensor) -> Tensor:
    """(B, N, H c) -> (B, H, N, c)."""
    return torch.stack(x.chunk(HEADS, dim=-1), dim=1)


def project(module: BinaryAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = module.qkv.weight, module.qkv.bias
    query, key, value = (
        x @ weight[rows].T + bias[rows] for rows in (slice(DIM), slice(DIM, 2 * DIM), slice(2 * DIM, None))
    )
    return split_heads(query), split_heads(key), split_heads(value)


def normalised(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def dense_theta(theta: torch.nn.Module, x: Tensor, config: BinaryFormerConfig) -> Tensor:
    """w = theta(sigma(x) || sgn(x)): (B, H, N, d) -> (B, H, N), one head's hidden units and output at a time."""
    real, signs = sigma(x), sign(x)
    everything = torch.cat([*real.unbind(1), *signs.unbind(1)], dim=-1)  # (B, N, 2 D)
    prepare = normalised if config.weight_input_norm else lambda features: features
    hidden_units = DIM // 2 // HEADS
    weights = []
    if config.attention_type == "hamming":
        hidden = F.gelu(prepare(everything) @ theta.fc1.weight[..., 0].T + theta.fc1.bias)
        weights = (hidden @ theta.fc2.weight[..., 0].T + theta.fc2.bias).unbind(-1)
    else:
        for head in range(HEADS):
            if config.grouped_layout == "per_head":
                seen = torch.cat([real[:, head], signs[:, head]], dim=-1)
            else:
                seen = everything[..., head * 2 * HEAD_DIM : (head + 1) * 2 * HEAD_DIM]
            units = slice(head * hidden_units, (head + 1) * hidden_units)
            hidden = F.gelu(prepare(seen) @ theta.fc1.weight[units, :, 0].T + theta.fc1.bias[units])
            weights.append(hidden @ theta.fc2.weight[head, :, 0] + theta.fc2.bias[head])
    weight = torch.stack(list(weights), dim=1)
    if config.weight_activation == "softplus":
        return torch.log1p(torch.exp(weight))
    if config.weight_activation == "bounded":
        return config.weight_max / (1 + torch.exp(-weight))
    return weight


def dense_scores(module: BinaryAttention, query: Tensor, key: Tensor) -> Tensor:
    config = module.config
    bit = straight_through if config.bit_gradient == "ste" else sign
    if config.attention_type == "uniform":
        return query.new_zeros(*query.shape[:3], query.shape[2])
    if config.attention_type == "softmax":
        left, right = query, key
    elif config.attention_type == "sign":
        bit = sign if config.bit_gradient == "none" else straight_through
        left, right = bit(query), bit(key)
    elif config.attention_type == "sign_stopgrad":
        left, right = sign(query), sign(key)
    else:
        left = bit(query) * dense_theta(module.query_theta, query, config)[..., None]
        right = bit(key) * dense_theta(module.key_theta, key, config)[..., None]
    return config.logit_scale * left @ right.transpose(-1, -2) / HEAD_DIM**0.5


def finish(module: BinaryAttention, per_head: Tensor) -> Tensor:
    """(B, H, N, d_v) -> (B, N, D): heads side by side, then the output projection."""
    return torch.cat(per_head.unbind(1), dim=-1) @ module.proj.weight.T + module.proj.bias


def dense_attention(module: BinaryAttention, x: Tensor) -> Tensor:
    if module.config.attention_type == "uniform":
        value = split_heads(x @ module.qkv.weight.T + module.qkv.bias)
        query = key = x.new_zeros(x.shape[0], HEADS, x.shape[1], HEAD_DIM)
    else:
        query, key, value = project(module, x)
    return finish(module, dense_scores(module, query, key).softmax(-1) @ value)


def output_and_gradients(module: BinaryAttention, output: Tensor, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(99)
    names, parameters = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad(output, [x, *parameters], torch.randn_like(output), allow_unused=True)
    zeros = [torch.zeros_like(p) if g is None else g for g, p in zip(found, [x, *parameters], strict=True)]
    return {"output": output.detach(), **dict(zip(["x", *names], zeros, strict=True))}


def assert_same(module: BinaryAttention, x: Tensor) -> None:
    actual, expected = (
        output_and_gradients(module, run(x), x) for run in (module, lambda x: dense_attention(module, x))
    )
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


def tokens(count: int = 11) -> Tensor:
    return torch.randn(2, count, DIM, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("attention_type", TYPES)
@pytest.mark.parametrize("count", [1, 11, 63])
def test_output_and_every_gradient(attention_type: str, count: int) -> None:
    assert_same(make_attention(attention_type), tokens(count))


@pytest.mark.parametrize("attention_type", [t for t in TYPES if t != "uniform"])
def test_logit_scale(attention_type: str) -> None:
    module = make_attention(attention_type, logit_scale=4.0)
    assert module.config.logit_scale == 4
    assert make_config(attention_type).logit_scale == 1, "the default is the paper's"
    assert_same(module, tokens())


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


class Recorder:
    """Stands before `hamming_attention` and keeps what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Tensor, ...]] = []
        self.real = attention_module.hamming_attention
        monkeypatch.setattr(attention_module, "hamming_attention", self)

    def __call__(self, *args: Tensor, **options: Any) -> Tensor:
        self.calls.append(args)
        return self.real(*args, **options)


def dense_bernoulli(module: BinaryAttention, x: Tensor, query_bits: Tensor, key_bits: Tensor) -> Tensor:
    """y* = w1 y1 + w2 y2 with w1 = d2 / (d1 + d2), d = mean abs(sigma(q) - y), for samples y drawn by the module."""
    query, key, value = project(module, x)
    interpolated = []
    for real, bits in ((sigma(query), query_bits), (sigma(key), key_bits)):
        first, second = unpack_sign_bits(bits, HEAD_DIM, dtype=torch.float64).unbind(3)
        d_first, d_second = (real - first).abs().mean(-1), (real - second).abs().mean(-1)
        w_first, w_second = d_second / (d_first + d_second), d_first / (d_first + d_second)
        interpolated.append(w_first[..., None] * first + w_second[..., None] * second)
    scores = module.config.logit_scale * interpolated[0] @ interpolated[1].transpose(-1, -2) / HEAD_DIM**0.5
    per_head = scores.softmax(-1) @ value
    if module.config.bernoulli_transpose_heads:
        return finish(module, per_head)
    mixed = per_head.reshape(x.shape[0], x.shape[1], HEADS * VALUE_DIM)
    return mixed @ module.proj.weight.T + module.proj.bias


@pytest.mark.parametrize("fields", [{}, {"logit_scale": 4.0}, {"bernoulli_transpose_heads": False}])
def test_bernoulli_given_its_samples(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_config("hamming_bernoulli").bernoulli_transpose_heads
    recorder = Recorder(monkeypatch)
    module, x = make_attention("hamming_bernoulli", **fields), tokens()
    actual = output_and_gradients(module, module(x), x)
    query_bits, key_bits = recorder.calls[0][:2]
    expected = output_and_gradients(module, dense_bernoulli(module, x, query_bits, key_bits), x)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


def test_bernoulli_samples_have_the_right_mean_and_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    """psgn(x) is +1 with probability clip((x + 1) / 2, 0, 1), x = sigma(q), twice for queries and twice for keys."""
    recorder = Recorder(monkeypatch)
    module, x = make_attention("hamming_bernoulli"), tokens()
    with torch.no_grad():
        # sigma rises with slope 2 at zero: small queries and keys, so that many probabilities are neither 0 nor 1.
        module.qkv.weight[: 2 * DIM] *= 0.2
        module.qkv.bias[: 2 * DIM] *= 0.2
        query, key, _ = project(module, x)
        for _ in range(400):
            module(x)
    sides = []
    for side, real in ((0, query), (1, key)):
        samples = torch.stack([unpack_sign_bits(call[side], HEAD_DIM, torch.float64) for call in recorder.calls])
        mean = sigma(real).clamp(-1, 1).unsqueeze(3).expand(*samples.shape[1:])
        deviation = (1 - mean.square()).sqrt()
        assert ((samples.mean(0) - mean).abs() <= 5 * deviation / 20 + 1e-12).all()
        assert (deviation > 0.1).double().mean() > 0.5
        standardised = (samples - mean) / deviation.clamp_min(1e-9)
        uncertain = deviation[:, :, :, 0] > 0.1
        between = (standardised[:, :, :, :, 0] * standardised[:, :, :, :, 1]).mean(0)[uncertain]
        assert between.abs().max() < 6.5 / 20, "the two samples of a token are independent"
        sides.append((standardised[:, :, :, :, 0], uncertain))
    both = sides[0][1] & sides[1][1]
    across = (sides[0][0] * sides[1][0]).mean(0)[both]
    assert across.abs().max() < 6.5 / 20, "queries and keys are drawn independently"


def test_bernoulli_with_saturated_inputs_is_sign_attention() -> None:
    """abs(sigma(q)) >= 1 leaves nothing to chance: both samples are sgn(q), and their weights add up to one."""
    bernoulli, signed = make_attention("hamming_bernoulli"), make_attention("sign")
    signed.load_state_dict(bernoulli.state_dict())
    with torch.no_grad():
        for module in (bernoulli, signed):
            module.qkv.weight[: 2 * DIM] *= 1000
    x = tokens()
    torch.testing.assert_close(bernoulli(x), signed(x))


def test_bernoulli_repeats_with_a_generator() -> None:
    module, x = make_attention("hamming_bernoulli").eval(), tokens()

    def run(seed: int) -> Tensor:
        module.generator = torch.Generator().manual_seed(seed)
        return module(x)

    first = run(1)
    torch.randn(5)
    assert torch.equal(first, run(1))
    assert not torch.equal(first, run(2))


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
