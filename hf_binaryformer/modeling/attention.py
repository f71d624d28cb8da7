"""The attention module that replaces timm's attention, in every form of the paper (Sec. 2)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_binaryformer.kernels.backends import select_backend
from hf_binaryformer.modeling.attention_configuration import AttentionConfig, attention_form
from hf_binaryformer.modeling.attention_core import Generators, ScoredAttention


class BinaryAttention(ScoredAttention):
    """Multi-head self-attention; ``config.attention_type`` picks the form of the scores before the softmax.

    Forms and learned parts are those of :class:`ScoredAttention`.

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
        config.check_heads(dim, num_heads)
        super().__init__(config, num_heads, config.query_key_head_dim or dim // num_heads, attn_drop)
        if scale_norm:
            raise ValueError("scale_norm=True is not supported: build the transformer without scale_attn_norm")
        self.value_head_dim = config.value_head_dim or dim // num_heads
        self.query_key_dim = num_heads * self.head_dim if config.form.has_queries else 0
        value_dim = num_heads * self.value_head_dim
        self.qkv = nn.Linear(dim, 2 * self.query_key_dim + value_dim, bias=qkv_bias, **factory)
        self.q_norm = norm_layer(self.head_dim, **factory) if qk_norm and norm_layer else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **factory) if qk_norm and norm_layer else nn.Identity()
        self.proj = nn.Linear(value_dim, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.add_learned_parts(factory)

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


def attention_modules(model: nn.Module) -> list[ScoredAttention]:
    """Every :class:`BinaryAttention` in a model, and every :class:`AttentionCore` in attention that was converted."""
    return [module for module in model.modules() if isinstance(module, ScoredAttention)]


@contextmanager
def drawing_from(model: nn.Module, generator: Generators) -> Iterator[None]:
    """Within this context a model draws from these generators (:meth:`AttentionControl.set_attention_generator`)."""
    attentions = attention_modules(model)
    with _generators(attentions, [generator] * len(attentions)):
        yield


@contextmanager
def _generators(attentions: Sequence[ScoredAttention], generators: Sequence[Generators]) -> Iterator[None]:
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
    requested = next((m.backend for m in attention_modules(model)), None)
    return select_backend(requested, device_type).name
