"""The forms of attention, one entry each. A new form needs an entry (:func:`register_attention_form`) and a test."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_binaryformer.kernels import hamming_attention, pack_sign_bits
from hf_binaryformer.modeling.attention_configuration import AttentionConfig, AttentionForm, register_attention_form
from hf_binaryformer.modeling.token_weight import TokenWeight, saturate

# From this number of tokens on, softmax attention pads the values with zeros if they have fewer channels than the
# queries. Torch has no fused kernel for that case on CPUs, and without one memory grows with N^2. Short sequences do
# not gain from the padding.
PADDED_TOKENS = 384
# Window of the straight-through gradient of a sign (paper Eq. 3).
WINDOW = 1.0


def attend_softmax(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Torch's own attention."""
    dropout = attention.attn_drop if attention.training else 0.0
    channels, missing = value.shape[-1], query.shape[-1] - value.shape[-1]
    if missing > 0 and key.shape[2] >= PADDED_TOKENS:
        value = F.pad(value, (0, missing))
    query, key = real_numbers(attention, query), real_numbers(attention, key)
    query = attention.scale_heads(query).to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, scale=attention.scale, dropout_p=dropout)[..., :channels]


def real_numbers(attention: Any, x: Tensor) -> Tensor:
    """Queries or keys, balanced if the configuration says so."""
    return attention.balance(x)[0] if attention.balances else x


def attend_sign(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Hamming attention with all token weights at 1."""
    ones = value.new_ones(query.shape[:3])
    # If queries and keys are balanced, the backward pass of the balancing also applies the straight-through window.
    window = WINDOW if attention.balances else None
    sides = attention.balance(query, window), attention.balance(key, window)
    return attend_bits(attention, *sides, ones, ones, value, None if attention.balances else WINDOW)


def attend_hamming(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Hamming attention with learned token weights."""
    sides = attention.balance(query), attention.balance(key)
    weights = attention.query_theta(sides[0][0]), attention.key_theta(sides[1][0])
    return attend_bits(attention, *sides, *weights, value, WINDOW)


def attend_bits(
    attention: Any,
    query: tuple[Tensor, Tensor],
    key: tuple[Tensor, Tensor],
    query_weight: Tensor,
    key_weight: Tensor,
    value: Tensor,
    window: float | None,
) -> Tensor:
    """Hamming attention of queries and keys, given as real numbers and their bits, with token weights (B, H, N)."""
    return hamming_attention(
        query[1],
        key[1],
        attention.scale_heads(query_weight),
        key_weight,
        value,
        head_dim=query[0].shape[-1],
        scale=attention.scale,
        query=query[0],
        key=key[0],
        bit_gradient=attention.config.resolved_bit_gradient,
        window=window,
        backend=attention.backend,
    )


def attend_bernoulli(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Hamming attention with two random samples of the signs of each token, and their bilinear weights."""
    query_bits, query_weight = bernoulli_pair(attention, real_numbers(attention, query))
    key_bits, key_weight = bernoulli_pair(attention, real_numbers(attention, key))
    out = hamming_attention(
        query_bits,
        key_bits,
        attention.scale_heads(query_weight),
        key_weight,
        value,
        head_dim=query.shape[-1],
        scale=attention.scale,
        backend=attention.backend,
    )
    if attention.config.bernoulli_transpose_heads:
        return out
    # (B, H, N, d_v) read as if it were (B, N, H, d_v).
    batch, heads, tokens, channels = out.shape
    return out.reshape(batch, tokens, heads, channels).transpose(1, 2)


def bernoulli_pair(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Two samples of psgn(sigma(x)) as bits (B, H, N, 2, words), and their bilinear weights (B, H, N, 2)."""
    x = saturate(x, attention.config)
    probability = ((x + 1) / 2).clamp(0, 1)
    samples = torch.where(uniform(attention.generator, x) < probability, 1.0, -1.0).to(x.dtype)  # (2, B, H, N, d)
    distance = (x - samples).abs().mean(-1)
    total = distance.sum(0).clamp_min(torch.finfo(distance.dtype).tiny)
    return pack_sign_bits(samples.movedim(0, 3)), (distance.flip(0) / total).movedim(0, 3)


def uniform(generator: Any, x: Tensor) -> Tensor:
    """Uniform numbers (2, B, H, N, d) for x (B, H, N, d), from one generator, from one for each sample, or from torch's."""
    if generator is None or isinstance(generator, torch.Generator):
        device = x.device if generator is None else generator.device
        return torch.rand((2, *x.shape), generator=generator, device=device).to(x.device)
    if len(generator) != len(x):
        raise ValueError(f"{len(generator)} generators for {len(x)} samples: give one, or one for each sample")
    draws = [torch.rand((2, *x.shape[1:]), generator=one, device=one.device).to(x.device) for one in generator]
    return torch.stack(draws, 1) if draws else x.new_empty((2, *x.shape))


def attend_uniform(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The mean of the values."""
    return value.mean(2, keepdim=True).expand_as(value)


def token_weights(
    config: AttentionConfig, head_dim: int, num_heads: int, factory: dict[str, Any]
) -> dict[str, nn.Module]:
    """The networks theta of queries and of keys."""
    return {name: TokenWeight(config, head_dim, num_heads, **factory) for name in ("query_theta", "key_theta")}


SIGMA = ("sigma_beta", "sigma_cap")
WEIGHT = ("weight_bias_init", "weight_activation", "weight_max", "weight_input_norm", "initializer_range")

for form in (
    AttentionForm("softmax", "lambda q.k / sqrt(d)", attend_softmax, takes_dropout=True),
    AttentionForm(
        "sign",
        "lambda sgn(q).sgn(k) / sqrt(d)",
        attend_sign,
        reads=("bit_gradient",),
        has_bits=True,
        takes_bit_gradient=True,
        default_bit_gradient="ste",
    ),
    AttentionForm("sign_stopgrad", "as sign, without a gradient to q and k", attend_sign, has_bits=True),
    AttentionForm(
        "hamming",
        "lambda w_q w_k sgn(q).sgn(k) / sqrt(d), weights by one network over all heads",
        attend_hamming,
        reads=("bit_gradient", *SIGMA, *WEIGHT),
        has_bits=True,
        takes_bit_gradient=True,
        parts=token_weights,
    ),
    AttentionForm(
        "hamming_grouped",
        "as hamming, each head's weights by a network of its own",
        attend_hamming,
        reads=("bit_gradient", *SIGMA, *WEIGHT, "grouped_layout"),
        has_bits=True,
        takes_bit_gradient=True,
        parts=token_weights,
    ),
    AttentionForm(
        "hamming_bernoulli",
        "as hamming, with two random sign samples each for q and k and weights from their distances",
        attend_bernoulli,
        reads=(*SIGMA, "bernoulli_transpose_heads"),
        has_bits=True,
    ),
    AttentionForm(
        "uniform", "0: the mean of the values, a control that ignores q and k", attend_uniform, has_queries=False
    ),
):
    register_attention_form(form)
