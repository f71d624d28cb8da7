"""accelerate launch -m hf_binaryformer.training.autoencoder --recipe brain-small --data data/brain --output runs/vqae

In a clone: ``scripts/train_vqae.py``. Trains the vector-quantised autoencoder on crops of volumes and writes it to
``<output>/vqmodel``. The PSNR of its reconstructions of whole volumes of the validation split is written beside it.
Data are folders of ``binaryformer prepare`` or any folder of NIfTI files. Further ``--data`` folders are mixed in with
the shares in the recipe. All defaults are in ``recipes/vq`` beside this module; ``--set vqae.iterations=100`` overrides
one. With ``--resume`` a run continues from its newest checkpoint.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from accelerate import Accelerator
from torch import Tensor, nn

from hf_binaryformer.data.patches import NestedDropout, PatchSamples, image_paths, load_all
from hf_binaryformer.modeling.vq_autoencoder import BinaryVQModel
from hf_binaryformer.modeling.vq_losses import PerceptualLoss, SliceLoss, reconstruction_loss
from hf_binaryformer.pipelines.vq_sampling import place_on_grid
from hf_binaryformer.pipelines.whole_files import whole_folder, write_text
from hf_binaryformer.training.checkpoints import only_run_in
from hf_binaryformer.training.dry_run import rehearse
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
from hf_binaryformer.training.recipes import VQ_RECIPES, keep_recipe, load_recipe, refused_in_one_line
from hf_binaryformer.training.run_log import write_summary


def load_sources(recipe: dict[str, Any], folders: list[Path], split: str, show: bool) -> list[list[np.ndarray]]:
    """Scaled volumes of a split of each folder.

    Raises:
        typer.BadParameter: more folders than the recipe has shares for, or a folder without volumes of the split.
    """
    data = recipe["data"]
    if len(folders) > len(data["sources"]):
        raise typer.BadParameter(f"{len(folders)} --data, but data.sources in the recipe has {len(data['sources'])}")
    sources = []
    for folder in folders:
        paths = image_paths(folder, split, data["validation_fraction"], recipe["vqae"]["seed"])
        if not paths:
            raise typer.BadParameter(f"{folder} has no volume for the split '{split}'")
        sources.append(load_all(paths, recipe["vqmodel"], show))
    return sources


def untrained_slice_loss() -> SliceLoss:
    """A perceptual loss of VGG16's size with untrained weights."""
    from torchvision.models import vgg16

    features = vgg16(weights=None).features.requires_grad_(False)

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        network = features.to(prediction.device)
        a, b = (network(t.expand(-1, 3, -1, -1)) for t in (prediction, target))
        return (a - b).square().mean()

    return loss


def build_task(
    recipe: dict[str, Any], folders: list[Path], held_out: list[np.ndarray], accelerator: Accelerator
) -> Task:
    """The training task, validated on scaled volumes; without folders it uses a volume of noise, for a dry run."""
    train = recipe["vqae"]
    with refused_in_one_line("vqmodel"):
        model = BinaryVQModel(**recipe["vqmodel"])
    perceptual = None
    if train["perceptual_loss"] != "none":
        # A dry run uses untrained weights that are as large as the paper's.
        kind = train["perceptual_loss"] if folders else untrained_slice_loss()
        perceptual = PerceptualLoss(kind).to(accelerator.device)
    if folders:
        sources = load_sources(recipe, folders, "train", accelerator.is_main_process)
    else:
        noise = np.random.default_rng(train["seed"]).random(recipe["data"]["volume_shape"], np.float32)
        sources = [[noise.astype(np.float16)]]
    count, ceiling = train["iterations"] * train["batch_size"], recipe["vqmodel"]["intensity_ceiling"]
    patches = PatchSamples(sources, recipe["data"], ceiling, train["seed"], count)
    samples = NestedDropout(patches, train["nested_dropout"], model.config.num_codebooks, train["seed"])

    def losses(network: nn.Module, pair: tuple[Tensor, Tensor], step: int) -> dict[str, Tensor]:
        batch, kept = pair
        with accelerator.autocast():
            result = network(batch, step >= train["quantize_after"], kept)
        parts = {
            "reconstruction": reconstruction_loss(result.sample, batch, train["reconstruction_loss"]),
            "commitment": train["commitment_weight"] * result.commitment_loss.float(),
        }
        if perceptual is not None:
            parts["perceptual"] = train["perceptual_weight"] * perceptual(result.sample, batch)
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}

    def measures() -> dict[str, float]:
        quantizer = model.quantizer
        figures = {"usage": quantizer.usage.min().item(), "perplexity": quantizer.perplexity.mean().item()}
        quantizer.reset_usage()
        return figures

    def validate() -> dict[str, float]:
        figures = evaluate(model, held_out, recipe)
        return {"validation_psnr": figures["psnr"], "validation_psnr_foreground": figures["psnr_foreground"]}

    return Task(
        model,
        build_optimizer(model, train),
        batches=lambda first: load_batches(samples, train, accelerator, first),
        losses=losses,
        measures=measures,
        validate=validate,
        figures=("validation_psnr", "validation_psnr_foreground"),
    )


@torch.no_grad()
def evaluate(model: BinaryVQModel, volumes: list[np.ndarray], recipe: dict[str, Any]) -> dict[str, Any]:
    """PSNR in dB (peak 1) of whole reconstructed volumes, over all voxels of the grid and over the foreground."""
    model.eval()
    rows = []
    for volume in volumes:
        placed, _ = place_on_grid(volume.astype(np.float32), recipe["data"]["volume_shape"])
        x = torch.from_numpy(placed)[None, None].to(model.device, model.dtype)
        error = (model.tiled_decode(model.encode(x).tokens).sample - x).square()
        foreground = x > recipe["data"]["foreground_threshold"]
        rows.append([-10 * math.log10(e.mean().item()) for e in (error, error[foreground])])
    whole, inside = np.mean(rows, axis=0).tolist()
    return {"volumes": len(rows), "psnr": round(whole, 3), "psnr_foreground": round(inside, 3)}


def main(
    recipe: Annotated[str, typer.Option(help="Name of a recipe, or the path of a .yaml file.")],
    data: Annotated[
        list[Path] | None, typer.Option(help="Folder of `binaryformer prepare` or of NIfTI files; may be repeated.")
    ] = None,
    output: Output = None,
    resume: Resume = False,
    stop_after: StopAfter = None,
    dry_run: DryRun = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
    overrides: Overrides = None,
) -> None:
    """Train, save, evaluate."""
    settings = load_recipe(recipe, overrides or [], VQ_RECIPES, "vqae")
    if settings["vqae"]["accumulation"] != 1 or settings["vqae"]["ema_decay"]:
        # Codebooks are updated by every batch of the encoder. With accumulation this would happen several times per
        # iteration; averaged weights would not match the updated codebooks.
        raise typer.BadParameter("the autoencoder's codebooks need accumulation 1 and ema_decay 0")
    if dry_run:
        settings["vqae"]["quantize_after"] = 0
        return rehearse(settings["vqae"], lambda accelerator: build_task(settings, [], [], accelerator))
    if not data or output is None:
        raise typer.BadParameter(DATA_NEEDED)
    if not image_paths(data[0], "validation", settings["data"]["validation_fraction"], settings["vqae"]["seed"]):
        raise typer.BadParameter(f"{data[0]} has no volume for the split 'validation', which the results are of")
    accelerator = start(settings["vqae"], output)
    if accelerator.is_main_process:
        check_target(push_to_hub, private, stop_after)
    with only_run_in(output, accelerator.is_main_process):
        keep_recipe(settings, output, resume, accelerator.is_main_process)
        held_out = load_sources(settings, data[:1], "validation", show=False)[0] if accelerator.is_main_process else []
        task = build_task(settings, data, held_out, accelerator)
        run(task, settings["vqae"], accelerator, output, resume, stop_after)
        if not accelerator.is_main_process:
            return
        # Half-precision files still load as float32. The codebooks are float32 even in these files.
        model = nn.Module.to(task.model, getattr(torch, settings["vqae"]["save_dtype"]))
        with whole_folder(output / "vqmodel") as place:
            model.save_pretrained(place)
        write_summary(settings, "vqae", output, accelerator.device)
        saved = BinaryVQModel.from_pretrained(output / "vqmodel").to(accelerator.device)
        results = evaluate(saved, held_out, settings)
        write_text(output / "results.json", json.dumps(results, indent=2) + "\n")
        print(json.dumps(results))
    if push_to_hub:
        publish("autoencoder", output / "vqmodel", push_to_hub, output, recipe, data, results)


if __name__ == "__main__":
    typer.run(main)
