"""The training loop on a line fit: accumulation, averages, best weights, checkpoints, interruptions."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import hf_binaryformer as bf
from hf_binaryformer.training import loop, optimization, run_log
from hf_binaryformer.training.checkpoints import BEST_WEIGHTS, MANIFEST, checkpoints_of, find_damage
from hf_binaryformer.training.recipes import ATTENTION_DEFAULTS, DEFAULTS
from hf_binaryformer.training.run_log import read_log

SETTINGS = {
    **DEFAULTS,
    **ATTENTION_DEFAULTS,
    "iterations": 8,
    "batch_size": 4,
    "learning_rate": 0.05,
    "theta_lr_scale": 0.1,
    "weight_decay": 0.0,
    "schedule": "cosine",
    "warmup": 2,
    "warmup_start": 0.1,
    "max_grad_norm": 1.0,
    "mixed_precision": "no",
    "gradient_checkpointing": False,
    "seed": 0,
    "log_every": 1,
    "checkpoint_every": 2,
}


class Lines(torch.utils.data.Dataset):
    """Points on a line, each from its number alone."""

    def __len__(self) -> int:
        return SETTINGS["iterations"] * SETTINGS["batch_size"]

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(3, generator=torch.Generator().manual_seed(number))
        return x, x.sum()[None]


def train(output: Path, *, resume=False, stop_after=None, on_step=None, validation=None, **overrides) -> torch.Tensor:
    """Weights after a run; ``validation`` is a list of the values that validation gives."""
    settings = SETTINGS | overrides
    accelerator = loop.start(settings, output)
    model = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.0 if settings["accumulation"] > 1 else 0.2))
    values = iter(validation or [])

    def losses(network, batch, step):
        if on_step:
            on_step(step)
        x, y = batch
        return {"loss": (network(x) - y).square().mean()}

    # Adam would hide gradients that are too large by a factor.
    plain = torch.optim.SGD(model.parameters(), settings["learning_rate"]) if settings["accumulation"] > 1 else None
    task = loop.Task(
        model,
        plain or optimization.build_optimizer(model, settings),
        batches=lambda first: loop.load_batches(Lines(), settings, accelerator, first),
        losses=losses,
        validate=(lambda: {"score": next(values), "weight": float(model[0].weight.sum())}) if validation else None,
        figures=("score", "weight") if validation else (),
    )
    loop.run(task, settings, accelerator, output, resume, stop_after)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def log(output: Path, key: str) -> list[float]:
    return [record[key] for record in read_log(output / "log.jsonl") if key in record]


def newest(output: Path) -> Path:
    return max((output / "checkpoints").iterdir())


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_run_killed_in_the_middle_of_an_iteration_ends_with_the_same_weights(tmp_path, decay):
    whole = train(tmp_path / "whole", ema_decay=decay)

    class Killed(BaseException):
        pass

    def kill(step):
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        train(tmp_path / "cut", on_step=kill, ema_decay=decay)
    assert newest(tmp_path / "cut").name == "step_00000004" and log(tmp_path / "cut", "step") == [1, 2, 3, 4, 5]
    resumed = train(tmp_path / "cut", resume=True, ema_decay=decay)
    assert torch.equal(resumed, whole)
    # What was logged past the checkpoint is not there twice.
    for key in ("step", "loss"):
        assert log(tmp_path / "cut", key) == log(tmp_path / "whole", key)
    assert [p.name for p in sorted((tmp_path / "cut" / "checkpoints").iterdir())] == ["step_00000006", "step_00000008"]


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "unfinished"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, harm):
    whole = train(tmp_path / "whole")
    train(tmp_path / "cut", stop_after=6)
    victim = next(p for p in sorted(newest(tmp_path / "cut").iterdir()) if p.name.startswith("model"))
    content = victim.read_bytes()
    if harm == "truncate":
        victim.write_bytes(content[:-5])
    elif harm == "flip":
        victim.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    elif harm == "remove":
        victim.unlink()
    else:
        (victim.parent / MANIFEST).unlink()
    with pytest.warns(UserWarning, match=r"step_00000006 is damaged \(.*(model|files\.json).*taking the one before"):
        resumed = train(tmp_path / "cut", resume=True)
    assert torch.equal(resumed, whole)


def test_what_is_saved_after_a_damaged_checkpoint_stays(tmp_path):
    train(tmp_path, stop_after=6, checkpoints_kept=3)
    (newest(tmp_path) / MANIFEST).unlink()
    with pytest.warns(UserWarning, match="step_00000006 is damaged"):
        train(tmp_path, resume=True, stop_after=5, checkpoints_kept=1)
    (left,) = checkpoints_of(tmp_path)
    assert left.name == "step_00000005" and not find_damage(left)


@pytest.mark.parametrize("saved", [False, True], ids=["died", "interrupted"])
def test_a_resumed_log_has_the_means_of_the_uninterrupted_one(tmp_path, saved):
    overrides = {"log_every": 4, "checkpoint_every": 3}
    train(tmp_path / "whole", **overrides)

    def stop(step):
        if step == 5:
            if not saved:
                raise InterruptedError
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(typer.Exit if saved else InterruptedError):
        train(tmp_path / "cut", on_step=stop, **overrides)
    assert log(tmp_path / "cut", "step") == ([4, 6] if saved else [4])
    train(tmp_path / "cut", resume=True, **overrides)
    assert log(tmp_path / "cut", "step") == log(tmp_path / "whole", "step") == [4, 8]
    assert log(tmp_path / "cut", "loss") == log(tmp_path / "whole", "loss")


def test_a_half_written_checkpoint_is_no_checkpoint(tmp_path):
    """As a killed process leaves it."""
    train(tmp_path, stop_after=2)
    half = tmp_path / "checkpoints" / "step_00000004.partial"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert [p.name for p in checkpoints_of(tmp_path)] == ["step_00000002"]
    train(tmp_path, resume=True)
    assert log(tmp_path, "step") == list(range(1, 9)) and not find_damage(newest(tmp_path))


def test_resume_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="start without --resume"):
        train(tmp_path, resume=True)
    train(tmp_path, stop_after=2)
    (newest(tmp_path) / MANIFEST).unlink()
    with pytest.warns(UserWarning), pytest.raises(FileNotFoundError, match=r"damaged \(step_00000002\): remove it"):
        train(tmp_path, resume=True)


def test_a_log_that_was_cut_short_does_no_harm(tmp_path):
    train(tmp_path, stop_after=4)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    train(tmp_path, resume=True)
    assert log(tmp_path, "step") == list(range(1, 9))


def test_the_seconds_of_all_starts_are_counted(tmp_path, monkeypatch):
    for resume in (False, True):
        clock = itertools.count()
        monkeypatch.setattr(run_log, "time", SimpleNamespace(perf_counter=clock.__next__))
        train(tmp_path, resume=resume, stop_after=None if resume else 4)
    seconds = log(tmp_path, "seconds")
    assert len(seconds) == 8 and seconds == sorted(set(seconds)) and seconds[-1] < 20


def test_what_is_not_a_number_is_null_in_the_log(tmp_path):
    train(tmp_path, validate_every=4, validation=[math.nan, 0.5])
    assert "NaN" not in (tmp_path / "log.jsonl").read_text() and log(tmp_path, "score") == [None, 0.5]


def test_without_checkpoints_an_interrupted_run_says_that_it_is_lost(tmp_path, capsys):
    with pytest.raises(typer.Exit):
        train(tmp_path, on_step=lambda step: os.kill(os.getpid(), 2) if step == 3 else None, checkpoint_every=None)
    assert "interrupted after iteration 4, and no checkpoint was wanted" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_saved_and_can_go_on(tmp_path, number, capsys):
    whole = train(tmp_path / "whole")
    before = signal.getsignal(number)
    with pytest.raises(typer.Exit) as exit_:
        train(tmp_path / "cut", on_step=lambda step: os.kill(os.getpid(), number) if step == 4 else None)
    assert exit_.value.exit_code == 130 and signal.getsignal(number) is before
    assert "interrupted after iteration 5, which is saved: go on with --resume" in capsys.readouterr().err
    assert newest(tmp_path / "cut").name == "step_00000005"
    assert torch.equal(train(tmp_path / "cut", resume=True), whole)


def test_a_second_interrupt_stops_at_once(tmp_path):
    def twice(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, on_step=twice)
    assert newest(tmp_path).name == "step_00000002"


def test_gradients_are_clipped(tmp_path):
    # Plain gradient descent: no step is longer than its rate times the largest norm.
    start = train(tmp_path / "start", stop_after=1, accumulation=2, max_grad_norm=0.0)
    clipped, free = (
        train(tmp_path / str(norm), stop_after=1, accumulation=2, max_grad_norm=norm, warmup_start=1.0)
        for norm in (0.01, 1e9)
    )
    assert torch.dist(clipped, start).item() == pytest.approx(0.05 * 0.01, rel=1e-3)
    assert torch.dist(free, start) > 10 * torch.dist(clipped, start)


def test_accumulated_batches_are_the_whole_batch(tmp_path):
    # The gradients of the samples one by one, against those of their halves.
    four = train(tmp_path / "four", accumulation=4, max_grad_norm=1e9)
    two = train(tmp_path / "two", accumulation=2, max_grad_norm=1e9)
    torch.testing.assert_close(four, two)
    assert log(tmp_path / "four", "loss") == pytest.approx(log(tmp_path / "two", "loss"))
    weight, bias = (p.detach().clone() for p in start_weights())
    for step in range(SETTINGS["iterations"]):
        x = torch.stack([Lines()[4 * step + n][0] for n in range(4)])
        error = x @ weight.T + bias - x.sum(1, keepdim=True)
        rate = SETTINGS["learning_rate"] * optimization.rate_factor(step, SETTINGS)
        weight, bias = weight - rate * 2 * (error * x).mean(0), bias - rate * 2 * error.mean(0)
    torch.testing.assert_close(four, torch.cat([weight.flatten(), bias]))
    with pytest.raises(
        typer.BadParameter, match="batch_size 4 must be divisible by the 1 processes times accumulation 3"
    ):
        train(tmp_path / "three", accumulation=3)


def start_weights() -> list[torch.Tensor]:
    """Of the line before its first step."""
    torch.manual_seed(SETTINGS["seed"])
    return list(nn.Linear(3, 1).parameters())


def test_validation_leaves_the_training_as_it_was(tmp_path):
    without = train(tmp_path / "without", ema_decay=0.9)
    with_ = train(tmp_path / "with", ema_decay=0.9, validate_every=2, validation=[0.0] * 4)
    assert torch.equal(without, with_) and log(tmp_path / "without", "loss") == log(tmp_path / "with", "loss")


def test_averages_follow_the_weights(tmp_path):
    last, averaged = train(tmp_path / "last"), train(tmp_path / "averaged", ema_decay=0.9)
    start = train(tmp_path / "start", stop_after=1, warmup_start=0.0)
    assert not torch.equal(last, averaged)
    assert torch.dist(averaged, start) < torch.dist(last, start)


@pytest.mark.parametrize("best_by, chosen", [("score", 2), ("-score", 1), (None, 3)])
def test_the_best_weights_by_validation_are_kept(tmp_path, best_by, chosen):
    weights = train(tmp_path, validate_every=2, best_by=best_by, validation=[0.5, 0.1, 0.9, 0.2])
    sums = log(tmp_path, "weight")
    assert len(sums) == 4 and len(set(sums)) == 4 and log(tmp_path, "score") == [0.5, 0.1, 0.9, 0.2]
    assert float(weights[:3].sum()) == pytest.approx(sums[chosen], abs=1e-6)
    settings = {"train": SETTINGS | {"best_by": best_by}}
    run_log.write_summary(settings, "train", tmp_path, torch.device("cpu"))
    summary = json.loads((tmp_path / "training.json").read_text())
    assert summary["weight"] == sums[chosen] and summary["iterations"] == 8
    assert summary.get("weights_of_iteration") == (2 * (chosen + 1) if best_by else None)


def test_the_best_so_far_survives_a_restart(tmp_path):
    train(tmp_path, validate_every=2, best_by="score", validation=[0.9, 0.1], stop_after=4)
    best = load_file(tmp_path / BEST_WEIGHTS)
    weights = train(tmp_path, validate_every=2, best_by="score", validation=[0.5, 0.2], resume=True)
    assert torch.equal(weights[:3], best["0.weight"].flatten())


def test_a_validation_without_a_finite_figure_chooses_nothing(tmp_path):
    weights = train(tmp_path / "a", validate_every=2, best_by="score", validation=[math.nan, 0.1, math.inf, 0.05])
    assert float(weights[:3].sum()) == pytest.approx(log(tmp_path / "a", "weight")[1], abs=1e-6)
    with pytest.raises(ArithmeticError, match="no validation gave a finite score"):
        train(tmp_path / "b", validate_every=2, best_by="score", validation=[math.nan] * 4)


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(typer.BadParameter, match="best_by is 'dice'; validation gives score, weight"):
        train(tmp_path, validate_every=2, best_by="dice", validation=[0.5])
    with pytest.raises(typer.BadParameter, match="tracker nonsense is not installed; here are"):
        train(tmp_path, trackers=["nonsense"])
    with pytest.raises(typer.BadParameter, match="save_dtype is 'half16', expected float32"):
        train(tmp_path, save_dtype="half16")
    with pytest.raises(typer.BadParameter, match="schedule is 'cosin', expected cosine or step"):
        train(tmp_path, schedule="cosin")
    with pytest.raises(typer.BadParameter, match="checkpoints_kept is 0, expected at least 1"):
        train(tmp_path, checkpoints_kept=0)


@pytest.mark.parametrize("trackers", [["tensorboard"], "tensorboard"])
def test_trackers_get_the_records(tmp_path, trackers):
    train(tmp_path, trackers=trackers)
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents*")).parent)).Reload()
    drawn = {event.step: event.value for event in events.Scalars("loss")}
    assert [drawn[step] for step in log(tmp_path, "step")] == pytest.approx(log(tmp_path, "loss"))


def test_a_resumed_run_does_not_give_a_tracker_a_step_twice(tmp_path):
    train(tmp_path, trackers=["tensorboard"], stop_after=6)
    shutil.rmtree(newest(tmp_path))
    train(tmp_path, trackers=["tensorboard"], resume=True)
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents*")).parent)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [*range(1, 9)]


@pytest.mark.parametrize(
    ("tracker", "written"), [("trackio", "trackio/run.db"), ("wandb", "wandb/offline-run-*/run-*.wandb")]
)
def test_trackers_that_are_not_required(tmp_path, tracker, written, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    pytest.importorskip(tracker)
    train(tmp_path / "run", trackers=[tracker])
    assert len(list(tmp_path.glob(written))) == 1


@pytest.mark.slow
def test_a_compiled_network_trains_alike(tmp_path):
    eager, compiled = train(tmp_path / "eager", accumulation=2), train(tmp_path / "c", accumulation=2, compile=True)
    torch.testing.assert_close(eager, compiled)


def test_frozen_queries_and_keys_stay_and_the_rest_learns():
    config = bf.BinaryFormerConfig(
        token_type="pixel", image_size=4, num_channels=1, hidden_size=16, num_heads=2, num_hidden_layers=2,
        value_head_dim=4, class_token=False, num_labels=3, attention_type="softmax",
    )  # fmt: skip
    model = bf.BinaryFormerForImageClassification(config)
    optimizer = optimization.build_optimizer(model, SETTINGS | {"weight_decay": 0.5, "freeze_query_key": True})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        model(torch.randn(5, 1, 4, 4), labels=torch.tensor([0, 1, 2, 0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        if ".qkv." in name:
            assert torch.equal(parameter[:32], before[name][:32]) and not torch.equal(parameter[32:], before[name][32:])
        else:
            assert not torch.equal(parameter, before[name]), name


def test_theta_and_learned_scales_have_rates_of_their_own():
    model = torch.nn.Module()
    for name in ("key_theta", "attn", "head"):
        setattr(model, name, torch.nn.Linear(2, 2, bias=False))
    model.attn.log_scale = torch.nn.Parameter(torch.zeros(2))
    optimizer = optimization.build_optimizer(model, SETTINGS | {"learning_rate": 0.5, "epsilon": 1e-5})
    rates = {id(p): (group["lr"], group["eps"]) for group in optimizer.param_groups for p in group["params"]}
    wanted = {"key_theta.weight": 0.05, "attn.weight": 0.5, "attn.log_scale": 5.0, "head.weight": 0.5}
    assert {name: rates[id(p)] for name, p in model.named_parameters()} == {k: (v, 1e-5) for k, v in wanted.items()}


@pytest.mark.parametrize(("every", "steps"), [(3, [3, 6, 7]), (None, []), (0, [])])
def test_what_happens_every_so_often_happens_in_the_end_or_never(every, steps):
    assert [step for step in range(1, 8) if loop.due(step, every, last=7)] == steps
