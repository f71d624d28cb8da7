"""`binaryformer train`: finds out which training a recipe is for, and passes the rest of the command line to it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import typer

from hf_binaryformer.training.recipes import known_recipes, trainings_of

HELP = """Train a network by a recipe: binaryformer train --recipe NAME …

Recipes (or give the path of a .yaml file), and which training each is for:

{recipes}

The options are those of the training: binaryformer train --recipe NAME --help shows them. A recipe for two trainings
needs --training, one of {trainings}. On several processes:
accelerate launch -m hf_binaryformer.training.TRAINING …
"""


def train(arguments: list[str]) -> None:
    """Run the training that ``--recipe`` names, with all arguments but ``--training``.

    Raises:
        typer.BadParameter: no recipe, an unknown one, or one that leaves the training open.
    """
    recipe, _ = take(arguments, "--recipe")
    if recipe is None:
        if {"--help", "-h"} & {*arguments} or not arguments:
            typer.echo(help_text())
            return
        raise typer.BadParameter("--recipe is missing: `binaryformer train --help` lists the recipes")
    asked, arguments = take(arguments, "--training")
    found = trainings_of(recipe)
    if asked is not None and asked not in found:
        raise typer.BadParameter(f"--training {asked}: recipe '{recipe}' is for {' and '.join(found)}")
    if asked is None and len(found) > 1:
        raise typer.BadParameter(f"recipe '{recipe}' is for {' and '.join(found)}: add --training with one of them")
    run_program(import_module(f"hf_binaryformer.training.{asked or found[0]}").main, arguments, "binaryformer train")


def run_program(main: Callable[..., Any], arguments: list[str], name: str) -> None:
    """Run a function with Typer options as the program ``name``."""
    app = typer.Typer(add_completion=False)
    app.command()(main)
    app(arguments, prog_name=name)


def help_text() -> str:
    """The text of ``binaryformer train --help``."""
    recipes = {name: trainings_of(name) for name in known_recipes()}
    lines = [f"  {name:<16} {' and '.join(trainings)}" for name, trainings in recipes.items()]
    trainings = sorted({training for found in recipes.values() for training in found})
    return HELP.format(recipes="\n".join(lines), trainings=", ".join(trainings))


def take(arguments: list[str], option: str) -> tuple[str | None, list[str]]:
    """The value of ``option`` (``--option value`` or ``--option=value``, the last one given), and the other arguments."""
    value, rest, words = None, [], iter(arguments)
    for word in words:
        if word == option:
            value = next(words, None)
        elif word.startswith(f"{option}="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    return value, rest
