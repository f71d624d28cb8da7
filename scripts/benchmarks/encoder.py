"""The whole ViT-S/8 encoder with float attention against Hamming attention, for ``attention.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_binaryformer.modeling.attention import attention_modules
from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.encoder import build_encoder
from measure import DTYPES, Subject, one_pass
from subjects import SEED

# Name, attention_type, bit_gradient, whether the values are reduced; the first is what the others are compared with.
VARIANTS = (
    ("softmax (sdpa)", "softmax", None, False),
    ("hamming", "hamming", None, True),
    ("hamming", "hamming", None, False),
    ("sign, ternary", "sign", "ternary", True),
)
# Largest ratio of the longest to the shortest side of an image with a class token.
LONGEST_ASPECT = 2.0


def image_of(tokens: int, patch_size: int) -> tuple[int, int, bool]:
    """Image height and width in pixels, and whether a class token goes first, that make this many tokens.

    1601 tokens are 320 x 320 pixels and the class token. 7680 tokens are 640 x 768 pixels without a class token,
    because 7679 has no such factors.
    """
    for patches, class_token in ((tokens - 1, True), (tokens, False)):
        rows = max((r for r in range(1, int(patches**0.5) + 1) if patches % r == 0), default=0)
        if rows and (patches / rows <= LONGEST_ASPECT * rows or not class_token):
            return rows * patch_size, patches // rows * patch_size, class_token
    raise ValueError(f"{tokens} tokens: expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Encoder(Subject):
    """The encoder of ``BinaryFormerConfig``'s defaults (ViT-S/8) on one image; bf16 is autocast over float32 parameters."""

    attention_type: Any
    bit_gradient: Any
    backend: str
    blocks: int

    def fields(self) -> dict[str, Any]:
        """Further fields of the configuration."""
        return {}

    def prepare(self) -> Callable[[], object]:
        """Forward, or forward and backward to every parameter (no optimizer)."""
        torch.manual_seed(SEED)
        defaults = BinaryFormerConfig()
        height, width, class_token = image_of(self.tokens, defaults.patch_size)
        config = BinaryFormerConfig(
            image_size=[height, width],
            class_token=class_token,
            attention_type=self.attention_type,
            bit_gradient=self.bit_gradient,
            value_head_dim=self.value_dim,
            num_hidden_layers=self.blocks,
            **self.fields(),
        )
        model = build_encoder(config).to(self.device)
        for module in attention_modules(model):
            module.backend = self.backend
        image = torch.randn(1, config.num_channels, height, width, device=self.device)

        def forward() -> Tensor:
            with torch.autocast(self.device, DTYPES["bfloat16"], enabled=self.dtype == "bfloat16"):
                out = model.forward_features(image)
            if out.shape[1] != self.tokens:
                raise AssertionError(f"the encoder made {out.shape[1]} tokens, {self.tokens} were asked for")
            return out

        return one_pass(forward, list(model.parameters()), self.step)


def encoder_subjects(tokens: int, backend: str, blocks: int | None, step_limit: int) -> list[Subject]:
    """Every variant in both types; the training step only up to ``step_limit`` tokens."""
    config = BinaryFormerConfig()
    return [
        Encoder(
            name=f"encoder, {name}",
            family="encoder",
            tokens=tokens,
            head_dim=config.head_dim,
            value_dim=config.value_head_dim if reduced else config.head_dim,
            dtype=dtype,
            step=step,
            is_baseline=attention_type == "softmax",
            is_float=attention_type == "softmax",
            attention_type=attention_type,
            bit_gradient=bit_gradient,
            backend=backend,
            blocks=blocks or config.num_hidden_layers,
        )
        for dtype in DTYPES
        for step in (False, True)
        if not step or tokens <= step_limit
        for name, attention_type, bit_gradient, reduced in VARIANTS
    ]
