"""accelerate launch -m hf_binaryformer.training.classification --recipe mnist-pixels --data D --output runs/pixels

In a clone: ``scripts/train_pixels.py``. Trains a classifier on the published files of MNIST, Fashion-MNIST or CIFAR-10
(binary version). Its tokens are the single pixels of small images, each with its two coordinates (paper Appendix B,
Table 2). All defaults are in ``recipes/pixels/<recipe>.yaml`` beside this module; ``--set train.iterations=100``
overrides one. With ``--resume`` a run continues from its newest checkpoint. On one machine with one number of
threads, it ends with the same weights as a run without the interruption.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import ViTImageProcessor

from hf_binaryformer.data.pixels import PixelSamples, load_splits, scale
from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.networks import BinaryFormerForImageClassification
from hf_binaryformer.pipelines.whole_files import whole_folder, write_text
from hf_binaryformer.training.checkpoints import only_run_in
from hf_binaryformer.training.dry_run import RandomSamples, rehearse
from hf_binaryformer.training.loop import Task, load_batches, run, start
from hf_binaryformer.training.optimization import build_optimizer
from hf_binaryformer.training.options import (
    DATA_NEEDED,
    DryRun,
    Output,
    Overrides,
    Private,
    PushToHub,
    Resume,
    StopAfter,
)
from hf_binaryformer.training.publishing import check_target, publish
from hf_binaryformer.training.recipes import PIXEL_RECIPES, keep_recipe, load_recipe, refused_in_one_line
from hf_binaryformer.training.run_log import save_model, write_summary


@torch.no_grad()
def accuracy(
    model: nn.Module, images: np.ndarray, labels: np.ndarray, recipe: dict[str, Any], accelerator: Accelerator
) -> float:
    """Share of the images (n, channels, h, w) whose likeliest class is right, 0 to 1."""
    right, size = 0, recipe["train"]["validation_batch_size"]
    for first in range(0, len(images), size):
        x = scale(images[first : first + size], recipe["data"]).to(accelerator.device)
        with accelerator.autocast():
            predicted = model(x).logits.argmax(-1).cpu()
        right += int((predicted == torch.from_numpy(labels[first : first + size])).sum())
    return right / len(images)


def build_task(
    recipe: dict[str, Any], splits: dict[str, tuple[np.ndarray, np.ndarray]] | None, accelerator: Accelerator
) -> Task:
    """The training task; without splits it uses random images, for a dry run."""
    train, data = recipe["train"], recipe["data"]
    count = train["iterations"] * train["batch_size"]
    samples: Dataset
    if splits is None:
        shape = tuple(data["image_shape"])
        samples = RandomSamples(shape, (), data["classes"], count)
    else:
        images, labels = splits["train"]
        shape = images.shape[1:]
        samples = PixelSamples(images, labels, data, train["seed"], count)
    channels, height, width = shape
    fields = {"image_size": [height, width], "num_channels": channels, "num_labels": data["classes"]}
    with refused_in_one_line("model"):
        config = BinaryFormerConfig(**fields, **recipe["model"])
    model = BinaryFormerForImageClassification(config)

    def losses(network: nn.Module, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        with accelerator.autocast():
            logits = network(batch["pixel_values"]).logits
        return {"loss": F.cross_entropy(logits.float(), batch["labels"])}

    def validate() -> dict[str, float]:
        assert splits is not None
        held_images, held_labels = (part[: train["validate_images"]] for part in splits["validation"])
        return {"validation_accuracy": accuracy(model, held_images, held_labels, recipe, accelerator)}

    return Task(
        model,
        build_optimizer(model, train),
        batches=lambda first: load_batches(samples, train, accelerator, first),
        losses=losses,
        validate=validate,
        figures=("validation_accuracy",),
    )


def build_processor(data: dict[str, Any], channels: int) -> ViTImageProcessor:
    """An image processor that scales images (files or arrays of bytes) as :func:`pixels.scale` does."""
    return ViTImageProcessor(do_resize=False, image_mean=[data["mean"]] * channels, image_std=[data["std"]] * channels)


def main(
    recipe: Annotated[str, typer.Option(help="Name of a recipe, or the path of a .yaml file.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder with the published files of MNIST, Fashion-MNIST or CIFAR-10.")
    ] = None,
    output: Output = None,
    resume: Resume = False,
    evaluate: Annotated[str, typer.Option(help="Split to classify at the end: validation, test or none.")] = "test",
    stop_after: StopAfter = None,
    dry_run: DryRun = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
    overrides: Overrides = None,
) -> None:
    """Train, save, evaluate."""
    settings = load_recipe(recipe, overrides or [], PIXEL_RECIPES)
    if dry_run:
        return rehearse(settings["train"], lambda accelerator: build_task(settings, None, accelerator))
    if data is None or output is None:
        raise typer.BadParameter(DATA_NEEDED)
    splits = load_splits(data, settings["data"])
    if evaluate not in (*splits, "none"):
        raise typer.BadParameter(f"--evaluate {evaluate}: expected {', '.join(splits)} or none")
    accelerator = start(settings["train"], output)
    if accelerator.is_main_process:
        check_target(push_to_hub, private, stop_after)
    with only_run_in(output, accelerator.is_main_process):
        keep_recipe(settings, output, resume, accelerator.is_main_process)
        task = build_task(settings, splits, accelerator)
        run(task, settings["train"], accelerator, output, resume, stop_after)
        if not accelerator.is_main_process:
            return
        model = task.model.eval()
        with whole_folder(output / "model") as place:
            save_model(model, place, settings["train"]["save_dtype"])
            build_processor(settings["data"], model.config.num_channels).save_pretrained(place)
        write_summary(settings, "train", output, accelerator.device)
        results = None
        if evaluate != "none":
            figure = accuracy(model, *splits[evaluate], settings, accelerator)
            results = {"split": evaluate, "images": len(splits[evaluate][0]), "accuracy": round(figure, 4)}
            write_text(output / "results.json", json.dumps(results, indent=2) + "\n")
            print(json.dumps(results))
    if push_to_hub:
        publish("classification", output / "model", push_to_hub, output, recipe, [data], results)


if __name__ == "__main__":
    typer.run(main)
