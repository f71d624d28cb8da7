"""BinaryFormer: transformers whose query-key product is 1 bit wide, for medical images.

Public names are loaded when they are first used, so that ``import hf_binaryformer`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_binaryformer.modeling.configuration import BinaryFormerConfig
    from hf_binaryformer.modeling.encoder import binarize_attention
    from hf_binaryformer.modeling.image_processing import BinaryFormerImageProcessor
    from hf_binaryformer.modeling.modeling import (
        BinaryFormerForImageClassification,
        BinaryFormerForSemanticSegmentation,
        BinaryFormerModel,
    )
    from hf_binaryformer.modeling.pretrained import from_pretrained
    from hf_binaryformer.pipelines.segmentation import VolumeSegmentationPipeline

__version__ = "0.1.0"

_HOME = {
    "BinaryFormerConfig": "modeling.configuration",
    "BinaryFormerForImageClassification": "modeling.modeling",
    "BinaryFormerForSemanticSegmentation": "modeling.modeling",
    "BinaryFormerImageProcessor": "modeling.image_processing",
    "BinaryFormerModel": "modeling.modeling",
    "VolumeSegmentationPipeline": "pipelines.segmentation",
    "binarize_attention": "modeling.encoder",
    "from_pretrained": "modeling.pretrained",
}

__all__ = [
    "BinaryFormerConfig",
    "BinaryFormerForImageClassification",
    "BinaryFormerForSemanticSegmentation",
    "BinaryFormerImageProcessor",
    "BinaryFormerModel",
    "VolumeSegmentationPipeline",
    "binarize_attention",
    "from_pretrained",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hf_binaryformer' has no attribute '{name}'")
    value = getattr(import_module(f"hf_binaryformer.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
