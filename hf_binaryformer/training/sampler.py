"""accelerate launch -m hf_binaryformer.training.sampler --recipe brain-small --tokens data/tokens --output runs/sampler

In a clone: ``scripts/train_sampler.py``. Trains the transformer of absorbing diffusion (paper Sec. 3.2, A.2) on tokens
of :mod:`.encode_tokens` (``train`` and ``validation.safetensors``, each one tensor "tokens", uint8 (n, K, d, h, w)). It
saves ``output/transformer`` and ``output/scheduler``; with ``--vqmodel`` also ``output/pipeline``, the whole
checkpoint. The sections ``transformer``, ``scheduler`` and ``sampler`` of ``recipes/vq/<recipe>.yaml`` beside this
module hold all defaults; ``--set sampler.batch_size=4`` overrides one. With ``--resume`` a run continues from its
newest checkpoint. On one machine with one number of threads, it ends with the same weights as a run without the
interruption.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_binaryformer.modeling.vq_autoencoder import BinaryVQModel
from hf_binaryformer.modeling.vq_transformer import BinaryVQTransformer3DModel, elbo_loss
from hf_binaryformer.pipelines.absorbing_scheduler import AbsorbingScheduler
from hf_binaryformer.pipelines.vq_inpainting import BinaryVQInpaintPipeline
from hf_binaryformer.pipelines.whole_files import whole_folder
from hf_binaryformer.training.checkpoints import only_run_in
from hf_binaryformer.training.dry_run import rehearse
from hf_binaryformer.training.loop import SEED_STRIDE, Task, run, start
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


def load_tokens(folder: Path, split: str, transformer: BinaryVQTransformer3DModel) -> Tensor:
    """All tokens of a split, (n, K, d, h, w) uint8."""
    path = folder / f"{split}.safetensors"
    if not path.is_file():
        raise typer.BadParameter(f"{path} is not there: write it with encode_tokens.py")
    tokens = load_file(path)["tokens"]
    expected = (transformer.config.num_codebooks, *transformer.config.grid_size)
    if tokens.shape[1:] != expected or not len(tokens):
        raise typer.BadParameter(
            f"{path} holds tokens {tuple(tokens.shape)}, the recipe's transformer takes (n, {expected})"
        )
    return tokens


def draw_times(count: int, total: int, generator: torch.Generator) -> Tensor:
    """Times 1 ... T, one from each of ``count`` equal parts in random order.

    A batch therefore has samples with few and with many masked tokens.
    """
    part = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    return (1 + part * total).long().clamp_max(total)


def draw_holes(count: int, grid: Sequence[int], settings: dict[str, Any], generator: torch.Generator) -> Tensor:
    """Regions to be inpainted, (count, 1, d, h, w) bool: boxes in a share of the samples, the whole grid in the others.

    Sides of boxes are drawn from ``hole_sides`` (smallest and largest, in positions). A box may extend beyond the grid,
    but never lies completely outside it.
    """
    holes = torch.ones(count, 1, *grid, dtype=torch.bool)
    least, largest = settings["hole_sides"]
    for hole in holes:
        box = torch.rand((), generator=generator) < settings["hole_share"]
        for axis, positions in enumerate(grid, start=1):
            side = int(torch.randint(least, largest + 1, (), generator=generator))
            first = 1 - (side + 1) // 2
            start = int(torch.randint(first, max(positions - side // 2, first + 1), (), generator=generator))
            inside = torch.arange(positions) - start
            if box:
                view = [positions if a == axis else 1 for a in range(4)]
                hole &= ((inside >= 0) & (inside < side)).view(view)
    return holes


def training_batch(
    tokens: Tensor, scheduler: AbsorbingScheduler, settings: dict[str, Any], step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(truth, masked input, masked, times, holes) of a step; they depend on the seed and the step alone."""
    generator = torch.Generator().manual_seed(settings["seed"] + SEED_STRIDE * step)
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
    per_token = transformer.config.num_codebooks * float(torch.cat(bits).mean())
    return {"validation_bits_per_token": per_token, "validation_accuracy": right / max(seen, 1)}


def random_tokens(count: int, transformer: BinaryVQTransformer3DModel) -> Tensor:
    """Random tokens without structure, in the form that :func:`load_tokens` returns."""
    config = transformer.config
    return torch.randint(config.codebook_size, (count, config.num_codebooks, *config.grid_size), dtype=torch.uint8)


def build_task(
    recipe: dict[str, Any], folder: Path | None, accelerator: Accelerator
) -> tuple[Task, AbsorbingScheduler]:
    """The training task and its scheduler; without a folder it uses random tokens, for a dry run."""
    settings = recipe["sampler"]
    with refused_in_one_line("transformer", "scheduler"):
        transformer = BinaryVQTransformer3DModel(**recipe["transformer"], train_block_sizes=settings["block_sizes"])
        scheduler = AbsorbingScheduler(**recipe["scheduler"])
    scheduler.check_compatible(transformer.config)
    if folder is None:
        tokens = held_out = random_tokens(settings["batch_size"], transformer)
    else:
        tokens, held_out = (load_tokens(folder, split, transformer) for split in ("train", "validation"))
    total = scheduler.config.num_train_timesteps

    def batches(first: int) -> Iterator[list[Tensor]]:
        # Process r of P takes samples r, r + P, ... of the batch, so that P processes see the same samples as one.
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        for step in range(first, settings["iterations"]):
            batch = [t[mine] for t in training_batch(tokens, scheduler, settings, step)]
            yield from zip(*(t.chunk(settings["accumulation"]) for t in batch), strict=True)

    def losses(network: nn.Module, batch: Sequence[Tensor], step: int) -> dict[str, Tensor]:
        truth, noisy, masked, times, holes = batch
        with accelerator.autocast():
            logits = network(noisy).logits
        return {"loss": elbo_loss(logits, truth, masked, times, total, settings["weighting"], hole=holes)}

    task = Task(
        transformer,
        build_optimizer(transformer, settings),
        batches=batches,
        losses=losses,
        validate=lambda: validate(transformer, held_out, scheduler, settings, accelerator),
        figures=("validation_bits_per_token", "validation_accuracy"),
    )
    return task, scheduler


def load_autoencoder(name: str, transformer: BinaryVQTransformer3DModel) -> BinaryVQModel:
    """The autoencoder whose tokens the transformer learns.

    Raises:
        typer.BadParameter: it cannot be loaded, or its tokens do not fit the transformer.
    """
    try:
        autoencoder = BinaryVQModel.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"--vqmodel {name}: {error}") from error
    for field in ("num_codebooks", "codebook_size"):
        found, wanted = autoencoder.config[field], transformer.config[field]
        if found != wanted:
            raise typer.BadParameter(f"--vqmodel {name} has {field} {found}, the recipe's transformer {wanted}")
    # A published file must not name the folder that the autoencoder was loaded from.
    autoencoder.register_to_config(_name_or_path="")
    return autoencoder


def train(
    settings: dict[str, Any],
    tokens: Path,
    output: Path,
    vqmodel: str | None = None,
    resume: bool = False,
    stop_after: int | None = None,
    *,
    before: Callable[[], None] | None = None,
    change: Callable[[Task, AbsorbingScheduler], Task] | None = None,
) -> bool:
    """Train with a loaded recipe, and save; returns whether this is the main process.

    Args:
        settings: the recipe, from :func:`load_recipe`.
        tokens, output, vqmodel, resume, stop_after: as the program's options.
        before: called on the main process before anything is built or written.
        change: returns the task to train instead of the given one, for experiments that add losses or take
            measurements.
    """
    accelerator = start(settings["sampler"], output)
    if before is not None and accelerator.is_main_process:
        before()
    with only_run_in(output, accelerator.is_main_process):
        keep_recipe(settings, output, resume, accelerator.is_main_process)
        task, scheduler = build_task(settings, tokens, accelerator)
        if change is not None:
            task = change(task, scheduler)
        autoencoder = None if vqmodel is None else load_autoencoder(vqmodel, task.model)
        run(task, settings["sampler"], accelerator, output, resume, stop_after)
        if not accelerator.is_main_process:
            return False
        # Half-precision files still load as float32: the number format of computation is chosen when a network is loaded.
        dtype = getattr(torch, settings["sampler"]["save_dtype"])
        transformer = nn.Module.to(task.model, dtype)
        with whole_folder(output / "transformer") as place:
            transformer.save_pretrained(place)
        with whole_folder(output / "scheduler") as place:
            scheduler.save_pretrained(place)
        if autoencoder is not None:
            pipeline = BinaryVQInpaintPipeline(nn.Module.to(autoencoder, dtype), transformer, scheduler)
            with whole_folder(output / "pipeline") as place:
                pipeline.save_pretrained(place)
        write_summary(settings, "sampler", output, accelerator.device)
    return True


def main(
    recipe: Annotated[str, typer.Option(help="Name of a recipe, or the path of a .yaml file.")],
    tokens: Annotated[Path | None, typer.Option(help="Folder written by encode_tokens.py.")] = None,
    output: Output = None,
    vqmodel: Annotated[
        str | None, typer.Option(help="Autoencoder, to save all as one checkpoint: output/pipeline.")
    ] = None,
    resume: Resume = False,
    stop_after: StopAfter = None,
    dry_run: DryRun = False,
    push_to_hub: PushToHub = None,
    private: Private = False,
    overrides: Overrides = None,
) -> None:
    """Train and save."""
    settings = load_recipe(recipe, overrides or [], VQ_RECIPES, "sampler")
    if dry_run:
        return rehearse(settings["sampler"], lambda accelerator: build_task(settings, None, accelerator)[0])
    if tokens is None or output is None:
        raise typer.BadParameter(DATA_NEEDED.replace("--data", "--tokens"))
    check = partial(check_target, push_to_hub, private, stop_after)
    if not train(settings, tokens, output, vqmodel, resume, stop_after, before=check):
        return
    if push_to_hub:
        kind = "transformer" if vqmodel is None else "pipeline"
        publish(kind, output / kind, push_to_hub, output, recipe, [tokens])


if __name__ == "__main__":
    typer.run(main)
