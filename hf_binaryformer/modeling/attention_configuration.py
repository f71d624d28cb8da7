"""What every attention of the project can be told, and the registry of its forms."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn


@strict
@dataclass(kw_only=True)
class AttentionConfig:
    """Mathematics of the attention (paper Sec. 2); which backend computes it does not stand here.

    The one place for these fields: :class:`BinaryFormerConfig` inherits them and :class:`BinaryVQTransformer3DModel` takes
    them as keywords, so that both save them as flat JSON. Differences from the paper are fields, and off by default.

    Args:
        attention_type: name of a form, see :mod:`hf_binaryformer.modeling.attention_forms`.
        bit_gradient: what reaches query and key through their signs, "none", "ste" or "ternary" (stochastic, 1-2 bits);
            None: what the form has by default, "ste" for "sign", "none" for all others.
        query_key_centering: "tokens" subtracts from each channel of queries and of keys its mean over the tokens, so that each
            bit splits them (not in the paper; :mod:`hf_binaryformer.kernels.balance`).
        query_key_norm: "rms" then divides each token's channels by their root mean square, without a learned gain.
        query_key_head_dim: query and key channels of each head, that is bits; None: hidden_size / num_heads.
        value_head_dim: value channels of each head; None keeps hidden_size / num_heads (the paper reduces 64 to 16).
        logit_scale: factor of the scores (the authors' segmentation and sampler code multiplies by 4).
        learned_logit_scale: learn a further factor for each head, 1 at the start (not in the paper): scores of sign bits never
            exceed ``logit_scale * sqrt(d)``, which is too little to single out one token among many.
        share_attention: one attention module for all blocks, as in the authors' sampler.
        sigma_beta, sigma_cap: Eq. 4, ``2 tanh(beta x) / min(beta, cap)``.
        weight_bias_init: value that every learned token weight has at the start.
        weight_activation: "identity" (paper), "softplus", or "bounded" (``weight_max`` times a sigmoid).
        weight_max: upper end of "bounded".
        weight_input_norm: normalise the input of the weight network.
        grouped_layout: for "hamming_grouped": "per_head" (each head's weight sees its own channels), or "concatenated"
            (the authors': groups cut from the concatenation, so that half of the heads never see the real queries).
        bernoulli_transpose_heads: for "hamming_bernoulli": False repeats a missing transposition in two of the authors'
            scripts, after which head and token axes are mixed.
        initializer_range: standard deviation of the linear layers at the start.

    Raises:
        ValueError: no such form, or fields that do not fit it.
    """

    attention_type: str = "hamming"
    bit_gradient: Literal["none", "ste", "ternary"] | None = None
    query_key_centering: Literal["none", "tokens"] = "none"
    query_key_norm: Literal["none", "rms"] = "none"
    query_key_head_dim: int | None = None
    value_head_dim: int | None = 16
    logit_scale: float = 1.0
    learned_logit_scale: bool = False
    share_attention: bool = False
    sigma_beta: float = 0.5
    sigma_cap: float = 0.75
    weight_bias_init: float = 1.0
    weight_activation: Literal["identity", "softplus", "bounded"] = "identity"
    weight_max: float = 2.0
    weight_input_norm: bool = False
    grouped_layout: Literal["per_head", "concatenated"] = "per_head"
    bernoulli_transpose_heads: bool = True
    initializer_range: float = 0.02

    def validate_attention(self) -> None:
        """Relations between the fields."""
        form = attention_form(self.attention_type)
        if self.bit_gradient not in (None, "none") and not form.takes_bit_gradient:
            takers = ", ".join(name for name, one in _forms.items() if one.takes_bit_gradient)
            raise ValueError(
                f"bit_gradient '{self.bit_gradient}' does not fit attention_type '{self.attention_type}': "
                f"use it with one of {takers}, or leave it None"
            )
        if self.weight_activation == "bounded" and not 0 < self.weight_bias_init < self.weight_max:
            raise ValueError(
                f"weight_bias_init {self.weight_bias_init} must lie between 0 and weight_max {self.weight_max}"
            )
        if self.weight_activation == "softplus" and self.weight_bias_init <= 0:
            raise ValueError(f"weight_bias_init {self.weight_bias_init} must be positive with softplus")

    def check_heads(self, hidden_size: int, num_heads: int) -> None:
        """Make sure that so many channels can be cut into so many heads.

        Raises:
            ValueError: they cannot.
        """
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} must be divisible by num_heads {num_heads}")
        if self.query_key_head_dim is not None and self.query_key_head_dim < 1:
            raise ValueError(f"query_key_head_dim is {self.query_key_head_dim}, expected at least 1, or None")
        width = num_heads * (self.query_key_head_dim or hidden_size // num_heads)
        if self.attention_type == "hamming_grouped" and width // 2 % num_heads:
            raise ValueError(f"hamming_grouped needs hidden_size / 2 = {width // 2} divisible by num_heads {num_heads}")

    @property
    def form(self) -> "AttentionForm":
        """The form that ``attention_type`` names."""
        return attention_form(self.attention_type)

    @property
    def resolved_bit_gradient(self) -> str:
        """``bit_gradient``, or what the form has by default where that is None."""
        return self.bit_gradient or self.form.default_bit_gradient


def takes_fields_of(kind: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a function with ``**keywords``: its signature lists the dataclass's fields and their defaults in their place.

    diffusers reads from the signature which entries a configuration file has.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function)
        own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        added = [
            inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=one.type)
            for one in fields(kind)
        ]
        function.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        return function

    return decorate


@dataclass(frozen=True)
class AttentionForm:
    """One form of attention: what it computes, what it reads, and what of it learns.

    Args:
        name: what ``attention_type`` names it by.
        scores: formula of the scores, for the documentation.
        attend: (attention, query (B, H, N, d), key (B, H, N, d), value (B, H, N, d_v)) -> (B, H, N, d_v), where attention is
            the :class:`BinaryAttention` that it is for: its ``config``, ``scale``, ``scale_heads``, ``balance`` and parts.
        reads: fields of :class:`AttentionConfig` that it reads beside those of every form (what is done to queries and keys,
            the scales, ``value_head_dim``, ``share_attention``).
        has_bits: whether queries meet keys as bits, which a kernel's backend computes.
        has_queries: whether there are queries and keys at all.
        takes_bit_gradient: whether ``bit_gradient`` may be "ste" or "ternary".
        default_bit_gradient: what a ``bit_gradient`` of None means.
        takes_dropout: whether ``attn_drop`` may be above 0.
        parts: (config, head_dim, num_heads, factory keywords) -> modules that become parts of the attention, by name.
    """

    name: str
    scores: str
    attend: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    reads: tuple[str, ...] = ()
    has_bits: bool = False
    has_queries: bool = True
    takes_bit_gradient: bool = False
    default_bit_gradient: str = "none"
    takes_dropout: bool = False
    parts: Callable[[AttentionConfig, int, int, dict[str, Any]], dict[str, nn.Module]] | None = None


_forms: dict[str, AttentionForm] = {}


def register_attention_form(form: AttentionForm) -> AttentionForm:
    """Make a form available to ``attention_type``; one of the same name is replaced."""
    _forms[form.name] = form
    return form


def attention_form(name: str) -> AttentionForm:
    """The form of this name.

    Raises:
        ValueError: there is none; says which there are.
    """
    if name not in _forms:
        raise ValueError(f"attention_type is '{name}', expected one of {', '.join(_forms)}")
    return _forms[name]


def attention_forms() -> list[AttentionForm]:
    """All forms, in the order in which they were registered."""
    return list(_forms.values())
