"""Dense float64 attention written from the formulas, with a module's own parameters; tiny modules to compare."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_binaryformer.modeling.attention import BinaryAttention
from hf_binaryformer.modeling.configuration import BinaryFormerConfig

DIM, HEADS, VALUE_DIM = 24, 3, 4
HEAD_DIM = DIM // HEADS


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
    scores = config.logit_scale * left @ right.transpose(-1, -2) / HEAD_DIM**0.5
    if config.learned_logit_scale:
        scores = torch.stack([torch.exp(module.log_scale[head]) * scores[:, head] for head in range(HEADS)], dim=1)
    return scores


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


def assert_same_results(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


def assert_same(module: BinaryAttention, x: Tensor) -> None:
    """Output, and the gradient of every parameter and of the input."""
    actual, expected = (
        output_and_gradients(module, run(x), x) for run in (module, lambda x: dense_attention(module, x))
    )
    assert_same_results(actual, expected)


def tokens(count: int = 11) -> Tensor:
    return torch.randn(2, count, DIM, dtype=torch.float64, requires_grad=True)
