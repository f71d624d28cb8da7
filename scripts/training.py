"""What the training scripts share: recipes, the learning rate's course, the count of iterations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import typer
import yaml

RECIPES = Path(__file__).parent / "recipes"
VQ_RECIPES = RECIPES / "vq"


def load_recipe(name: str, overrides: list[str], folder: Path = RECIPES) -> dict[str, Any]:
    """A recipe by name or path, with ``section.key=value`` overrides (values as YAML).

    Raises:
        typer.BadParameter: no such recipe or section; says which there are.
    """
    path = Path(name) if name.endswith(".yaml") else folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise typer.BadParameter(f"no recipe '{name}'; known are {known}, or give the path of a .yaml file")
    recipe: dict[str, Any] = yaml.safe_load(path.read_text())
    for override in overrides:
        key, _, value = override.partition("=")
        section, _, field = key.partition(".")
        if section not in recipe or not field:
            raise typer.BadParameter(f"--set {override}: expected section.key=value, sections are {', '.join(recipe)}")
        recipe[section][field] = yaml.safe_load(value)
    return recipe


def rate_factor(step: int, train: dict[str, Any]) -> float:
    """Learning-rate factor: linear warm-up, then cosine to 0, or the paper's steps (x decay_factor every decay_every)."""
    warmup = train["warmup"]
    if step < warmup:
        return train["warmup_start"] + (1 - train["warmup_start"]) * step / warmup
    if train["schedule"] == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(train["iterations"] - warmup, 1)))
    return train["decay_factor"] ** ((step - warmup) // train["decay_every"])


class StepCounter:
    """How many iterations are done; travels with Accelerate's checkpoints."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        """For Accelerate."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """For Accelerate."""
        self.step = state["step"]
