"""python scripts/benchmarks/training_step.py --json training.json: a training step of the segmentation network, form beside form.

One step is what ``finetune.py`` does: bfloat16 forward, Dice and cross-entropy, backward, clipping, AdamW, on random windows
of the recipe's size. Medians of interleaved rounds in one process; peak memory of each in a process of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from hf_binaryformer import __version__
from hf_binaryformer.training.recipes import load_recipe
from measure import Subject, describe_device, measure_peaks, memory_method, time_interleaved

COMMAND = "python scripts/benchmarks/training_step.py"
# Name, attention_type, bit_gradient, learned_logit_scale, whether bits are balanced, whether the values are reduced. The
# others are compared with the first; the last is the form of the recipes.
VARIANTS = (
    ("softmax", "softmax", None, False, False, False),
    ("softmax, reduced values", "softmax", None, False, False, True),
    ("hamming", "hamming", None, False, False, True),
    ("sign, ternary, learned scale", "sign", "ternary", True, False, True),
    ("sign, ternary, learned scale, balanced", "sign", "ternary", True, True, True),
)

# Of ViT-S/8: patch side in pixels, channels of a head, and of its values when they are reduced.
PATCH, HEAD_DIM, REDUCED_DIM = 8, 64, 16


@dataclass(frozen=True, kw_only=True)
class TrainingStep(Subject):
    """A step of a recipe's network on ``batch`` square images of ``tokens`` - 1 patches."""

    recipe: str
    batch: int
    attention_type: str
    bit_gradient: str | None
    learned_logit_scale: bool
    balanced: bool

    def prepare(self) -> Callable[[], object]:
        """A whole step, including the optimizer's."""
        from hf_binaryformer.training.optimization import build_optimizer
        from hf_binaryformer.training.segmentation import build_criterion, build_model

        torch.manual_seed(0)
        settings = load_recipe(self.recipe, [])
        train = settings["train"]
        side = math.isqrt(self.tokens - 1) * PATCH
        settings["processor"]["image_size"] = [side, side]
        settings["model"] |= {
            "timm_checkpoint": False,
            "attention_type": self.attention_type,
            "bit_gradient": self.bit_gradient,
            "learned_logit_scale": self.learned_logit_scale,
            "query_key_centering": "tokens" if self.balanced else "none",
            "query_key_norm": "rms" if self.balanced else "none",
            "value_head_dim": self.value_dim,
        }
        classes = settings["data"]["classes"]
        model, processor = build_model(settings, {label: str(label) for label in range(classes)})
        model.train().to(self.device)
        optimizer, criterion = build_optimizer(model, train), build_criterion(train)
        pixels = torch.randn(self.batch, processor.num_channels, side, side, device=self.device)
        labels = torch.randint(classes, (self.batch, 1, side, side), device=self.device)

        def step() -> float:
            with torch.autocast(self.device, torch.bfloat16):
                logits = model(pixels).logits
            loss = criterion(logits.float(), labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), train["max_grad_norm"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            value: float = loss.item()
            if not math.isfinite(value):
                raise ArithmeticError(f"the loss of '{self.name}' is {value}")
            return value

        return step


def subjects(recipe: str, batch: int, device: str = "cpu") -> list[Subject]:
    """Every variant."""
    side = load_recipe(recipe, [])["processor"]["image_size"][0]
    return [
        TrainingStep(
            name=name,
            family="training step",
            tokens=(side // PATCH) ** 2 + 1,
            head_dim=HEAD_DIM,
            value_dim=REDUCED_DIM if reduced else HEAD_DIM,
            dtype="bfloat16",
            step=True,
            device=device,
            is_baseline=attention_type == "softmax" and not reduced,
            is_float=attention_type == "softmax",
            recipe=recipe,
            batch=batch,
            attention_type=attention_type,
            bit_gradient=bit_gradient,
            learned_logit_scale=learned_logit_scale,
            balanced=balanced,
        )
        for name, attention_type, bit_gradient, learned_logit_scale, balanced, reduced in VARIANTS
    ]


def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="Write every figure here.")] = None,
    recipe: Annotated[str, typer.Option(help="Of finetune.py, with a ViT-S/8.")] = "amos",
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each; the median counts.")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch; default: as many as torch takes.")] = None,
) -> None:
    """Time and peak memory."""
    if json_path is not None and not json_path.parent.is_dir():
        raise typer.BadParameter(f"{json_path} cannot be written: there is no folder {json_path.parent}")
    used = threads or torch.get_num_threads()
    torch.set_num_threads(used)
    results = time_interleaved(subjects(recipe, batch), rounds, 0.0, "training step")
    measure_peaks(results, used)
    size = results[0].subject.tokens
    table = Table("attention", "d_v", "ms", "speed-up", "peak GiB", title=f"Training step, {batch} images, N = {size}")
    for r in results:
        memory = "-" if r.peak_bytes is None else f"{r.peak_bytes / 2**30:.2f}"
        cells = (str(r.subject.value_dim), f"{r.milliseconds:.0f}", f"{r.ratio_to_sdpa:.2f}", memory)
        table.add_row(r.subject.name, *cells)
    Console().print(table)
    record: dict[str, Any] = {
        "device": describe_device(),
        "threads": used,
        "versions": {"torch": torch.__version__, "hf_binaryformer": __version__},
        "command": f"{COMMAND} --recipe {recipe} --batch {batch} --rounds {rounds} --threads {used}",
        "memory_method": memory_method(),
        "batch": batch,
        "rows": [r.row() for r in results],
        "samples": [[round(ms, 2) for ms in r.samples] for r in results],
    }
    if json_path is not None:
        json_path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
