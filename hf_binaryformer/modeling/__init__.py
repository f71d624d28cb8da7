"""Transformers models with 1-bit attention: configuration, attention, encoder, decoder, image processor, checkpoints.

``from hf_binaryformer.modeling import BinaryAttention`` gives the attention module alone, for use in other networks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_binaryformer.modeling.attention import BinaryAttention
    from hf_binaryformer.modeling.attention_configuration import AttentionConfig

__all__ = ["AttentionConfig", "BinaryAttention"]


def __getattr__(name: str) -> Any:
    # Imported on first use, so that the parts of this package that need no torch are fast to import.
    if name not in __all__:
        raise AttributeError(f"module 'hf_binaryformer.modeling' has no attribute '{name}'")
    from hf_binaryformer.modeling import attention

    return getattr(attention, name)
