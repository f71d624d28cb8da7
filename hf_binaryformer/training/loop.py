"""The one training loop.

Each training script defines a :class:`Task`: the network, its data and its losses. Iterations, accumulation, averaging,
validation, checkpoints, resuming, trackers and interruptions are here.
"""

from __future__ import annotations

import copy
import math
import signal
from collections.abc import Callable, Iterator, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, parse_flag_from_env, send_to_device
from diffusers.training_utils import EMAModel
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from hf_binaryformer.pipelines.precision import mixed_precision
from hf_binaryformer.pipelines.whole_files import whole_file
from hf_binaryformer.training.checkpoints import (
    BEST_WEIGHTS,
    VALIDATION,
    Checkpoints,
    Interruption,
    Progress,
    refuse_other_run,
)
from hf_binaryformer.training.optimization import rate_factor
from hf_binaryformer.training.run_log import Log, to_json

# Distance between the seeds of iterations, so that no two pairs (seed, iteration) share their random numbers.
SEED_STRIDE = 1_000_003
# Exit status after Ctrl-C.
INTERRUPTED = 130


@dataclass
class Task:
    """What a script trains.

    Args:
        model: the network; after :func:`run` it holds the weights to save.
        optimizer: optimizer of the network's parameters.
        batches: ``batches(first)`` yields this process's batches from iteration ``first`` on, ``accumulation`` of them
            for each iteration. Their content depends only on the seed and the iteration.
        losses: losses of the prepared network on a batch at a step; "loss" is minimised, all are logged.
        validate: figures of the current network on held-out data; called on the main process.
        figures: names of the validation figures.
        measures: further figures for the log; called when a record is written.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    batches: Callable[[int], Iterator[Any]]
    losses: Callable[[nn.Module, Any, int], dict[str, Tensor]]
    validate: Callable[[], dict[str, float]] | None = None
    figures: tuple[str, ...] = ()
    measures: Callable[[], dict[str, float]] | None = None


def start(train: dict[str, Any], output: Path | None) -> Accelerator:
    """Check a training's settings, set the random seed, and set up Accelerate.

    Args:
        train: the recipe's section with its defaults. It is changed in place: a tracker's name becomes a list, and a
            missing ``mixed_precision`` becomes "no". "auto" stays: it is bf16 where the device has that in hardware, so
            that a run may go on on another machine.
        output: folder of the run; None: there is none.

    Raises:
        typer.BadParameter: the batch size is not divisible by processes times accumulation; a tracker is not installed;
            the schedule or number format is unknown; no checkpoint would be kept; best weights are wanted without
            validation; or weights are split over processes (FSDP) although a setting needs them whole.
    """
    if train["best_by"] and not train["validate_every"]:
        raise typer.BadParameter(
            f"best_by is '{train['best_by']}', but validate_every is null: nothing would be chosen"
        )
    if not isinstance(getattr(torch, str(train["save_dtype"]), None), torch.dtype):
        raise typer.BadParameter(f"save_dtype is '{train['save_dtype']}', expected float32, float16 or bfloat16")
    if train["schedule"] not in ("cosine", "step"):
        raise typer.BadParameter(f"schedule is '{train['schedule']}', expected cosine or step")
    if train["checkpoints_kept"] < 1:
        raise typer.BadParameter(f"checkpoints_kept is {train['checkpoints_kept']}, expected at least 1")
    train["mixed_precision"] = train["mixed_precision"] or "no"  # YAML reads the word no as false
    if isinstance(train["trackers"], str):
        train["trackers"] = [train["trackers"]]
    installed = [tracker.value for tracker in get_available_trackers()]
    missing = [name for name in train["trackers"] if name not in installed]
    if missing:
        raise typer.BadParameter(f"tracker {', '.join(missing)} is not installed; here are {', '.join(installed)}")
    state = PartialState(parse_flag_from_env("ACCELERATE_USE_CPU"))  # as Accelerator itself begins
    precision = mixed_precision(train["mixed_precision"], state.device)
    accelerator = Accelerator(mixed_precision=precision, log_with=train["trackers"] or None, project_dir=output)
    split = accelerator.distributed_type == DistributedType.FSDP
    if split and (train["ema_decay"] or train["validate_every"] or train.get("freeze_query_key")):
        raise typer.BadParameter(
            "with FSDP no process has all weights: set ema_decay to 0, validate_every to null and freeze_query_key to false"
        )
    parts = accelerator.num_processes * train["accumulation"]
    if train["batch_size"] % parts:
        raise typer.BadParameter(
            f"batch_size {train['batch_size']} must be divisible by the {accelerator.num_processes} processes times "
            f"accumulation {train['accumulation']}"
        )
    torch.manual_seed(train["seed"])
    return accelerator


def load_batches(samples: Dataset, train: dict[str, Any], accelerator: Accelerator, first: int) -> Iterator[Any]:
    """Batches of numbered samples for :attr:`Task.batches`.

    Process r of P takes samples r, r + P, ... of each batch, so that P processes together see the same batches as one.
    """
    assert isinstance(samples, Sized)
    numbers = range(first * train["batch_size"] + accelerator.process_index, len(samples), accelerator.num_processes)
    size = train["batch_size"] // accelerator.num_processes // train["accumulation"]
    ahead = 4 if train["workers"] else None
    subset, workers = Subset(samples, numbers), train["workers"]
    return iter(DataLoader(subset, size, num_workers=workers, prefetch_factor=ahead, worker_init_fn=_ignore_signals))


def _ignore_signals(worker: int) -> None:
    """Ignore Ctrl-C, and SIGTERM from launchers and schedulers, in a data worker.

    These signals reach all processes of a run, and the training process must end first.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@dataclass
class Training:
    """A task that Accelerate has prepared, and the state that changes from iteration to iteration."""

    model: Any
    optimizer: Any
    schedule: torch.optim.lr_scheduler.LambdaLR
    average: EMAModel | None
    progress: Progress
    checkpoints: Checkpoints
    log: Log
    # For a network that is split over processes (FSDP): receives its whole weights at the end.
    whole: nn.Module | None


class LossSums:
    """Sums of the losses since the last regular log record; their means go to the log, the sums into checkpoints."""

    def __init__(self, accelerator: Accelerator, progress: Progress) -> None:
        self._accelerator, self._progress = accelerator, progress
        self._sums = torch.tensor(progress.sums, device=accelerator.device) if progress.parts else None

    def add(self, losses: dict[str, Tensor]) -> None:
        """Add the losses of one backward pass."""
        values = torch.stack([value.detach().float() for value in losses.values()])
        self._sums = values if self._sums is None else self._sums + values
        self._progress.parts += 1

    def means(self) -> list[float]:
        """Mean losses over passes and processes."""
        assert self._sums is not None
        return self._accelerator.reduce(self._sums / self._progress.parts, "mean").tolist()

    def clear(self) -> None:
        """Reset the sums."""
        self._sums, self._progress.parts = None, 0

    def keep(self) -> None:
        """Copy the sums to the progress, which checkpoints save."""
        if self._sums is not None:
            self._sums = self._accelerator.reduce(self._sums, "mean")
        self._progress.sums = [] if self._sums is None else self._sums.tolist()


def run(
    task: Task, train: dict[str, Any], accelerator: Accelerator, output: Path, resume: bool, stop_after: int | None
) -> None:
    """Train until the recipe's iterations are done, or to ``stop_after``.

    Args:
        task: what is trained.
        train: the recipe's section; :func:`start` has filled in its defaults.
        accelerator: from :func:`start`.
        output: folder for checkpoints and log.
        resume: continue from the newest checkpoint in ``output``.
        stop_after: end after this iteration as if it were the last; a resumed run continues from there.

    Raises:
        typer.BadParameter: the run is not resumed, but ``output`` holds checkpoints; validation does not give the
            figure that chooses the best weights; or the network has no gradient checkpointing.
        ArithmeticError: no validation gave a finite figure to choose the best by.
        typer.Exit: the run was interrupted by Ctrl-C or SIGTERM, and saved.
    """
    training = prepare(task, train, accelerator, output, resume)
    model, optimizer, progress = training.model, training.optimizer, training.progress
    last = min(train["iterations"], stop_after or train["iterations"])
    batches, sums = task.batches(progress.step), LossSums(accelerator, progress)
    bar = tqdm(total=last, initial=progress.step, disable=not accelerator.is_main_process, desc="train")
    # The bar ends its line also before an error.
    with bar, Interruption() as interruption:
        while progress.step < last:
            # A step's random numbers depend only on its number and the process, so that a resumed run repeats them.
            torch.manual_seed(train["seed"] + SEED_STRIDE * progress.step + accelerator.process_index)
            for part in range(train["accumulation"]):
                batch = send_to_device(next(batches), accelerator.device)
                with nullcontext() if part + 1 == train["accumulation"] else accelerator.no_sync(model):
                    losses = task.losses(model, batch, progress.step)
                    accelerator.backward(losses["loss"] / train["accumulation"])
                sums.add(losses)
            accelerator.clip_grad_norm_(model.parameters(), train["max_grad_norm"])
            optimizer.step()
            training.schedule.step()
            optimizer.zero_grad(set_to_none=True)
            if training.average:
                training.average.step(task.model.parameters())
            progress.step += 1
            bar.update()

            asked = anywhere(interruption.asked, accelerator)
            ends = progress.step == last or asked
            validates = task.validate is not None and due(progress.step, train["validate_every"], last)
            if ends or validates or record_is_due(progress.step, task, train):
                record = record_of(training, task, dict(zip(losses, sums.means(), strict=True)), accelerator)
                # After an early end the sums are kept, so that the next record of the resumed run includes them.
                if record_is_due(progress.step, task, train):
                    sums.clear()
                if validates:
                    record |= validate(task, train, training.average, accelerator, output, progress)
                bar.set_postfix(loss=f"{record['loss']:.5f}")
                training.log.write(record)
            if train["checkpoint_every"] and (progress.step % train["checkpoint_every"] == 0 or ends):
                progress.seconds = training.log.seconds()
                sums.keep()
                training.checkpoints.save(progress.step)
            if asked:
                break
    finish(training, task, train, accelerator, output, interrupted=progress.step < last)


def prepare(task: Task, train: dict[str, Any], accelerator: Accelerator, output: Path, resume: bool) -> Training:
    """Set up everything that a run needs, from its newest checkpoint if it is resumed; arguments as in :func:`run`."""
    if train["best_by"] and train["best_by"].lstrip("-") not in task.figures:
        raise typer.BadParameter(f"best_by is '{train['best_by']}'; validation gives {', '.join(task.figures)}")
    if train["gradient_checkpointing"]:
        enable_gradient_checkpointing(task.model)
    task.model.train()
    schedule = torch.optim.lr_scheduler.LambdaLR(task.optimizer, lambda step: rate_factor(step, train))
    average = None
    if train["ema_decay"]:
        average = EMAModel(task.model.parameters(), train["ema_decay"], use_ema_warmup=True, power=3 / 4)
    progress = Progress()
    whole = copy.deepcopy(task.model) if accelerator.distributed_type == DistributedType.FSDP else None
    model, optimizer = accelerator.prepare(task.model, task.optimizer)
    if train["compile"]:
        model = torch.compile(model)
    others = (progress, schedule, *([average] if average else []))
    checkpoints = Checkpoints(accelerator, output, train["checkpoints_kept"], others)
    if resume:
        checkpoints.restore()
    else:
        refuse_other_run(output)
    if average:  # only now, because averages from a checkpoint are on the CPU
        average.to(accelerator.device)
    log = Log(accelerator, output, progress)
    if train["trackers"]:
        start_trackers(train, accelerator, output, progress)
    return Training(model, optimizer, schedule, average, progress, checkpoints, log, whole)


def enable_gradient_checkpointing(model: Any) -> None:
    """Enable gradient checkpointing by transformers' or diffusers' method.

    Raises:
        typer.BadParameter: the network has none.
    """
    if not getattr(model, "_supports_gradient_checkpointing", True):
        raise typer.BadParameter(f"{type(model).__name__} has no gradient_checkpointing: set it to false")
    enable = getattr(model, "gradient_checkpointing_enable", None) or model.enable_gradient_checkpointing
    enable()


def start_trackers(train: dict[str, Any], accelerator: Accelerator, output: Path, progress: Progress) -> None:
    """Start the trackers; those of a resumed run continue, although they may be ahead of its checkpoint."""
    config = {k: v for k, v in train.items() if isinstance(v, (int, float, str))}
    same = {
        "tensorboard": {"purge_step": progress.step + 1},
        "trackio": {"name": progress.name, "resume": "allow"},
        "wandb": {"id": progress.name, "resume": "allow"},
    }
    accelerator.init_trackers(output.name, config, {k: v for k, v in same.items() if k in train["trackers"]})


def anywhere(asked: bool, accelerator: Accelerator) -> bool:
    """Whether any process was asked to stop; then all processes stop together."""
    if accelerator.num_processes > 1:
        return accelerator.reduce(torch.tensor(float(asked), device=accelerator.device)).item() > 0
    return asked


def record_is_due(step: int, task: Task, train: dict[str, Any]) -> bool:
    """Whether a log record is due after this iteration, apart from those at an early stop."""
    validation_every = train["validate_every"] if task.validate else None
    return any(due(step, every, train["iterations"]) for every in (train["log_every"], validation_every))


def record_of(training: Training, task: Task, losses: dict[str, float], accelerator: Accelerator) -> dict[str, Any]:
    """The log record of an iteration, without validation figures."""
    return {
        "step": training.progress.step,
        **losses,
        "learning_rate": training.optimizer.param_groups[0]["lr"],
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        **(task.measures() if task.measures else {}),
    }


def finish(
    training: Training, task: Task, train: dict[str, Any], accelerator: Accelerator, output: Path, interrupted: bool
) -> None:
    """Put the weights to save (last, averaged or best) into ``task.model``; end the program after Ctrl-C."""
    if training.whole is not None:
        task.model = gather(training.model, training.whole).to(accelerator.device)
    # Processes wait for each other and close the process group: leaving earlier can abort them at exit.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    progress = training.progress
    if interrupted:
        saved = "which is saved: go on with --resume" if train["checkpoint_every"] else "and no checkpoint was wanted"
        if accelerator.is_main_process:
            typer.echo(f"interrupted after iteration {progress.step}, {saved}", err=True)
        raise typer.Exit(INTERRUPTED)
    if training.average:
        training.average.copy_to(task.model.parameters())
    if train["best_by"] and accelerator.is_main_process:
        if progress.best is None:
            raise ArithmeticError(
                f"no validation gave a finite {train['best_by']}: the last weights are in the checkpoint"
            )
        load_model(task.model, output / BEST_WEIGHTS)


def due(step: int, every: int | None, last: int) -> bool:
    """Whether an event that occurs every ``every`` iterations (None, 0: never) and at the end occurs now."""
    return (step % every == 0 or step == last) if every else False


def gather(model: nn.Module, whole: nn.Module) -> nn.Module:
    """Load the weights of a network split over processes (FSDP) into ``whole`` on the main process; all call this."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if weights:
        whole.load_state_dict(weights)
    return whole


def validate(
    task: Task,
    train: dict[str, Any],
    average: EMAModel | None,
    accelerator: Accelerator,
    output: Path,
    progress: Progress,
) -> dict[str, float]:
    """Figures of the averaged weights, which are saved if they are the best so far; {} on all but the main process."""
    figures: dict[str, float] = {}
    if accelerator.is_main_process:
        assert task.validate
        if average:
            average.store(task.model.parameters())
            average.copy_to(task.model.parameters())
        task.model.eval()
        with torch.no_grad():
            figures = task.validate()
        task.model.train()
        if train["best_by"]:
            value = figures[train["best_by"].lstrip("-")] * (-1 if train["best_by"].startswith("-") else 1)
            if math.isfinite(value) and (progress.best is None or value > progress.best):
                progress.best = value
                about = figures | {"weights_of_iteration": progress.step}
                with whole_file(output / BEST_WEIGHTS) as temporary:
                    save_model(task.model, str(temporary), {VALIDATION: to_json(about)})
        if average:
            average.restore(task.model.parameters())
    accelerator.wait_for_everyone()
    return figures
