"""The learned scalar weight of each token (paper Sec. 2.2, Eq. 4)."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_binaryformer.kernels.saturation import saturate_and_sign
from hf_binaryformer.modeling.attention_configuration import AttentionConfig
from hf_binaryformer.modeling.plain import is_plain


class TokenWeight(nn.Module):
    """The network theta: one scalar weight for each token and head from sigma(x) and sgn(x) (paper Sec. 2.2).

    "hamming": Linear(2 D -> D / 2), GELU, Linear(D / 2 -> H) over the channels of all heads; "hamming_grouped": the same
    sizes divided into H groups.
    """

    def __init__(self, config: AttentionConfig, head_dim: int, num_heads: int, **factory: Any) -> None:
        super().__init__()
        self.config = config
        dim = head_dim * num_heads
        self.groups = num_heads if config.attention_type == "hamming_grouped" else 1
        self.fc1 = nn.Conv1d(2 * dim, dim // 2, 1, groups=self.groups, **factory)
        self.fc2 = nn.Conv1d(dim // 2, num_heads, 1, groups=self.groups, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the layers so that every weight is about ``weight_bias_init``."""
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
        plain = is_plain(self.fc1, nn.Conv1d) and is_plain(self.fc2, nn.Conv1d)
        if self.groups == 1 and not self.config.weight_input_norm and plain:
            return self._activate(self._weigh_tokens(x.transpose(1, 2).flatten(2)))
        signs = torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
        real_and_sign = torch.stack([saturate(x, self.config), signs], dim=1)  # (B, 2, H, N, d)
        if self.groups > 1 and self.config.grouped_layout == "per_head":
            real_and_sign = real_and_sign.transpose(1, 2)  # (B, H, 2, N, d)
        features = real_and_sign.movedim(3, -1).flatten(1, 3)  # (B, 2 D, N)
        if self.config.weight_input_norm:
            # Each group is normalised separately, so that a grouped weight sees no other head.
            groups = features.unflatten(1, (self.groups, -1)).mT
            features = F.layer_norm(groups, groups.shape[-1:]).mT.flatten(1, 2)
        return self._activate(self.fc2(F.gelu(self.fc1(features))))

    def _weigh_tokens(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, H, N) without the concatenation: one matrix product for each half of the weights.

        The factor of sigma(x) multiplies the weights instead of the tokens.
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


def saturate(x: Tensor, config: AttentionConfig) -> Tensor:
    """Paper Eq. 4: ``2 tanh(beta x) / min(beta, cap)``."""
    return saturation_factor(config) * torch.tanh(config.sigma_beta * x)


def saturation_factor(config: AttentionConfig) -> float:
    """Largest value of :func:`saturate`."""
    return 2 / min(config.sigma_beta, config.sigma_cap)
