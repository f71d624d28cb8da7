"""accelerate launch scripts/train_sampler.py --recipe brain-small --tokens data/tokens --output runs/brain-small

Trains the transformer of absorbing diffusion (paper Sec. 3.2, A.2) on tokens of ``encode_tokens.py`` (``train`` and
``validation.safetensors``, each one tensor "tokens", uint8 (n, K, d, h, w)), and saves ``output/transformer`` and
``output/scheduler``; with ``--vqmodel`` also ``output/pipeline``, the whole checkpoint. The sections ``transformer``,
``scheduler`` and ``sampler`` of ``scripts/recipes/vq/<recipe>.yaml`` hold every default; ``--set sampler.batch_size=4``
overrides one. With ``--resume`` a run goes on from its newest checkpoint, and ends with the weights that it would have had
without the stop.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from finetune import build_optimizer
from hf_binaryformer.modeling.vq_autoencoder import BinaryVQModel
from hf_binaryformer.modeling.vq_transformer import BinaryVQTransformer3DModel, elbo_loss
from hf_binaryformer.pipelines.absorbing_scheduler import AbsorbingScheduler
from hf_binaryformer.pipelines.vq_inpainting import BinaryVQInpaintPipeline
from training import VQ_RECIPES, StepCounter, load_recipe, rate_factor


def load_tokens(folder: Path, split: str, transformer: BinaryVQTransformer3DModel) -> Tensor:
    """All tokens of a split, (n, K, d, h, w) uint8."""
    path = folder / f"{split}.safetensors"
    if not path.is_file():
        raise typer.BadParameter(f"{path} is not there: write it with scripts/encode_tokens.py")
    tokens = load_file(path)["tokens"]
    expected = (transformer.config.num_codebooks, *transformer.config.grid_size)
    if tokens.shape[1:] != expected or not len(tokens):
        raise typer.BadParameter(
            f"{path} holds tokens {tuple(tokens.shape)}, the recipe's transformer takes (n, {expected})"
        )
    return tokens


def draw_times(count: int, total: int, generator: torch.Generator) -> Tensor:
    """Times 1 ... T, one out of each of ``count`` equal parts in random order, so that a batch sees little and much masked."""
    part = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    return (1 + part * total).long().clamp_max(total)


def draw_holes(count: int, grid: Sequence[int], settings: dict[str, Any], generator: torch.Generator) -> Tensor:
    """Boxes to be inpainted, (count, 1, d, h, w) bool: in a share of the samples, the whole grid in the others.

    Sides are drawn from ``hole_sides`` (least and largest, in positions); a box may reach beyond the grid, not leave it.
    """
    holes = torch.ones(count, 1, *grid, dtype=torch.bool)
    least, largest = settings["hole_sides"]
    for hole in holes:
        box = torch.rand((), generator=generator) < settings["hole_share"]
        for axis, positions in enumerate(grid, start=1):
            side = int(torch.randint(least, largest + 1, (), generator=generator))
            start = int(torch.randint(1 - side // 2, positions - side // 2, (), generator=generator))
            inside = torch.arange(positions) - start
            if box:
                view = [positions if a == axis else 1 for a in range(4)]
                hole &= ((inside >= 0) & (inside < side)).view(view)
    return holes


def training_batch(
    tokens: Tensor, scheduler: AbsorbingScheduler, settings: dict[str, Any], step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(truth, masked input, masked, times, holes) of a step; they depend on the seed and the step alone."""
    generator = torch.Generator().manual_seed(settings["seed"] + 1_000_003 * step)
    count = settings["batch_size"]
    truth = tokens[torch.randint(len(tokens), (count,), generator=generator)].long()
    times = draw_times(count, scheduler.config.num_train_timesteps, generator)
    known = torch.tensor(settings["block_sizes"])
    sizes = known[torch.randint(len(known), (count,), generator=generator)].tolist()
    holes = draw_holes(count, truth.shape[2:], settings, generator)
    noisy, masked = scheduler.add_noise(truth, times, generator, sizes, holes)
    return truth, noisy, masked, times, holes


@torch.no_grad()
def validate(
    transformer: BinaryVQTransformer3DModel,
    tokens: Tensor,
    scheduler: AbsorbingScheduler,
    settings: dict[str, Any],
    accelerator: Accelerator,
) -> dict[str, float]:
    """The bound in bits for each grid position, and the share of masked tokens whose likeliest value is right."""
    transformer.eval()
    bits, right, seen = [], 0, 0
    total = scheduler.config.num_train_timesteps
    generator = torch.Generator().manual_seed(settings["seed"])
    for truth in tokens.split(settings["batch_size"]):
        for part in range(settings["validation_times"]):
            # The same times and masks at every validation, spread over all of 1 ... T.
            times = torch.full((len(truth),), 1 + int((part + 0.5) / settings["validation_times"] * total))
            noisy, masked = scheduler.add_noise(truth.long(), times, generator)
            truth_, noisy, masked = (t.to(accelerator.device) for t in (truth.long(), noisy, masked))
            with accelerator.autocast():
                logits = transformer(noisy).logits
            bits.append(elbo_loss(logits, truth_, masked, times, total, "elbo", "none"))
            right += int((logits.argmax(2) == truth_)[masked].sum())
            seen += int(masked.sum())
    transformer.train()
    per_token = transformer.config.num_codebooks * float(torch.cat(bits).mean())
    return {"validation_bits_per_token": per_token, "validation_accuracy": right / max(seen, 1)}


def train_transformer(
    recipe: dict[str, Any], folder: Path, output: Path, resume: bool, stop_after: int | None
) -> tuple[Accelerator, BinaryVQTransformer3DModel, AbsorbingScheduler]:
    """The training loop; the transformer comes back with averaged weights where the recipe averages them."""
    settings = recipe["sampler"]
    accelerator = Accelerator(
        mixed_precision=settings["mixed_precision"],
        project_config=ProjectConfiguration(str(output), automatic_checkpoint_naming=True, total_limit=2),
    )
    if settings["batch_size"] % accelerator.num_processes:
        raise typer.BadParameter(
            f"batch_size {settings['batch_size']} must be divisible by the {accelerator.num_processes} processes"
        )
    torch.manual_seed(settings["seed"])
    transformer = BinaryVQTransformer3DModel(**recipe["transformer"], train_block_sizes=settings["block_sizes"])
    scheduler = AbsorbingScheduler(**recipe["scheduler"])
    scheduler.check_compatible(transformer.config)
    tokens, held_out = (load_tokens(folder, split, transformer) for split in ("train", "validation"))
    if settings["gradient_checkpointing"]:
        transformer.enable_gradient_checkpointing()
    transformer.train()
    optimizer = build_optimizer(transformer, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, settings))
    average = EMAModel(transformer.parameters(), decay=settings["ema_decay"], use_ema_warmup=True, power=3 / 4)
    counter = StepCounter()
    accelerator.register_for_checkpointing(counter, schedule, average)
    model, optimizer = accelerator.prepare(transformer, optimizer)
    average.to(accelerator.device)
    if resume:
        accelerator.load_state()
        accelerator.project_configuration.iteration = math.ceil(counter.step / settings["checkpoint_every"])

    last = min(settings["iterations"], stop_after or settings["iterations"])
    output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    losses: list[float] = []
    for step in _progress(counter.step, last, accelerator):
        batch = training_batch(tokens, scheduler, settings, step)
        # Process r of P takes samples r, r + P, ... of the batch, so that P processes see what one would.
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        truth, noisy, masked, times, holes = (t[mine].to(accelerator.device) for t in batch)
        # Ternary draws and dropout depend on the step and the process alone, so that a resumed run repeats them.
        torch.manual_seed(settings["seed"] + 1_000_003 * step + accelerator.process_index)
        with accelerator.autocast():
            logits = model(noisy).logits
        total = scheduler.config.num_train_timesteps
        loss = elbo_loss(logits, truth, masked, times, total, settings["weighting"], hole=holes)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), settings["max_grad_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        average.step(transformer.parameters())
        counter.step = step + 1
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        ends = counter.step == last
        if counter.step % settings["log_every"] == 0 or ends:
            record: dict[str, Any] = {
                "step": counter.step,
                "loss": sum(losses) / len(losses),
                "learning_rate": optimizer.param_groups[0]["lr"],
                "processes": accelerator.num_processes,
            }
            losses.clear()
            if (counter.step % settings["validate_every"] == 0 or ends) and accelerator.is_main_process:
                average.store(transformer.parameters())
                average.copy_to(transformer.parameters())
                record |= validate(transformer, held_out, scheduler, settings, accelerator)
                average.restore(transformer.parameters())
            record["seconds"] = round(time.perf_counter() - started, 1)
            if accelerator.is_main_process:
                with (output / "log.jsonl").open("a") as log:
                    log.write(json.dumps(record) + "\n")
        if counter.step % settings["checkpoint_every"] == 0 or ends:
            accelerator.save_state()
    # No process leaves while another still talks to it, and none with the process group open: that can abort at exit.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    average.copy_to(transformer.parameters())
    return accelerator, transformer, scheduler


def _progress(first: int, last: int, accelerator: Accelerator) -> Iterator[int]:
    return iter(
        tqdm(range(first, last), initial=first, total=last, disable=not accelerator.is_main_process, desc="train")
    )


def main(
    recipe: Annotated[str, typer.Option(help="Name in scripts/recipes/vq, or the path of a .yaml file.")],
    tokens: Annotated[Path, typer.Option(help="Folder written by encode_tokens.py.")],
    output: Annotated[Path, typer.Option(help="Where checkpoints, log, transformer and scheduler go.")],
    vqmodel: Annotated[
        str | None, typer.Option(help="Autoencoder, to save all as one checkpoint: output/pipeline.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint in --output.")] = False,
    stop_after: Annotated[int | None, typer.Option(help="End after this iteration, as an interruption would.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value")] = None,
) -> None:
    """Train and save."""
    settings = load_recipe(recipe, overrides or [], VQ_RECIPES)
    accelerator, transformer, scheduler = train_transformer(settings, tokens, output, resume, stop_after)
    if not accelerator.is_main_process:
        return
    # Half-precision files still load as float32: what a network computes in is asked for when it is loaded.
    dtype = getattr(torch, settings["sampler"]["save_dtype"])
    torch.nn.Module.to(transformer, dtype).save_pretrained(output / "transformer")
    scheduler.save_pretrained(output / "scheduler")
    if vqmodel is not None:
        autoencoder = torch.nn.Module.to(BinaryVQModel.from_pretrained(vqmodel), dtype)
        # Where it was loaded from is nobody's business in a published file.
        autoencoder.register_to_config(_name_or_path="")
        BinaryVQInpaintPipeline(autoencoder, transformer, scheduler).save_pretrained(output / "pipeline")
    (output / "recipe.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    last = json.loads((output / "log.jsonl").read_text().splitlines()[-1])
    chosen = {key: settings["sampler"][key] for key in ("batch_size", "learning_rate", "seed", "mixed_precision")}
    (output / "training.json").write_text(
        json.dumps({"iterations": last.pop("step"), **last, **chosen}, indent=2) + "\n"
    )


if __name__ == "__main__":
    typer.run(main)
