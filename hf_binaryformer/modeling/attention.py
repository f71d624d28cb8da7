"""The attention module that replaces timm's attention, in every form of the paper (Sec. 2)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_binaryformer.kernels import pack_sign_bits
from hf_binaryformer.kernels.backends import select_backend
from hf_binaryformer.kernels.balance import balance
from hf_binaryformer.modeling import attention_forms  # noqa: F401 (registers the forms)
from hf_binaryformer.modeling.attention_configuration import AttentionConfig, attention_form

# What "hamming_bernoulli" draws from: one for the batch, one for each of its samples, or None: torch's own.
Generators = torch.Generator | Sequence[torch.Generator] | None


class BinaryAttention(nn.Module):
    """Multi-head self-attention; ``config.attention_type`` picks the form of the scores before the softmax.

    Every form has an entry in :mod:`hf_binaryformer.modeling.attention_forms`: "softmax", "sign" (STE), "sign_stopgrad",
    "hamming", "hamming_grouped", "hamming_bernoulli", and the control "uniform".

    With ``learned_logit_scale`` each head's scores are also multiplied by exp(``log_scale``), which starts at 1.

    Args:
        dim: token channels D.
        num_heads: heads H; query and key have d = D / H channels each, or ``query_key_head_dim``.
        qkv_bias, qk_norm, scale_norm, proj_bias, attn_drop, proj_drop, norm_layer: as in timm's ``Attention``.
            ``attn_drop`` applies to "softmax" only and must be 0 for other forms. ``scale_norm`` is not supported.
        config: the mathematics.

    Parameters have timm's names: ``qkv`` (D -> 2 H d + H d_v), ``proj`` (H d_v -> D).
    """

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
        *,
        config: AttentionConfig,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.config = config
        config.check_heads(dim, num_heads)
        if scale_norm:
            raise ValueError("scale_norm=True is not supported: build the transformer without scale_attn_norm")
        form = config.form
        if attn_drop and not form.takes_dropout:
            raise ValueError(f"attn_drop is {attn_drop}; attention_type '{config.attention_type}' needs 0")
        self.num_heads = num_heads
        self.head_dim = config.query_key_head_dim or dim // num_heads
        self.value_head_dim = config.value_head_dim or dim // num_heads
        self.scale = config.logit_scale / math.sqrt(self.head_dim)
        self.attn_drop = attn_drop
        self.backend: str | None = None
        self.generator: Generators = None

        self.query_key_dim = num_heads * self.head_dim if form.has_queries else 0
        value_dim = num_heads * self.value_head_dim
        self.qkv = nn.Linear(dim, 2 * self.query_key_dim + value_dim, bias=qkv_bias, **factory)
        self.q_norm = norm_layer(self.head_dim, **factory) if qk_norm and norm_layer else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **factory) if qk_norm and norm_layer else nn.Identity()
        self.proj = nn.Linear(value_dim, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        learns_scale = config.learned_logit_scale and form.has_queries
        self.log_scale = nn.Parameter(torch.zeros(num_heads, **factory)) if learns_scale else None
        for name, part in (form.parts(config, self.head_dim, num_heads, factory) if form.parts else {}).items():
            self.add_module(name, part)

    @classmethod
    def bound_to(cls, config: AttentionConfig) -> type[BinaryAttention]:
        """What ``attn_layer=`` of timm's transformers needs: a class that makes attention with this configuration."""

        class Bound(cls):  # type: ignore[valid-type, misc]
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, config=config, **options)
                # No module holds this class, so its instances could not be pickled.
                self.__class__ = cls  # type: ignore[assignment]

        return Bound

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, D) -> (B, N, D).

        Raises:
            ValueError: a mask is given; every token attends to every token.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("attention masks are not supported: call without attn_mask and is_causal")
        query, key, value = self.project(x)
        out = self.config.form.attend(self, query, key, value)  # (B, H, N, d_v)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(*x.shape[:2], -1)))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key (B, H, N, d) and value (B, H, N, d_v)."""
        qk, heads = self.query_key_dim, self.num_heads
        query, key, value = self.qkv(x).split([qk, qk, heads * self.value_head_dim], dim=-1)
        query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
        return self.q_norm(query), self.k_norm(key), value

    def balance(self, x: Tensor, window: float | None = None) -> tuple[Tensor, Tensor]:
        """Queries or keys (B, H, N, d), centred and normalised as the configuration says, and their sign bits.

        Args:
            x: queries or keys from :meth:`project`.
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


class SharedAttention(nn.Module):
    """Replaces a block's attention by that of another block, so that all share one module (``share_attention``)."""

    def __init__(self, owner: BinaryAttention) -> None:
        super().__init__()
        # The tuple keeps torch from registering (and saving) the owner's parameters a second time.
        self._owner = (owner,)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Same as the owner's forward."""
        return self._owner[0](x, attn_mask, is_causal)


class AttentionControl:
    """Settings of a network with :class:`BinaryAttention` that can change after it was built; none of them is saved."""

    def set_attention_backend(self, backend: str | None) -> None:
        """Choose the code that computes 1-bit attention; None leaves the choice to the operator.

        Raises:
            BackendUnavailableError: the backend cannot run here.
        """
        if backend is not None:
            select_backend(backend, self.device.type)  # type: ignore[attr-defined]
        for attention in attention_modules(self):  # type: ignore[arg-type]
            attention.backend = backend

    def set_attention_generator(self, generator: Generators) -> None:
        """Set what "hamming_bernoulli" draws from, for repeatable samples.

        Args:
            generator: on any device; one for the batch, or one for each sample, whose output then does not depend on the
                others of its batch. None: torch's own.
        """
        for attention in attention_modules(self):  # type: ignore[arg-type]
            attention.generator = generator

    def _checkpointed(self, block: nn.Module, x: Tensor) -> Tensor:
        """The output of a block under gradient checkpointing.

        Before torch computes a block for the second time, it restores its own generators, but not those of
        :meth:`set_attention_generator`: so they are copied here, and the second time draws from the copies.
        """
        if torch.compiler.is_compiling():
            return self._gradient_checkpointing_func(block, x)  # type: ignore[attr-defined]
        attentions = attention_modules(self)  # type: ignore[arg-type]
        before = copy.deepcopy([attention.generator for attention in attentions])
        first = True

        def run(x: Tensor) -> Tensor:
            nonlocal first
            if first:
                first = False
                return block(x)
            with _generators(attentions, copy.deepcopy(before)):
                return block(x)

        return self._gradient_checkpointing_func(run, x)  # type: ignore[attr-defined]


def attention_modules(model: nn.Module) -> list[BinaryAttention]:
    """Every :class:`BinaryAttention` in a model."""
    return [module for module in model.modules() if isinstance(module, BinaryAttention)]


@contextmanager
def drawing_from(model: nn.Module, generator: Generators) -> Iterator[None]:
    """Within this context a model draws from these generators (:meth:`AttentionControl.set_attention_generator`)."""
    attentions = attention_modules(model)
    with _generators(attentions, [generator] * len(attentions)):
        yield


@contextmanager
def _generators(attentions: Sequence[BinaryAttention], generators: Sequence[Generators]) -> Iterator[None]:
    """Within this context each attention has the generators given for it."""
    before = [attention.generator for attention in attentions]
    try:
        for attention, generator in zip(attentions, generators, strict=True):
            attention.generator = generator
        yield
    finally:
        for attention, generator in zip(attentions, before, strict=True):
            attention.generator = generator


def attention_backend(model: Any, device_type: str) -> str | None:
    """Name of the backend that computes a model's 1-bit attention; None if the model has no such attention."""
    kind = getattr(model.config, "attention_type", None)
    if kind is None or not attention_form(kind).has_bits:
        return None
    requested = next((m.backend for m in model.modules() if isinstance(m, BinaryAttention)), None)
    return select_backend(requested, device_type).name
