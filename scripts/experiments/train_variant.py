"""python scripts/experiments/train_variant.py --variant row-maximum --recipe R --tokens T --output O

Runs the training of train_sampler.py in one of the variants of ``variants.py``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from hf_binaryformer.modeling.vq_transformer import BinaryVQTransformer3DModel
from hf_binaryformer.pipelines.absorbing_scheduler import AbsorbingScheduler
from hf_binaryformer.training.loop import Task
from hf_binaryformer.training.options import Overrides, Resume
from hf_binaryformer.training.recipes import VQ_RECIPES, load_recipe
from hf_binaryformer.training.sampler import train
from variants import FORMS, from_ste, taught


def main(
    variant: Annotated[str, typer.Option(help="One of those in variants.py.")],
    recipe: Annotated[str, typer.Option(help="As for train_sampler.py.")],
    tokens: Annotated[Path, typer.Option(help="Folder written by encode_tokens.py.")],
    output: Annotated[Path, typer.Option(help="Where checkpoints, log and model go.")],
    resume: Resume = False,
    overrides: Overrides = None,
) -> None:
    """Train and save."""
    settings = load_recipe(recipe, overrides or [], VQ_RECIPES, "sampler")
    name, _, argument = variant.partition(":")
    if name in FORMS:
        settings["transformer"]["attention_type"] = FORMS[name]
    elif name not in ("from-ste", "teacher"):
        raise typer.BadParameter(f"no variant '{variant}'; known are {', '.join(FORMS)}, from-ste and teacher:FOLDER")

    def change(task: Task, scheduler: AbsorbingScheduler) -> Task:
        if name == "from-ste":
            return replace(task, losses=from_ste(task, settings["sampler"]))
        if name == "teacher":
            teacher = BinaryVQTransformer3DModel.from_pretrained(argument).eval()
            return replace(task, losses=taught(teacher, task, settings["sampler"]))
        return task

    train(settings, tokens, output, resume=resume, change=change)


if __name__ == "__main__":
    typer.run(main)
