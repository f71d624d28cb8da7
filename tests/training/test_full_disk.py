"""A training without space for a checkpoint says so, keeps the older checkpoints, and goes on from them."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_binaryformer.pipelines.whole_files import WriteError
from hf_binaryformer.training import loop, run_log
from hf_binaryformer.training.checkpoints import checkpoints_of, find_damage
from hf_binaryformer.training.recipes import ATTENTION_DEFAULTS, DEFAULTS

SETTINGS = {
    **DEFAULTS, **ATTENTION_DEFAULTS, "iterations": 6, "batch_size": 1, "learning_rate": 0.1, "schedule": "cosine",
    "warmup": 0, "warmup_start": 1.0, "max_grad_norm": 1.0, "mixed_precision": "no", "gradient_checkpointing": False,
    "seed": 0, "log_every": 1, "checkpoint_every": 2,
}  # fmt: skip


def train(output: Path, resume: bool = False, stop_after: int | None = None) -> torch.Tensor:
    """Weights after a run that draws its batches by the number of the iteration."""
    settings = dict(SETTINGS)
    accelerator = loop.start(settings, output)
    model = nn.Linear(3, 1)
    task = loop.Task(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        batches=lambda first: (torch.full((1, 3), float(number)) for number in range(first, 6)),
        losses=lambda network, batch, step: {"loss": (network(batch) - 1).square().mean()},
    )
    loop.run(task, settings, accelerator, output, resume, stop_after)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def write_half(accelerator: object, folder: str) -> None:
    (Path(folder) / "model.safetensors").write_bytes(b"half")
    raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")


def test_a_checkpoint_for_which_there_is_no_space_leaves_the_older_ones(tmp_path, monkeypatch, capsys):
    expected = train(tmp_path / "a")
    output = tmp_path / "b"
    train(output, stop_after=4)
    older = checkpoints_of(output)
    with monkeypatch.context() as patch:
        patch.setattr("accelerate.Accelerator.save_state", write_half)
        said = "could not be written completely .*: free some space, then start again, with --resume"
        # Held, because a bar that nobody holds ends its line.
        with pytest.raises(WriteError, match=said) as stopped:
            train(output, resume=True)
    # An error begins on a line of its own.
    assert capsys.readouterr().err.endswith("\n") and stopped.tb
    assert checkpoints_of(output) == older and not any(find_damage(place) for place in older)
    assert {path.name for path in (output / "checkpoints").iterdir()} == {place.name for place in older}
    assert torch.equal(train(output, resume=True), expected)


def test_a_log_for_which_there_is_no_space_is_told(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_log, "to_json", full)
    with pytest.raises(WriteError, match=r"no space left for .*log\.jsonl .*with --resume"):
        train(tmp_path)
