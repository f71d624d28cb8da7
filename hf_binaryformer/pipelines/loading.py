"""One function that loads any checkpoint of the project: a network, or a pipeline with all its components."""

from __future__ import annotations

import os
from typing import Any

from hf_binaryformer.modeling.pretrained import (
    HUB_OPTIONS,
    MODEL_CONFIG,
    PIPELINE_CONFIG,
    CheckpointError,
    read_json,
    resolve_checkpoint,
)


def from_pretrained(name: str | os.PathLike[str], **options: Any) -> Any:
    """The model or pipeline behind a short name, a folder, or a Hub id.

    Args:
        name: see :func:`~hf_binaryformer.modeling.pretrained.resolve_checkpoint`.
        options: handed to the class's own ``from_pretrained``.

    Returns:
        An instance of the class that the checkpoint was saved from; models are in evaluation mode.

    Raises:
        CheckpointNotFoundError: no such checkpoint.
        CheckpointError: it cannot be used.

    Example:
        >>> model = from_pretrained("binaryformer-brain")
        >>> model.config.attention_type
        'sign'
    """
    hub_options = {key: options.pop(key) for key in HUB_OPTIONS if key in options}
    folder = resolve_checkpoint(name, **hub_options)
    is_pipeline = (folder / PIPELINE_CONFIG).is_file()
    config = read_json(folder / (PIPELINE_CONFIG if is_pipeline else MODEL_CONFIG))
    # transformers writes "architectures", diffusers "_class_name".
    from_transformers = not is_pipeline and "architectures" in config
    named = config["architectures"] if from_transformers else config.get("_class_name")
    saved_from = str(named[0] if isinstance(named, list) and named else named)
    classes = {kind.__name__: kind for kind in own_classes(is_pipeline, from_transformers)}
    if saved_from not in classes:
        raise CheckpointError(f"{folder} holds a '{saved_from}', expected one of this package's own classes")
    return classes[saved_from].from_pretrained(folder, **options)


def own_classes(pipelines: bool, from_transformers: bool) -> tuple[Any, ...]:
    """The classes of one kind; only that kind's libraries are imported."""
    if pipelines:
        from hf_binaryformer.pipelines.vq_inpainting import BinaryVQInpaintPipeline
        from hf_binaryformer.pipelines.vq_synthesis import BinaryVQPipeline

        return BinaryVQInpaintPipeline, BinaryVQPipeline
    if from_transformers:
        from hf_binaryformer.modeling.networks import (
            BinaryFormerForImageClassification,
            BinaryFormerForSemanticSegmentation,
            BinaryFormerModel,
        )

        return BinaryFormerForImageClassification, BinaryFormerForSemanticSegmentation, BinaryFormerModel
    from hf_binaryformer.modeling.vq_autoencoder import BinaryVQModel
    from hf_binaryformer.modeling.vq_transformer import BinaryVQTransformer3DModel
    from hf_binaryformer.pipelines.absorbing_scheduler import AbsorbingScheduler

    return BinaryVQModel, BinaryVQTransformer3DModel, AbsorbingScheduler
