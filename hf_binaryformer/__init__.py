"""BinaryFormer: transformers whose query-key product is 1 bit wide, for medical images.

Public names are loaded when they are first used, so that ``import hf_binaryformer`` is fast.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_binaryformer.modeling.backbone import BinaryFormerBackbone
    from hf_binaryformer.modeling.binarize import binarize_attention
    from hf_binaryformer.modeling.configuration import BinaryFormerConfig
    from hf_binaryformer.modeling.image_processing import BinaryFormerImageProcessor
    from hf_binaryformer.modeling.networks import (
        BinaryFormerForImageClassification,
        BinaryFormerForSemanticSegmentation,
        BinaryFormerModel,
    )
    from hf_binaryformer.modeling.vq_autoencoder import BinaryVQModel
    from hf_binaryformer.modeling.vq_transformer import BinaryVQTransformer3DModel
    from hf_binaryformer.pipelines.absorbing_scheduler import AbsorbingScheduler
    from hf_binaryformer.pipelines.loading import from_pretrained
    from hf_binaryformer.pipelines.segmentation import VolumeSegmentationPipeline
    from hf_binaryformer.pipelines.vq_inpainting import BinaryVQInpaintPipeline
    from hf_binaryformer.pipelines.vq_synthesis import BinaryVQPipeline

__version__ = "0.1.0"

# diffusers imports onnxruntime where it is installed, which would open a telemetry session.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOME = {
    "AbsorbingScheduler": "pipelines.absorbing_scheduler",
    "BinaryFormerBackbone": "modeling.backbone",
    "BinaryFormerConfig": "modeling.configuration",
    "BinaryFormerForImageClassification": "modeling.networks",
    "BinaryFormerForSemanticSegmentation": "modeling.networks",
    "BinaryFormerImageProcessor": "modeling.image_processing",
    "BinaryFormerModel": "modeling.networks",
    "BinaryVQInpaintPipeline": "pipelines.vq_inpainting",
    "BinaryVQModel": "modeling.vq_autoencoder",
    "BinaryVQPipeline": "pipelines.vq_synthesis",
    "BinaryVQTransformer3DModel": "modeling.vq_transformer",
    "VolumeSegmentationPipeline": "pipelines.segmentation",
    "binarize_attention": "modeling.binarize",
    "from_pretrained": "pipelines.loading",
}

__all__ = [
    "AbsorbingScheduler",
    "BinaryFormerBackbone",
    "BinaryFormerConfig",
    "BinaryFormerForImageClassification",
    "BinaryFormerForSemanticSegmentation",
    "BinaryFormerImageProcessor",
    "BinaryFormerModel",
    "BinaryVQInpaintPipeline",
    "BinaryVQModel",
    "BinaryVQPipeline",
    "BinaryVQTransformer3DModel",
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


# transformers is told of this package when it is imported itself.
import_module("hf_binaryformer.registration").install()
