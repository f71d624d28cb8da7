"""Every attention of the paper in one module that stands where timm's attention stood (paper Sec. 2)."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_binaryformer.kernels import hamming_attention, pack_sign_bits
from hf_binaryformer.kernels.saturation import saturate_and_sign
from hf_binaryformer.modeling.configuration import LEARNED_WEIGHT_TYPES, BinaryFormerConfig

# From so many tokens on, softmax attention with fewer value than query channels gets zeros for the missing ones: torch has no
# fused kernel for that case on CPUs, and without one memory grows with N^2. Short sequences do not gain from it.
PADDED_TOKENS = 384


class BinaryAttention(nn.Module):
    r"""Multi-head self-attention; ``config.attention_type`` picks the scores S before the softmax.

    | attention_type | scores |
    | --- | --- |
    | softmax | lambda q.k / sqrt(d) |
    | sign, sign_stopgrad | lambda sgn(q).sgn(k) / sqrt(d) |
    | hamming, hamming_grouped | lambda w_q w_k sgn(q).sgn(k) / sqrt(d), weights from a small network (:class:`TokenWeight`) |
    | hamming_bernoulli | as hamming, with two random sign samples each for q and k and weights from their distances |
    | uniform | 0: the mean of the values, a control that ignores q and k |

    With ``learned_logit_scale`` each head's scores are multiplied by exp(``log_scale``) as well, which starts at 1.

    Args:
        dim: token channels D.
        num_heads: heads H; query and key have d = D / H channels each.
        qkv_bias, qk_norm, scale_norm, proj_bias, attn_drop, proj_drop, norm_layer: as timm's ``Attention`` has them.
            ``attn_drop`` acts on "softmax" alone and must be 0 elsewhere; ``scale_norm`` is not supported.
        config: where the mathematics stands; a subclass made by :meth:`bound_to` carries it, as timm builds blocks from a class.

    Parameters are named as timm's: ``qkv`` (D -> 2 D + H d_v), ``proj`` (H d_v -> D).
    """

    config: BinaryFormerConfig

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] | None = None,
        config: BinaryFormerConfig | None = None,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.config = config = config or self.config
        if dim % num_heads:
            raise ValueError(f"dim {dim} must be divisible by num_heads {num_heads}")
        if scale_norm:
            raise ValueError("scale_norm=True is not supported: build the transformer without scale_attn_norm")
        if attn_drop and config.attention_type != "softmax":
            raise ValueError(f"attn_drop is {attn_drop}; attention_type '{config.attention_type}' needs 0")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.value_head_dim = config.value_head_dim or self.head_dim
        self.scale = config.logit_scale / math.sqrt(self.head_dim)
        self.attn_drop = attn_drop
        self.backend: str | None = None
        self.generator: torch.Generator | None = None

        self.query_key_dim = 0 if config.attention_type == "uniform" else dim
        value_dim = num_heads * self.value_head_dim
        self.qkv = nn.Linear(dim, 2 * self.query_key_dim + value_dim, bias=qkv_bias, **factory)
        self.q_norm = norm_layer(self.head_dim, **factory) if qk_norm and norm_layer else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **factory) if qk_norm and norm_layer else nn.Identity()
        self.proj = nn.Linear(value_dim, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        learns_scale = config.learned_logit_scale and config.attention_type != "uniform"
        self.log_scale = nn.Parameter(torch.zeros(num_heads, **factory)) if learns_scale else None
        if config.attention_type in LEARNED_WEIGHT_TYPES:
            self.query_theta = TokenWeight(config, self.head_dim, num_heads, **factory)
            self.key_theta = TokenWeight(config, self.head_dim, num_heads, **factory)

    @classmethod
    def bound_to(cls, config: BinaryFormerConfig) -> type[BinaryAttention]:
        """A subclass with the configuration built in, for ``attn_layer=`` of timm's transformers."""
        return type(cls.__name__, (cls,), {"config": config})

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, D) -> (B, N, D).

        Raises:
            ValueError: a mask is given; every token attends to every token.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("attention masks are not supported: call without attn_mask and is_causal")
        query, key, value = self._project(x)
        out = getattr(self, f"_attend_{self.config.attention_type}")(query, key, value)  # (B, H, N, d_v)
        if self.config.attention_type != "hamming_bernoulli" or self.config.bernoulli_transpose_heads:
            out = out.transpose(1, 2)
        return self.proj_drop(self.proj(out.reshape(*x.shape[:2], -1)))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key (B, H, N, d) and value (B, H, N, d_v)."""
        qk, heads = self.query_key_dim, self.num_heads
        query, key, value = self.qkv(x).split([qk, qk, heads * self.value_head_dim], dim=-1)
        query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
        return self.q_norm(query), self.k_norm(key), value

    def _scale_heads(self, x: Tensor) -> Tensor:
        """Queries or their weights (B, H, N, ...), in which scores are linear, times the learned factor of their head."""
        if self.log_scale is None:
            return x
        return x * self.log_scale.exp().to(x.dtype).view(-1, *(1,) * (x.dim() - 2))

    def _attend_uniform(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return value.mean(2, keepdim=True).expand_as(value)

    def _attend_softmax(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        dropout = self.attn_drop if self.training else 0.0
        query = self._scale_heads(query)
        missing = self.head_dim - self.value_head_dim
        if missing > 0 and key.shape[2] >= PADDED_TOKENS:
            value = F.pad(value, (0, missing))
        out = F.scaled_dot_product_attention(query, key, value, scale=self.scale, dropout_p=dropout)
        return out[..., : self.value_head_dim]

    def _attend_sign(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self._hamming(query, key, None, None, value)

    _attend_sign_stopgrad = _attend_sign

    def _attend_hamming(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self._hamming(query, key, self.query_theta(query), self.key_theta(key), value)

    _attend_hamming_grouped = _attend_hamming

    def _attend_hamming_bernoulli(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query_bits, query_weight = self._bernoulli_pair(query)
        key_bits, key_weight = self._bernoulli_pair(key)
        return hamming_attention(
            query_bits,
            key_bits,
            self._scale_heads(query_weight),
            key_weight,
            value,
            head_dim=self.head_dim,
            scale=self.scale,
            backend=self.backend,
        )

    def _hamming(
        self, query: Tensor, key: Tensor, query_weight: Tensor | None, key_weight: Tensor | None, value: Tensor
    ) -> Tensor:
        ones = value.new_ones(query.shape[:3])
        return hamming_attention(
            pack_sign_bits(query),
            pack_sign_bits(key),
            self._scale_heads(ones if query_weight is None else query_weight),
            ones if key_weight is None else key_weight,
            value,
            head_dim=self.head_dim,
            scale=self.scale,
            query=query,
            key=key,
            bit_gradient=self.config.resolved_bit_gradient,
            backend=self.backend,
        )

    def _bernoulli_pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Two samples of psgn(sigma(x)) as bits (B, H, N, 2, words), and their bilinear weights (B, H, N, 2)."""
        x = saturate(x, self.config)
        probability = ((x + 1) / 2).clamp(0, 1)
        draw = torch.rand((2, *x.shape), generator=self.generator, device=x.device)
        samples = torch.where(draw < probability, 1.0, -1.0).to(x.dtype)  # (2, B, H, N, d)
        distance = (x - samples).abs().mean(-1)
        total = distance.sum(0).clamp_min(torch.finfo(distance.dtype).tiny)
        return pack_sign_bits(samples.movedim(0, 3)), (distance.flip(0) / total).movedim(0, 3)


class TokenWeight(nn.Module):
    """The network theta: one scalar weight for each token and head from sigma(x) and sgn(x) (paper Sec. 2.2).

    "hamming": Linear(2 D -> D / 2), GELU, Linear(D / 2 -> H) over the channels of all heads; "hamming_grouped": the same
    sizes cut into H groups.
    """

    def __init__(self, config: BinaryFormerConfig, head_dim: int, num_heads: int, **factory: Any) -> None:
        super().__init__()
        self.config = config
        dim = head_dim * num_heads
        self.groups = num_heads if config.attention_type == "hamming_grouped" else 1
        self.fc1 = nn.Conv1d(2 * dim, dim // 2, 1, groups=self.groups, **factory)
        self.fc2 = nn.Conv1d(dim // 2, num_heads, 1, groups=self.groups, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start such that every weight is about ``weight_bias_init``."""
        config, start = self.config, self.config.weight_bias_init
        if config.weight_activation == "softplus":
            start = math.log(math.expm1(start))
        elif config.weight_activation == "bounded":
            start = math.log(start / (config.weight_max - start))
        for layer, bias in ((self.fc1, 0.0), (self.fc2, start)):
            nn.init.trunc_normal_(layer.weight, std=config.initializer_range)
            nn.init.constant_(cast(Tensor, layer.bias), bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, N, d) -> (B, H, N)."""
        if self.groups == 1 and not self.config.weight_input_norm:
            return self._activate(self._weigh_tokens(x.transpose(1, 2).flatten(2)))
        signs = torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
        real_and_sign = torch.stack([saturate(x, self.config), signs], dim=1)  # (B, 2, H, N, d)
        if self.groups > 1 and self.config.grouped_layout == "per_head":
            real_and_sign = real_and_sign.transpose(1, 2)  # (B, H, 2, N, d)
        features = real_and_sign.movedim(3, -1).flatten(1, 3)  # (B, 2 D, N)
        if self.config.weight_input_norm:
            # Each group on its own, so that a grouped weight sees no other head.
            groups = features.unflatten(1, (self.groups, -1)).mT
            features = F.layer_norm(groups, groups.shape[-1:]).mT.flatten(1, 2)
        return self._activate(self.fc2(F.gelu(self.fc1(features))))

    def _weigh_tokens(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, H, N) without the concatenation: one product for each half of the weights.

        The factor of sigma(x) moves from the tokens to the weights.
        """
        real, sign = self.fc1.weight.squeeze(-1).chunk(2, dim=1)
        saturated, signs = saturate_and_sign(x.flatten(0, 1), self.config.sigma_beta)
        hidden = F.linear(saturated, saturation_factor(self.config) * real, self.fc1.bias) + F.linear(signs, sign)
        weight = F.linear(F.gelu(hidden), self.fc2.weight.squeeze(-1), self.fc2.bias)
        return weight.unflatten(0, x.shape[:2]).transpose(1, 2)

    def _activate(self, weight: Tensor) -> Tensor:
        if self.config.weight_activation == "softplus":
            return F.softplus(weight)
        if self.config.weight_activation == "bounded":
            return self.config.weight_max * weight.sigmoid()
        return weight


class SharedAttention(nn.Module):
    """Stands in a block for the attention of another block, so that all use one module (``share_attention``)."""

    def __init__(self, owner: BinaryAttention) -> None:
        super().__init__()
        # In a tuple, so that the parameters are registered (and saved) once, at their owner.
        self._owner = (owner,)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """As the owner."""
        return self._owner[0](x, attn_mask, is_causal)


def saturate(x: Tensor, config: BinaryFormerConfig) -> Tensor:
    """Paper Eq. 4: ``2 tanh(beta x) / min(beta, cap)``."""
    return saturation_factor(config) * torch.tanh(config.sigma_beta * x)


def saturation_factor(config: BinaryFormerConfig) -> float:
    """Largest value of :func:`saturate`."""
    return 2 / min(config.sigma_beta, config.sigma_cap)


def attention_modules(model: nn.Module) -> list[BinaryAttention]:
    """Every :class:`BinaryAttention` in a model."""
    return [module for module in model.modules() if isinstance(module, BinaryAttention)]
