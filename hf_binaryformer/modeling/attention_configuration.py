"""Settings of attention, the same for all networks, and the registry of attention forms."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn


@strict
@dataclass(kw_only=True)
class AttentionConfig:
    """Mathematics of the attention (paper Sec. 2). The choice of the backend that computes it is not part of this.

    These fields are defined only here. :class:`BinaryFormerConfig` inherits them and
    :class:`BinaryVQTransformer3DModel` takes them as keywords, so that both save them as flat JSON. Differences from
    the paper are fields that are off by default.

    Args:
        attention_type: name of a form, see :mod:`hf_binaryformer.modeling.attention_forms`.
        bit_gradient: the gradient that query and key receive through their signs: "none", "ste" or "ternary"
            (stochastic, 1-2 bits). None takes the form's default: "ste" for "sign", "none" for all others.
        query_key_centering: "tokens" subtracts from each channel of queries and of keys its mean over the tokens. Each
            bit then divides the tokens into two groups (not in the paper; :mod:`hf_binaryformer.kernels.balance`).
        query_key_norm: "rms" divides each token's channels by their root mean square, after the centring and without a
            learned gain.
        query_key_head_dim: query and key channels of each head, which is its number of bits; None:
            hidden_size / num_heads.
        value_head_dim: value channels of each head; None keeps hidden_size / num_heads (the paper reduces 64 to 16).
        logit_scale: factor of the scores (the authors' segmentation and sampler code multiplies by 4).
        learned_logit_scale: learn another factor for each head, 1 at the start (not in the paper). Scores of sign bits
            never exceed ``logit_scale * sqrt(d)``, which is too small to single out one token among many.
        share_attention: one attention module for all blocks, as in the authors' sampler.
        sigma_beta, sigma_cap: Eq. 4, ``2 tanh(beta x) / min(beta, cap)``.
        weight_bias_init: initial value of every learned token weight.
        weight_activation: "identity" (paper), "softplus", or "bounded" (``weight_max`` times a sigmoid).
        weight_max: upper limit of "bounded".
        weight_input_norm: normalise the input of the weight network.
        grouped_layout: for "hamming_grouped": "per_head" (each head's weight sees its own channels), or "concatenated"
            (the authors' layout: groups are cut from the concatenation, so that half of the heads never see the real
            queries).
        bernoulli_transpose_heads: for "hamming_bernoulli": False reproduces a missing transposition in two of the
            authors' scripts, which mixes the head and token axes.
        initializer_range: standard deviation of the linear layers' initial weights.

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
        """Check that the channels can be divided among the heads.

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
        """``bit_gradient``, or the form's default if that is None."""
        return self.bit_gradient or self.form.default_bit_gradient


def takes_fields_of(kind: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a function so that its signature lists the dataclass's fields and defaults instead of ``**keywords``.

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
    """One form of attention: its computation, the fields that it reads, and its learned parts.

    Args:
        name: its value of ``attention_type``.
        scores: formula of the scores, for the documentation.
        attend: (attention, query (B, H, N, d), key (B, H, N, d), value (B, H, N, d_v)) -> (B, H, N, d_v). ``attention``
            is the :class:`BinaryAttention` that calls it, with its ``config``, ``scale``, ``scale_heads``, ``balance``
            and parts.
        reads: fields of :class:`AttentionConfig` that it reads in addition to those of every form (centring and norm of
            queries and keys, the scales, ``value_head_dim``, ``share_attention``).
        has_bits: whether the product of queries and keys is one of bits, which a backend of the kernels computes.
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
# The package's own forms. They need this module, so they are loaded by their name, before the first use of the registry. Where
# all modules are in one file, this is that file.
OWN_FORMS = __name__.replace("attention_configuration", "attention_forms")


def register_attention_form(form: AttentionForm) -> AttentionForm:
    """Make a form available to ``attention_type``; a form of the same name is replaced."""
    import_module(OWN_FORMS)
    _forms[form.name] = form
    return form


def attention_form(name: str) -> AttentionForm:
    """The form of this name.

    Raises:
        ValueError: there is no such form; the message lists those that exist.
    """
    if name not in _forms:
        import_module(OWN_FORMS)
    if name not in _forms:
        raise ValueError(f"attention_type is '{name}', expected one of {', '.join(_forms)}")
    return _forms[name]


def attention_forms() -> list[AttentionForm]:
    """All forms, in the order in which they were registered."""
    import_module(OWN_FORMS)
    return list(_forms.values())
