"""accelerate launch -m hf_binaryformer.training.segmentation --recipe hippocampus --data D --output runs/hippocampus

In a clone: ``scripts/finetune.py``. Trains a segmentation network on a folder of ``binaryformer prepare``, then segments
whole volumes of a split and prints Dice for each label beside the prior-atlas baseline. All defaults are in
``recipes/<recipe>.yaml`` beside this module; ``--set train.iterations=100`` overrides one. Five settings choose the
form of attention; that of the paper is ``--set model.attention_type=hamming --set model.bit_gradient=null --set
model.query_key_centering=none --set model.query_key_norm=none --set model.learned_logit_scale=false``. A training starts from
random weights, from a timm model where the recipe says so (``from_timm``), or from a checkpoint that
``model.from_pretrained`` names by its folder, short name or Hub id. ``model.grow_from`` names a smaller network,
whose weights are spread over the larger one (:mod:`~hf_binaryformer.training.growing`). With ``--resume`` a run
continues from its own newest checkpoint. On one machine with one number of threads, it ends with the same weights as
a run without the interruption.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from monai.losses import DiceCELoss
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.utils.data import Dataset

from hf_binaryformer.data.prepared_folder import PreparedFolder
from hf_binaryformer.data.slices import SliceSamples
from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.image_processing import BinaryFormerImageProcessor
from hf_binaryformer.modeling.networks import BinaryFormerForSemanticSegmentation
from hf_binaryformer.pipelines.metrics import METRICS
from hf_binaryformer.pipelines.segmentation import VolumeSegmentationPipeline
from hf_binaryformer.pipelines.whole_files import whole_folder, write_text
from hf_binaryformer.training.checkpoints import only_run_in
from hf_binaryformer.training.dry_run import RandomSamples, rehearse
from hf_binaryformer.training.growing import grow_weights
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
from hf_binaryformer.training.recipes import keep_recipe, load_recipe, refused_in_one_line
from hf_binaryformer.training.run_log import save_model, write_summary
from hf_binaryformer.training.segmentation_scores import evaluate_split, validation_figures
from hf_binaryformer.training.warm_start import load_weights


def build_model(recipe: dict[str, Any], label_names: dict[int, str]) -> tuple[Any, Any]:
    """Network and image processor of a recipe; the k-th smallest label is class k of the network."""
    with refused_in_one_line("processor"):
        processor = BinaryFormerImageProcessor(**recipe["processor"])
    values = sorted(label_names)
    fields = {
        "image_size": processor.image_size,
        "num_channels": processor.num_channels,
        "id2label": {index: label_names[value] for index, value in enumerate(values)},
        "label2id": {label_names[value]: index for index, value in enumerate(values)},
        "label_values": None if values == list(range(len(values))) else values,
        **recipe["model"],
    }
    timm_name, checkpoint = fields.pop("from_timm", None), fields.pop("timm_checkpoint", None)
    pretrained = fields.pop("from_pretrained", None)
    smaller, noise = fields.pop("grow_from", None), fields.pop("growth_noise", 0.0)
    with refused_in_one_line("processor", "model"):
        if timm_name and not pretrained:
            model = BinaryFormerForSemanticSegmentation.from_timm(timm_name, checkpoint=checkpoint, **fields)
            return model, processor
        config = BinaryFormerConfig(**fields)
    if pretrained:
        return load_weights(pretrained, config), processor
    if smaller:
        return grow_weights(smaller, config, noise), processor
    return BinaryFormerForSemanticSegmentation(config), processor


def build_criterion(train: dict[str, Any]) -> DiceCELoss:
    """Dice and cross-entropy of logits (B, labels, H, W) and labels (B, 1, H, W)."""
    return DiceCELoss(
        include_background=False,
        to_onehot_y=True,
        softmax=True,
        batch=train["batch_dice"],
        lambda_dice=train["dice_weight"],
    )


def build_task(recipe: dict[str, Any], folder: PreparedFolder | None, accelerator: Accelerator) -> tuple[Task, Any]:
    """The training task and its image processor; without a folder it uses random windows, for a dry run."""
    train = recipe["train"]
    count = train["iterations"] * train["batch_size"]
    samples: Dataset
    if folder is None:
        classes = recipe["data"]["classes"]
        recipe["model"] |= {"timm_checkpoint": False, "from_pretrained": None, "grow_from": None}
        model, processor = build_model(recipe, {label: str(label) for label in range(classes)})
        size = tuple(processor.image_size)
        samples = RandomSamples((processor.num_channels, *size), size, classes, count)
    else:
        model, processor = build_model(recipe, folder.label_names)
        samples = SliceSamples(
            folder.split("train"), processor, recipe["augment"], train["seed"], count, folder.label_names
        )
        folder.check_unchanged()
        processor.foreground_extent = list(samples.foreground_extent)
        if recipe["augment"].get("mirror") and processor.mirror is None:
            processor.mirror = False  # pipelines may be asked to average with the mirror image
    criterion = build_criterion(train)

    def losses(network: nn.Module, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        with accelerator.autocast():
            logits = network(batch["pixel_values"]).logits.float()
        labels = batch["labels"][:, None]
        if train["batch_dice"] and accelerator.num_processes > 1:
            # Dice is that of the whole batch: every process computes it on the samples of all processes. The mean of
            # their gradients is then the gradient of the whole batch.
            logits, labels = torch.cat(all_gather(logits.contiguous())), accelerator.gather(labels)
        return {"loss": criterion(logits, labels)}

    def validate() -> dict[str, float]:
        assert folder is not None
        pipeline = VolumeSegmentationPipeline(model, processor)
        figures = validation_figures(pipeline, folder, train["validate_volumes"])
        folder.check_unchanged()
        return figures

    task = Task(
        model,
        build_optimizer(model, train),
        batches=lambda first: load_batches(samples, train, accelerator, first),
        losses=losses,
        validate=validate,
        figures=tuple(f"validation_{metric}" for metric in METRICS),
    )
    return task, processor


def main(
    recipe: Annotated[str, typer.Option(help="Name of a recipe, or the path of a .yaml file.")],
    data: Annotated[Path | None, typer.Option(help="Folder written by `binaryformer prepare`.")] = None,
    output: Output = None,
    resume: Resume = False,
    evaluate: Annotated[str, typer.Option(help="Split to segment at the end: validation, test or none.")] = "test",
    stop_after: StopAfter = None,
    dry_run: DryRun = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
    overrides: Overrides = None,
) -> None:
    """Train, save, evaluate."""
    settings = load_recipe(recipe, overrides or [])
    if dry_run:
        return rehearse(settings["train"], lambda accelerator: build_task(settings, None, accelerator)[0])
    if data is None or output is None:
        raise typer.BadParameter(DATA_NEEDED)
    folder = PreparedFolder(data)
    if not folder.split("train"):
        raise typer.BadParameter(f"{data} has no volume in the split 'train'")
    if evaluate != "none" and not folder.split(evaluate):
        raise typer.BadParameter(
            f"--evaluate {evaluate}: {data} has no volume in that split; give another one, or none"
        )
    if settings["train"]["validate_every"] and not folder.split("validation"):
        raise typer.BadParameter(f"validate_every is set, but {data} has no volume in the split 'validation'")
    accelerator = start(settings["train"], output)
    if accelerator.is_main_process:
        check_target(push_to_hub, private, stop_after)
    with only_run_in(output, accelerator.is_main_process):
        keep_recipe(settings, output, resume, accelerator.is_main_process)
        task, processor = build_task(settings, folder, accelerator)
        run(task, settings["train"], accelerator, output, resume, stop_after)
        if not accelerator.is_main_process:
            return
        model = task.model.eval()
        with whole_folder(output / "model") as place:
            save_model(model, place, settings["train"]["save_dtype"])
            processor.save_pretrained(place)
        write_summary(settings, "train", output, accelerator.device)
        results = None
        if evaluate != "none":
            results = evaluate_split(output / "model", folder, evaluate, baseline=True)
            folder.check_unchanged()
            write_text(output / "results.json", json.dumps(results, indent=2) + "\n")
    if push_to_hub:
        publish("segmentation", output / "model", push_to_hub, output, recipe, [data], results)


if __name__ == "__main__":
    typer.run(main)
