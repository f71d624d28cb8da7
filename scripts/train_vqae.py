"""accelerate launch scripts/train_vqae.py --recipe brain-small --data data/brain --output runs/vqae

Trains the vector-quantised autoencoder on crops of volumes and writes it to ``<output>/vqmodel``, beside the PSNR of its
reconstructions of whole volumes of the validation split. Data: folders of ``prepare_data.py`` or any folder of NIfTI
files; further ``--data`` are mixed in by the shares in the recipe. Every default stands in ``scripts/recipes/vq``;
``--set vqae.iterations=100`` overrides one. With ``--resume`` a run goes on from its newest checkpoint.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from hf_binaryformer.modeling.vq_autoencoder import BinaryVQModel
from hf_binaryformer.modeling.vq_losses import PerceptualLoss, reconstruction_loss
from hf_binaryformer.pipelines.vq_sampling import place_on_grid
from patches import PatchSamples, image_paths, load_all
from training import VQ_RECIPES, StepCounter, load_recipe, rate_factor


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


def train_model(
    recipe: dict[str, Any], folders: list[Path], output: Path, resume: bool, stop_after: int | None
) -> tuple[Accelerator, BinaryVQModel]:
    """The training loop."""
    train = recipe["vqae"]
    accelerator = Accelerator(
        mixed_precision=train["mixed_precision"],
        project_config=ProjectConfiguration(str(output), automatic_checkpoint_naming=True, total_limit=2),
    )
    if train["batch_size"] % accelerator.num_processes:
        raise typer.BadParameter(
            f"batch_size {train['batch_size']} must be divisible by the {accelerator.num_processes} processes"
        )
    torch.manual_seed(train["seed"])
    network = BinaryVQModel(**recipe["vqmodel"]).train()
    perceptual = None if train["perceptual_loss"] == "none" else PerceptualLoss(train["perceptual_loss"])
    optimizer = torch.optim.AdamW(
        network.parameters(), train["learning_rate"], weight_decay=train["weight_decay"], betas=train["betas"]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, train))
    counter = StepCounter()
    accelerator.register_for_checkpointing(counter, schedule)
    model, optimizer = accelerator.prepare(network, optimizer)
    if perceptual is not None:
        perceptual.to(accelerator.device)
    if resume:
        accelerator.load_state()
        accelerator.project_configuration.iteration = math.ceil(counter.step / train["checkpoint_every"])

    iterations = min(train["iterations"], stop_after or train["iterations"])
    batch_size = train["batch_size"]
    sources = load_sources(recipe, folders, "train", accelerator.is_main_process)
    ceiling = recipe["vqmodel"]["intensity_ceiling"]
    samples = PatchSamples(sources, recipe["data"], ceiling, train["seed"], train["iterations"] * batch_size)
    # Process r of P takes samples r, r + P, ... of each batch, so that P processes together see one process's batches.
    mine = range(counter.step * batch_size + accelerator.process_index, len(samples), accelerator.num_processes)
    loader = DataLoader(Subset(samples, mine), batch_size // accelerator.num_processes, num_workers=train["workers"])
    bar = tqdm(total=iterations, initial=counter.step, disable=not accelerator.is_main_process, desc="train")
    output.mkdir(parents=True, exist_ok=True)
    started, records = time.perf_counter(), []
    for batch in loader:
        if counter.step >= iterations:
            break
        # What is drawn in a step depends on its number and the process alone, so that a resumed run repeats it.
        torch.manual_seed(train["seed"] + 1_000_003 * counter.step + accelerator.process_index)
        batch = batch.to(accelerator.device)
        with accelerator.autocast():
            result = model(batch, quantize=counter.step >= train["quantize_after"])
        losses = {
            "reconstruction": reconstruction_loss(result.sample, batch, train["reconstruction_loss"]),
            "commitment": train["commitment_weight"] * result.commitment_loss.float(),
        }
        if perceptual is not None:
            losses["perceptual"] = train["perceptual_weight"] * perceptual(result.sample, batch)
        loss = torch.stack(list(losses.values())).sum()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), train["max_grad_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        counter.step += 1
        values = torch.stack([loss, *losses.values()]).detach()
        records.append(accelerator.reduce(values, "mean").tolist())
        bar.update()
        if counter.step % train["log_every"] == 0 or counter.step == iterations:
            quantizer = network.quantizer
            record = {
                "step": counter.step,
                **dict(zip(["loss", *losses], np.mean(records, axis=0).tolist(), strict=True)),
                "usage": quantizer.usage.min().item(),
                "perplexity": quantizer.perplexity.mean().item(),
                "learning_rate": optimizer.param_groups[0]["lr"],
                "seconds": round(time.perf_counter() - started, 1),
                "processes": accelerator.num_processes,
            }
            records.clear()
            quantizer.reset_usage()
            bar.set_postfix(loss=f"{record['loss']:.5f}", perplexity=f"{record['perplexity']:.1f}")
            if accelerator.is_main_process:
                with (output / "log.jsonl").open("a") as log:
                    log.write(json.dumps(record) + "\n")
        if counter.step % train["checkpoint_every"] == 0 or counter.step == iterations:
            accelerator.save_state()
    bar.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return accelerator, network


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
    recipe: Annotated[str, typer.Option(help="Name in scripts/recipes/vq, or the path of a .yaml file.")],
    data: Annotated[list[Path], typer.Option(help="Folder of prepare_data.py or of NIfTI files; may be repeated.")],
    output: Annotated[Path, typer.Option(help="Where checkpoints, log, model and results go.")],
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint in --output.")] = False,
    stop_after: Annotated[int | None, typer.Option(help="End after this iteration, as an interruption would.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value")] = None,
) -> None:
    """Train, save, evaluate."""
    settings = load_recipe(recipe, overrides or [], VQ_RECIPES)
    accelerator, model = train_model(settings, data, output, resume, stop_after)
    if not accelerator.is_main_process:
        return
    # Half-precision files still load as float32, and the codebooks stay float32 in them too.
    torch.nn.Module.to(model, getattr(torch, settings["vqae"]["save_dtype"])).save_pretrained(output / "vqmodel")
    (output / "recipe.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    held_out = load_sources(settings, data[:1], "validation", show=False)[0]
    saved = BinaryVQModel.from_pretrained(output / "vqmodel").to(accelerator.device)
    results = evaluate(saved, held_out, settings)
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    typer.run(main)
