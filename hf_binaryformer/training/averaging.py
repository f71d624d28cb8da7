"""The mean of several trainings' weights: one checkpoint that has most of what each of them learned.

It works where trainings start from the same weights and see different data (Wortsman et al., "Model soups", ICML 2022), and lets
machines or cores train side by side without exchanging gradients. The program is ``scripts/average_weights.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.image_processing import BinaryFormerImageProcessor
from hf_binaryformer.modeling.networks import BinaryFormerForSemanticSegmentation
from hf_binaryformer.training.run_log import save_model

# What may differ between checkpoints of one network: where it lies, and what was measured with its weights or data.
OWN = {"_name_or_path", "transformers_version", "quality", "foreground_extent"}


def mean_state(models: list[nn.Module]) -> dict[str, Tensor]:
    """Mean of each tensor over the networks, in float64; tensors of whole numbers are the first network's."""
    states = [model.state_dict() for model in models]
    return {
        key: torch.stack([state[key].double() for state in states]).mean(0).to(first.dtype)
        if first.is_floating_point()
        else first
        for key, first in states[0].items()
    }


def main(
    checkpoints: Annotated[list[Path], typer.Argument(help="Folders of checkpoints of one network, two or more.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder of the mean.")],
    dtype: Annotated[str, typer.Option(help="Number format of its weights.")] = "float16",
) -> None:
    """Average the weights of segmentation networks that started from the same weights."""
    if len(checkpoints) < 2:
        raise typer.BadParameter("one checkpoint has no mean: give two or more")
    if output.exists():
        raise typer.BadParameter(f"{output} exists: give a new folder")
    models = [BinaryFormerForSemanticSegmentation.from_pretrained(path, dtype=torch.float32) for path in checkpoints]
    processors = [BinaryFormerImageProcessor.from_pretrained(path) for path in checkpoints]
    settings = [_settings(model.config, one) for model, one in zip(models, processors, strict=True)]
    for path, other in zip(checkpoints, settings, strict=True):
        if differ := sorted(key for key in settings[0].keys() | other if settings[0].get(key) != other.get(key)):
            raise typer.BadParameter(
                f"{path} is no checkpoint of {checkpoints[0]}'s network: {', '.join(differ)} differ"
            )
    model, processor = models[0], processors[0]
    model.load_state_dict(mean_state(models))
    model.config.quality = None
    extents = [one.foreground_extent for one in processors if one.foreground_extent]
    processor.foreground_extent = np.min(extents, axis=0).tolist() if extents else None
    save_model(model, output, dtype)
    processor.save_pretrained(output)
    typer.echo(f"mean of {len(models)} checkpoints -> {output}")


def _settings(config: BinaryFormerConfig, processor: BinaryFormerImageProcessor) -> dict[str, Any]:
    return {key: value for key, value in (config.to_dict() | processor.to_dict()).items() if key not in OWN}
