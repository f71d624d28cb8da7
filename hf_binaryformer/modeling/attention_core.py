"""What every attention of this package has between its projections."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_binaryformer.kernels import pack_sign_bits
from hf_binaryformer.kernels.balance import balance
from hf_binaryformer.modeling import attention_forms  # noqa: F401 (registers the forms)
from hf_binaryformer.modeling.attention_configuration import AttentionConfig

# What "hamming_bernoulli" draws from: one for the batch, one for each of its samples, or None: torch's own.
Generators = torch.Generator | Sequence[torch.Generator] | None


class ScoredAttention(nn.Module):
    """Settings and learned parts of attention; ``config.attention_type`` picks the form of the scores before the softmax.

    Every form has an entry in :mod:`hf_binaryformer.modeling.attention_forms`: "softmax", "sign" (STE), "sign_stopgrad",
    "hamming", "hamming_grouped", "hamming_bernoulli", and the control "uniform".

    With ``learned_logit_scale`` each head's scores are also multiplied by exp(``log_scale``), which starts at 1.

    Args:
        config: the mathematics.
        num_heads: heads H.
        head_dim: query and key channels d of each head.
        attn_drop: dropout of the probabilities; for "softmax" only, 0 for other forms.

    Raises:
        ValueError: the form takes no dropout.
    """

    def __init__(self, config: AttentionConfig, num_heads: int, head_dim: int, attn_drop: float = 0.0) -> None:
        super().__init__()
        if attn_drop and not config.form.takes_dropout:
            raise ValueError(f"attn_drop is {attn_drop}; attention_type '{config.attention_type}' needs 0")
        self.config = config
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.scale = config.logit_scale / math.sqrt(head_dim)
        self.attn_drop = attn_drop
        self.backend: str | None = None
        self.generator: Generators = None

    def add_learned_parts(self, factory: dict[str, Any]) -> None:
        """Make what the form learns besides the projections: ``log_scale`` and the networks of the token weights."""
        config, form = self.config, self.config.form
        learns_scale = config.learned_logit_scale and form.has_queries
        self.log_scale = nn.Parameter(torch.zeros(self.num_heads, **factory)) if learns_scale else None
        for name, part in (form.parts(config, self.head_dim, self.num_heads, factory) if form.parts else {}).items():
            self.add_module(name, part)

    def balance(self, x: Tensor, window: float | None = None) -> tuple[Tensor, Tensor]:
        """Queries or keys (B, H, N, d), centred and normalised as the configuration says, and their sign bits.

        Args:
            x: queries or keys.
            window: see :func:`hf_binaryformer.kernels.balance.balance`.
        """
        centering, norm = self.config.query_key_centering == "tokens", self.config.query_key_norm == "rms"
        if not (centering or norm or window is not None):
            return x, pack_sign_bits(x)
        return balance(x, centering=centering, norm=norm, window=window)

    @property
    def balances(self) -> bool:
        """Whether queries and keys are centred or normalised."""
        return self.config.query_key_centering != "none" or self.config.query_key_norm != "none"

    def scale_heads(self, x: Tensor) -> Tensor:
        """Queries or their weights (B, H, N, ...), in which scores are linear, times their head's learned factor.

        The result is float32 (or float64) whatever x is: a factor in bfloat16 would be one of few.
        """
        if self.log_scale is None:
            return x
        factor = self.log_scale.to(torch.promote_types(self.log_scale.dtype, torch.float32)).exp()
        return x * factor.view(-1, *(1,) * (x.dim() - 2))


class AttentionCore(ScoredAttention):
    """Attention without projections, for modules of other libraries that keep their own.

    Args:
        config, num_heads, head_dim, attn_drop: as in :class:`ScoredAttention`.
        factory: device and dtype of the learned parts.

    Raises:
        ValueError: the configuration asks for other numbers of channels than the projections have.
    """

    def __init__(
        self, config: AttentionConfig, num_heads: int, head_dim: int, attn_drop: float = 0.0, **factory: Any
    ) -> None:
        config.check_heads(num_heads * head_dim, num_heads)
        for name in ("query_key_head_dim", "value_head_dim"):
            if getattr(config, name) not in (None, head_dim):
                raise ValueError(
                    f"{name} is {getattr(config, name)}, its projections have {head_dim} channels a head, which this kind of "
                    f"attention keeps: set {name}=None"
                )
        super().__init__(config, num_heads, head_dim, attn_drop)
        self.add_learned_parts(factory)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Query, key (B, H, N, d) and value (B, H, N, d_v) -> (B, H, N, d_v)."""
        return self.config.form.attend(self, query, key, value)
