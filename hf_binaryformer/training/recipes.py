"""Recipes of trainings: ``recipes/*.yaml`` with every setting of a run, and the recipe that a run's folder keeps."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import typer
import yaml
from huggingface_hub.errors import StrictDataclassError

from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.image_processing import BinaryFormerImageProcessor
from hf_binaryformer.modeling.vq_autoencoder import BinaryVQModel
from hf_binaryformer.modeling.vq_transformer import BinaryVQTransformer3DModel
from hf_binaryformer.pipelines.absorbing_scheduler import AbsorbingScheduler
from hf_binaryformer.pipelines.whole_files import write_text
from hf_binaryformer.training.checkpoints import refuse_other_run

RECIPES = Path(__file__).parent / "recipes"
VQ_RECIPES = RECIPES / "vq"
PIXEL_RECIPES = RECIPES / "pixels"
# Defaults of a training's section, which a recipe may leave out.
DEFAULTS: dict[str, Any] = {
    "accumulation": 1,  # number of batches, each of batch_size / accumulation, whose gradients are summed
    "ema_decay": 0.0,  # of averaged weights, which are validated and saved; 0: the last weights are used
    "compile": False,
    "gradient_checkpointing": False,
    "trackers": [],  # tensorboard, trackio, wandb, ... by Accelerate
    "validate_every": None,  # iterations; None: never
    "best_by": None,  # validation figure that chooses the weights to save, "-name" where less is better; None: the last
    "checkpoint_every": 1000,  # iterations; also at the end and when interrupted; None: never
    "checkpoints_kept": 2,
    "workers": 0,
    "betas": [0.9, 0.999],  # of AdamW
    "epsilon": 1e-8,  # of AdamW, added to the denominator
    "decay_factor": 0.98,  # of the learning rate in the schedule "step"
    "decay_every": 12,  # iterations between these decays
    "save_dtype": "float32",  # of the weights that are saved at the end
}
# Further defaults for a network with attention.
ATTENTION_DEFAULTS: dict[str, Any] = {
    "freeze_query_key": False,
    "log_scale_lr_scale": 10.0,  # factor of the learning rate: in one step Adam moves a logarithm by at most the rate
}
TRAININGS = {"train": DEFAULTS | ATTENTION_DEFAULTS, "sampler": DEFAULTS | ATTENTION_DEFAULTS, "vqae": DEFAULTS}
# What a recipe's section ``augment`` may leave out; None: not done.
AUGMENT_DEFAULTS: dict[str, Any] = {
    "slice_axes": None,  # of which one is drawn for each window, in place of the processor's slice_axis
    "mirror": None,  # probability that left and right are exchanged, labels included
    "class_fraction": None,  # share of the slices with foreground that are drawn for one structure
    "redraw_probability": None,  # of new mean intensities for the structures of a window
    "curve_probability": None,  # that a window's intensities pass through a random curve
}
OPTIONAL = {**TRAININGS, "augment": AUGMENT_DEFAULTS}
# Settings of the section ``model`` that say where its weights come from; finetune.py reads them.
START_FIELDS = {"from_timm", "timm_checkpoint", "from_pretrained", "grow_from", "growth_noise"}
# The classes that other sections describe.
CLASSES = {
    "processor": BinaryFormerImageProcessor,
    "transformer": BinaryVQTransformer3DModel,
    "vqmodel": BinaryVQModel,
    "scheduler": AbsorbingScheduler,
}
# A resumed run may change these settings: they affect what is recorded of a training, not the training itself. (Those
# of the validation may change which weights are the best.)
FREE = {
    "workers",
    "trackers",
    "log_every",
    "validate_every",
    "validate_volumes",
    "checkpoint_every",
    "checkpoints_kept",
}
KEPT = "recipe.yaml"
# PyYAML's time grows with the square of the depth.
MAX_NESTING = 100
# Renamed settings: recipes and runs with the old name still load.
RENAMED = {("data", "flip_axis"): "mirror_axis"}


def load_recipe(name: str, overrides: list[str], folder: Path = RECIPES, part: str = "") -> dict[str, Any]:
    """A recipe by name or path, with ``section.key=value`` overrides (values as YAML) and the defaults of trainings.

    A file with ``like: other`` takes the settings that it does not have itself from that recipe in the same folder.

    Args:
        name: name of a file in ``folder``, or a path that ends in .yaml.
        overrides: the values of --set.
        folder: folder of the recipes.
        part: one of several trainings in a file; its name may be added, as in "oasis-vqae".

    Raises:
        typer.BadParameter: no such recipe, section or setting, or a section without settings; the message lists those
            that exist.
    """
    path = find_recipe(name, folder, part)
    recipe, files = read_recipe(path), [path]
    while "like" in recipe:
        files.append(find_recipe(recipe.pop("like"), files[-1].parent))
        if files[-1] in files[:-1]:
            raise typer.BadParameter(f"{path} is like itself ({' → '.join(map(str, files))}): remove one line 'like'")
        base = read_recipe(files[-1])
        like = {"like": base.pop("like")} if "like" in base else {}
        recipe = like | {section: base.get(section, {}) | recipe.get(section, {}) for section in (*base, *recipe)}
    for section, fields in recipe.items():
        if unknown := fields.keys() - known_fields(section, fields):
            raise typer.BadParameter(f"{path}: {section} has no setting {', '.join(sorted(unknown))}")
    for override in overrides:
        key, equals, value = override.partition("=")
        section, _, field = key.partition(".")
        field = RENAMED.get((section, field), field)
        if section not in recipe or not field or not equals:
            raise typer.BadParameter(f"--set {override}: expected section.key=value, sections are {', '.join(recipe)}")
        if field not in known_fields(section, recipe[section]):
            known = ", ".join(sorted(known_fields(section, recipe[section])))
            raise typer.BadParameter(f"--set {override}: {section} has no setting '{field}'; it has {known}")
        recipe[section][field] = parse(value)
    return with_defaults(recipe)


def read_recipe(path: Path) -> dict[str, Any]:
    """The content of a recipe's file, with the current names of settings.

    Raises:
        typer.BadParameter: it is not YAML, or holds anything but sections of names and values, and the name of a recipe
            behind "like".
    """
    try:
        text = path.read_text(encoding="utf-8")
        if max(accumulate((sign in "[{") - (sign in "]}") for sign in text), default=0) > MAX_NESTING:
            raise ValueError(f"brackets are nested more than {MAX_NESTING} deep")
        sections: dict[str, Any] = yaml.safe_load(text)
    except Exception as error:
        # Besides its own errors PyYAML lets through what int(), float() and datetime raise over a value.
        reason = " ".join(str(error).split())
        raise typer.BadParameter(
            f"{path} is not valid YAML ({reason}), expected a recipe: correct that place"
        ) from error
    if not isinstance(sections, dict):
        raise typer.BadParameter(f"{path} holds {_kind(sections)}, expected sections of names and values")
    for section, fields in sections.items():
        if section == "like" and not isinstance(fields, str):
            raise typer.BadParameter(f"{path}: like is {_kind(fields)}, expected the name of a recipe")
        if section != "like" and not (
            isinstance(fields, dict) and all(isinstance(name, str) for name in (section, *fields))
        ):
            raise typer.BadParameter(f"{path}: {section} is no section: expected names and values below it")
    for (section, old), new in RENAMED.items():
        fields = sections.get(section)
        if isinstance(fields, dict) and old in fields:
            fields[new] = fields.pop(old)
    return sections


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def find_recipe(name: str, folder: Path, part: str = "") -> Path:
    """The file of a recipe; arguments as in :func:`load_recipe`.

    Raises:
        typer.BadParameter: there is none; the message lists those that exist.
    """
    path = Path(name) if name.endswith(".yaml") else folder / f"{name}.yaml"
    if not os.path.isfile(path) and part:
        path = folder / f"{name.removesuffix(f'-{part}')}.yaml"
    if not os.path.isfile(path):
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise typer.BadParameter(f"no recipe '{name}'; known are {known}, or give the path of a .yaml file")
    return path


def known_recipes() -> list[str]:
    """Names of all recipes that the package has."""
    return sorted(path.stem for path in RECIPES.rglob("*.yaml"))


def trainings_of(name: str) -> list[str]:
    """The trainings that a recipe is for, determined by its sections: modules of :mod:`hf_binaryformer.training`.

    Args:
        name: name of a recipe in any of the package's folders, or a path that ends in .yaml.

    Raises:
        typer.BadParameter: no such recipe, or one that describes no training.
    """
    if name.endswith(".yaml"):
        sections = load_recipe(name, [])
    elif name in known_recipes():
        sections = load_recipe(name, [], next(RECIPES.rglob(f"{name}.yaml")).parent)
    else:
        known = ", ".join(known_recipes())
        raise typer.BadParameter(f"no recipe '{name}'; known are {known}, or give the path of a .yaml file")
    trainings = {
        "segmentation": {"train", "processor"} <= {*sections},
        "classification": "train" in sections and "processor" not in sections,
        "autoencoder": "vqae" in sections,
        "sampler": "sampler" in sections,
    }
    if not any(trainings.values()):
        raise typer.BadParameter(f"recipe '{name}' has none of the sections train, vqae and sampler")
    return [training for training, is_for in trainings.items() if is_for]


def known_fields(section: str, given: dict[str, Any]) -> set[str]:
    """Settings that a section may have: those of the class that it describes, or else the recipe's and the defaults."""
    if section == "model":
        return {field.name for field in dataclasses.fields(BinaryFormerConfig)} | START_FIELDS
    if section in CLASSES:
        return {*inspect.signature(CLASSES[section].__init__).parameters} - {"self", "kwargs"}
    return {*given, *OPTIONAL.get(section, {})}


@contextmanager
def refused_in_one_line(*sections: str) -> Iterator[None]:
    """Tell a setting that a class refuses as a wrong option, not as an error of the program.

    Raises:
        typer.BadParameter: with the first line of what was refused.
    """
    try:
        yield
    except (TypeError, ValueError, StrictDataclassError) as error:
        # Of a check of the whole class, the reason is the cause.
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise typer.BadParameter(f"recipe, section {' or '.join(sections)}: {reason}") from error


def parse(text: str) -> Any:
    """A value as YAML reads it, but also numbers like 1e-4, which YAML reads as text because they have no point."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


def keep_recipe(recipe: dict[str, Any], output: Path, resume: bool, writes: bool) -> None:
    """Write ``output/recipe.yaml``, or check that a resumed run has the same settings as at its start.

    Args:
        recipe: the run's recipe, with all defaults.
        output: the run's folder.
        resume: whether the run is resumed.
        writes: whether this process is the main one, which writes.

    Raises:
        typer.BadParameter: settings have changed (the message names them), or a new run starts in a folder where
            another run has checkpoints.
    """
    path = output / KEPT
    if not resume:
        refuse_other_run(output)
    elif path.is_file():
        began, now = read_recipe(path), yaml.safe_load(yaml.safe_dump(recipe))
        changed = [
            f"{section}.{field} (was {began.get(section, {}).get(field)}, is now {now.get(section, {}).get(field)})"
            for section in {**began, **now}
            for field in {**began.get(section, {}), **now.get(section, {})}
            if field not in FREE and began.get(section, {}).get(field) != now.get(section, {}).get(field)
        ]
        if changed:
            raise typer.BadParameter(f"--resume goes on as {path} says, but this differs: {', '.join(changed)}")
    if writes and not (resume and path.is_file()):
        output.mkdir(parents=True, exist_ok=True)
        write_text(path, yaml.safe_dump(recipe, sort_keys=False))


def with_defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe with everything filled in that it left out."""
    return {section: OPTIONAL.get(section, {}) | fields for section, fields in recipe.items()}
