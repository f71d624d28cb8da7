"""Parts of the training loop alone: what is validated, what a step draws, and the loss of a segmentation."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import nn

from hf_binaryformer.pipelines import precision
from hf_binaryformer.training import loop, sampler
from hf_binaryformer.training.checkpoints import BEST_WEIGHTS
from hf_binaryformer.training.recipes import ATTENTION_DEFAULTS, DEFAULTS
from hf_binaryformer.training.segmentation import build_criterion

SETTINGS = {
    **DEFAULTS, **ATTENTION_DEFAULTS, "iterations": 3, "batch_size": 1, "learning_rate": 0.0, "theta_lr_scale": 1.0,
    "weight_decay": 0.0, "schedule": "cosine", "warmup": 0, "warmup_start": 1.0, "max_grad_norm": 1.0,
    "mixed_precision": "no", "gradient_checkpointing": False, "seed": 0, "log_every": 1, "checkpoint_every": 0,
}  # fmt: skip


def test_averaged_weights_are_validated_and_saved_and_the_others_restored(tmp_path: Path) -> None:
    model = nn.Linear(1, 1, bias=False).train()
    nn.init.constant_(model.weight, 1.0)
    average = EMAModel(model.parameters(), 0.5)
    nn.init.constant_(model.weight, 5.0)
    modes = []

    def validation() -> dict[str, float]:
        modes.append((model.training, torch.is_grad_enabled()))
        return {"weight": model.weight.item()}

    task: Any = SimpleNamespace(model=model, validate=validation)
    accelerator: Any = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
    progress: Any = SimpleNamespace(best=None, step=1)
    settings = {"best_by": "weight"}
    for used, weight in ((average, 1.0), (None, 5.0)):
        progress.best = None
        assert loop.validate(task, settings, used, accelerator, tmp_path, progress) == {"weight": weight}
        assert load_file(tmp_path / BEST_WEIGHTS)["weight"].item() == progress.best == weight
        assert model.weight.item() == 5.0 and model.training
    assert modes == [(False, False)] * 2


def draws(folder: Path, monkeypatch: pytest.MonkeyPatch, process: int = 0, seed: int = 0) -> list[float]:
    """What the network of each step draws in a run of three steps."""
    folder.mkdir()
    settings = SETTINGS | {"seed": seed}
    accelerator = loop.start(settings, folder)
    if process:
        monkeypatch.setattr(type(accelerator), "process_index", property(lambda self: process))
    model, found = nn.Linear(1, 1), []

    def losses(network: nn.Module, batch: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
        found.append(torch.rand(()).item())
        return {"loss": network(batch).square().mean()}

    task = loop.Task(
        model,
        torch.optim.SGD(model.parameters(), 0.0),
        batches=lambda first: iter([torch.ones(1, 1)] * 3),
        losses=losses,
    )
    loop.run(task, settings, accelerator, folder, False, None)
    return found


def test_every_step_process_and_seed_draws_its_own_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = draws(tmp_path / "a", monkeypatch)
    assert draws(tmp_path / "again", monkeypatch) == first
    other_seed = draws(tmp_path / "b", monkeypatch, seed=1)
    other_process = draws(tmp_path / "c", monkeypatch, process=1)
    assert len({*first, *other_seed}) == len({*first, *other_process}) == 6


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_loss_is_cross_entropy_and_dice_of_the_labels_without_background(batch_dice: bool, weight: float) -> None:
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 1, 4, 5))
    probability = logits.exp() / logits.exp().sum(1, keepdim=True)
    cross_entropy, dice = 0.0, []
    for b in range(2):
        for i in range(4):
            for j in range(5):
                cross_entropy -= float(probability[b, labels[b, 0, i, j], i, j].log()) / 40
    for samples in [[0, 1]] if batch_dice else [[0], [1]]:
        for label in (1, 2):
            p, g = probability[samples, label], (labels[samples, 0] == label).float()
            dice.append(1 - (2 * float((p * g).sum()) + 1e-5) / (float(p.sum() + g.sum()) + 1e-5))
    found = build_criterion({"batch_dice": batch_dice, "dice_weight": weight})(logits, labels)
    assert float(found) == pytest.approx(cross_entropy + weight * sum(dice) / len(dice), rel=1e-4)


class Noise(nn.Module):
    """A network that knows nothing; remembers its inputs."""

    config = SimpleNamespace(num_codebooks=2)

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.seen = size, []

    def forward(self, tokens: torch.Tensor) -> SimpleNamespace:
        self.seen.append(tokens)
        return SimpleNamespace(logits=torch.zeros(tokens.shape[0], 2, self.size, *tokens.shape[2:]))


def validated(seed: int, times: int = 4) -> tuple[dict[str, float], list[torch.Tensor]]:
    import contextlib

    import hf_binaryformer as bf

    scheduler = bf.AbsorbingScheduler(num_train_timesteps=16, mask_token_id=4, num_codebooks=2)
    network = Noise(4)
    tokens = torch.randint(4, (6, 2, 4, 4, 4), generator=torch.Generator().manual_seed(9)).to(torch.uint8)
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"), autocast=contextlib.nullcontext)
    settings = {"seed": seed, "batch_size": 4, "validation_times": times}
    return sampler.validate(network, tokens, scheduler, settings, accelerator), network.seen  # type: ignore[arg-type]


def test_every_validation_of_the_sampler_has_the_same_masks() -> None:
    torch.manual_seed(1)
    figures, seen = validated(seed=0)
    torch.manual_seed(2)
    again, seen_again = validated(seed=0)
    assert figures == again and all(torch.equal(a, b) for a, b in zip(seen, seen_again, strict=True))
    assert figures != validated(seed=1)[0]
    # Batches of 4 and 2, each at the times 3, 7, 11 and 15 of 16, the middles of quarters.
    shares = [float((one == 4).float().mean()) for one in seen]
    assert [len(one) for one in seen] == [4] * 4 + [2] * 4
    assert shares == pytest.approx([t / 16 for t in (3, 7, 11, 15)] * 2, abs=0.08)
    # A network that knows nothing needs 2 bits for each of 2 tokens; the bound is T / t times the masked share.
    bits = [
        [2 * 2 * 16 / t * float((row == 4).float().mean()) for row in one]
        for one, t in zip(seen, [3, 7, 11, 15] * 2, strict=True)
    ]
    assert figures["validation_bits_per_token"] == pytest.approx(sum(map(sum, bits)) / 24, rel=1e-5)


@pytest.mark.parametrize(("hardware", "used"), [(torch.bfloat16, "bf16"), (torch.float32, "no")])
def test_mixed_precision_is_found_on_each_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hardware: torch.dtype, used: str
) -> None:
    """A run that began where bfloat16 is fast must go on elsewhere, and its log must say what was used where."""
    monkeypatch.setattr(precision, "fast_format", lambda device: hardware)
    settings = SETTINGS | {"mixed_precision": "auto"}
    try:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = loop.start(settings, tmp_path)
        assert accelerator.mixed_precision == used and settings["mixed_precision"] == "auto"
        training: Any = SimpleNamespace(
            progress=SimpleNamespace(step=1), optimizer=torch.optim.SGD([nn.Parameter(torch.ones(1))])
        )
        record = loop.record_of(training, SimpleNamespace(measures=None), {}, accelerator)  # type: ignore[arg-type]
        assert record["mixed_precision"] == used
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
