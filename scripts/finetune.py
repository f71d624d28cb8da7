"""accelerate launch scripts/finetune.py --recipe hippocampus --data data/hippocampus --output runs/hippocampus

Trains a segmentation network on a folder of ``prepare_data.py``, then segments whole volumes of a split and prints Dice
for each label beside the prior-atlas baseline. Every default stands in ``scripts/recipes/<recipe>.yaml``; ``--set
model.attention_type=uniform`` overrides one. With ``--resume`` a run goes on from its newest checkpoint, and ends with the
weights that it would have had without the stop.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from monai.losses import DiceCELoss
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import hf_binaryformer as bf
from evaluation import evaluate_split
from slices import PreparedFolder, SliceSamples
from training import StepCounter, load_recipe, rate_factor


def build_model(recipe: dict[str, Any], label_names: dict[int, str]) -> tuple[Any, Any]:
    """Network and image processor of a recipe."""
    processor = bf.BinaryFormerImageProcessor(**recipe["processor"])
    fields = {
        "image_size": processor.image_size,
        "num_channels": processor.num_channels,
        "id2label": label_names,
        "label2id": {name: label for label, name in label_names.items()},
        **recipe["model"],
    }
    timm_name = fields.pop("from_timm", None)
    if timm_name:
        checkpoint = fields.pop("timm_checkpoint", None)
        model = bf.BinaryFormerForSemanticSegmentation.from_timm(timm_name, checkpoint=checkpoint, **fields)
    else:
        model = bf.BinaryFormerForSemanticSegmentation(bf.BinaryFormerConfig(**fields))
    return model, processor


def build_optimizer(model: nn.Module, train: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW; the weight networks theta learn at their own rate, and vectors do not decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        scale = train["theta_lr_scale"] if "_theta." in name else 1.0
        decay = train["weight_decay"] if parameter.dim() > 1 else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    rate = train["learning_rate"]
    return torch.optim.AdamW([{"params": p, "lr": rate * s, "weight_decay": d} for (s, d), p in groups.items()])


def train_model(
    recipe: dict[str, Any], folder: PreparedFolder, output: Path, resume: bool, stop_after: int | None
) -> Any:
    """The training loop; returns (accelerator, network, processor)."""
    train = recipe["train"]
    accelerator = Accelerator(
        mixed_precision=train["mixed_precision"],
        project_config=ProjectConfiguration(str(output), automatic_checkpoint_naming=True, total_limit=2),
    )
    if train["batch_size"] % accelerator.num_processes:
        raise typer.BadParameter(
            f"batch_size {train['batch_size']} must be divisible by the {accelerator.num_processes} processes"
        )
    torch.manual_seed(train["seed"])
    model, processor = build_model(recipe, folder.label_names)
    if train["gradient_checkpointing"]:
        model.gradient_checkpointing_enable()
    model.train()
    optimizer = build_optimizer(model, train)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, train))
    counter = StepCounter()
    accelerator.register_for_checkpointing(counter, schedule)
    model, optimizer = accelerator.prepare(model, optimizer)
    if resume:
        accelerator.load_state()
        accelerator.project_configuration.iteration = math.ceil(counter.step / train["checkpoint_every"])

    iterations = min(train["iterations"], stop_after or train["iterations"])
    per_process = train["batch_size"] // accelerator.num_processes
    samples = SliceSamples(
        folder.split("train"), processor, recipe["augment"], train["seed"], train["iterations"] * train["batch_size"]
    )
    # Process r of P takes samples r, r + P, ... of each batch, so that P processes together see one process's batches.
    mine = range(
        counter.step * train["batch_size"] + accelerator.process_index, len(samples), accelerator.num_processes
    )
    loader = DataLoader(
        torch.utils.data.Subset(samples, mine),
        per_process,
        num_workers=train["workers"],
        persistent_workers=False,
        prefetch_factor=4 if train["workers"] else None,
    )
    criterion = DiceCELoss(
        include_background=False,
        to_onehot_y=True,
        softmax=True,
        batch=train["batch_dice"],
        lambda_dice=train["dice_weight"],
    )
    bar = tqdm(total=iterations, initial=counter.step, disable=not accelerator.is_main_process, desc="train")
    output.mkdir(parents=True, exist_ok=True)
    started, losses = time.perf_counter(), []
    for batch in loader:
        if counter.step >= iterations:
            break
        # Ternary draws and dropout depend on the step and the process alone, so that a resumed run repeats them.
        torch.manual_seed(train["seed"] + 1_000_003 * counter.step + accelerator.process_index)
        batch = {key: t.to(accelerator.device) for key, t in batch.items()}
        with accelerator.autocast():
            logits = model(batch["pixel_values"]).logits
        loss = criterion(logits.float(), batch["labels"][:, None])
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), train["max_grad_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        counter.step += 1
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        bar.update()
        if counter.step % train["log_every"] == 0 or counter.step == iterations:
            record = {
                "step": counter.step,
                "loss": sum(losses) / len(losses),
                "learning_rate": optimizer.param_groups[0]["lr"],
                "seconds": round(time.perf_counter() - started, 1),
                "processes": accelerator.num_processes,
            }
            losses.clear()
            bar.set_postfix(loss=f"{record['loss']:.4f}")
            if accelerator.is_main_process:
                with (output / "log.jsonl").open("a") as log:
                    log.write(json.dumps(record) + "\n")
        if counter.step % train["checkpoint_every"] == 0 or counter.step == iterations:
            accelerator.save_state()
    bar.close()
    # No process leaves while another still talks to it, and none with the process group open: that can abort at exit.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return accelerator, accelerator.unwrap_model(model), processor


def summarise_training(output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What a card says of a run: settings, final loss, and seconds since its last start."""
    last = json.loads((output / "log.jsonl").read_text().splitlines()[-1])
    chosen = {key: settings["train"][key] for key in ("batch_size", "learning_rate", "seed", "mixed_precision")}
    return {"iterations": last["step"], "loss": last["loss"], "seconds": last["seconds"], **chosen}


def main(
    recipe: Annotated[str, typer.Option(help="Name in scripts/recipes, or the path of a .yaml file.")],
    data: Annotated[Path, typer.Option(help="Folder written by prepare_data.py.")],
    output: Annotated[Path, typer.Option(help="Where checkpoints, log, model and results go.")],
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint in --output.")] = False,
    evaluate: Annotated[str, typer.Option(help="Split to segment at the end: validation, test or none.")] = "test",
    stop_after: Annotated[int | None, typer.Option(help="End after this iteration, as an interruption would.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value")] = None,
) -> None:
    """Train, save, evaluate."""
    settings = load_recipe(recipe, overrides or [])
    folder = PreparedFolder(data)
    accelerator, model, processor = train_model(settings, folder, output, resume, stop_after)
    if not accelerator.is_main_process:
        return
    model.eval()
    dtype = getattr(torch, settings["train"]["save_dtype"])
    # Half-precision files still load as float32: the configuration keeps the type that the network computes in.
    rounded = {key: t.to(dtype) if t.is_floating_point() else t for key, t in model.state_dict().items()}
    model.save_pretrained(output / "model", state_dict=rounded)
    processor.save_pretrained(output / "model")
    (output / "recipe.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    (output / "training.json").write_text(json.dumps(summarise_training(output, settings), indent=2) + "\n")
    if evaluate != "none":
        results = evaluate_split(output / "model", folder, evaluate, baseline=True)
        (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
