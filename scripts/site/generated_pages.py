"""Reference pages that are written from the code in each build, so that they cannot be out of date."""

from __future__ import annotations

import dataclasses
import html
import inspect
import re
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import typer
import yaml

from hf_binaryformer.cli import app
from hf_binaryformer.commands.train import help_text
from hf_binaryformer.modeling.attention_configuration import AttentionConfig, attention_forms
from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.image_processing import BinaryFormerImageProcessor
from hf_binaryformer.modeling.vq_autoencoder import BinaryVQModel
from hf_binaryformer.modeling.vq_transformer import BinaryVQTransformer3DModel
from hf_binaryformer.pipelines.absorbing_scheduler import AbsorbingScheduler
from hf_binaryformer.training import autoencoder, classification, sampler, segmentation
from hf_binaryformer.training.recipes import OPTIONAL, RECIPES, known_recipes, trainings_of

TRAININGS_OF_COMMAND = (segmentation, classification, autoencoder, sampler)
KINDS: dict[Any, str] = {bool: "switch", int: "integer", float: "number", str: "text", Path: "path"}
# "    name, other: text" in a docstring, with the deeper lines that follow.
FIELD = re.compile(r"^    (\w+(?:, \w+)*): (.*\n(?:^ {5,}\S.*\n)*)", re.MULTILINE)
SPHINX = re.compile(r":\w+:`~?([^`]+)`")
CARDS = Path(__file__).parents[2] / "model_cards"


def cell(text: object) -> str:
    """Text that fits into a cell of a table; what looks like a tag stays visible."""
    return html.escape(" ".join(str(text).split()), quote=False).replace("|", "\\|")


def table(names: tuple[str, ...], rows: Iterator[tuple[object, ...]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def options(command: Any) -> Iterator[tuple[object, ...]]:
    """One row for each argument and option of a command."""
    for one in command.params:
        if one.name == "help":
            continue
        argument = one.param_type_name == "argument"
        names = [one.metavar or one.name.upper()] if argument else [*one.opts, *one.secondary_opts]
        shown = getattr(one, "show_default", None)
        default = shown if isinstance(shown, str) else getattr(one.default, "value", one.default)
        if one.required:
            default = "required"
        elif isinstance(default, bool):
            default = "on" if default else "off"
        elif not isinstance(default, (str, int, float, Path)):
            default = ""
        annotation = one.type_descriptor.annotation
        kind = "" if argument else KINDS.get(annotation, getattr(annotation, "__name__", str(annotation)))
        if isinstance(annotation, type) and issubclass(annotation, Enum):
            kind = ", ".join(f"`{choice.value}`" for choice in annotation)
        given = "" if default == "" else default if default == "required" else f"`{default}`"
        yield ", ".join(f"`{name}`" for name in names), cell(getattr(one, "help", "") or ""), kind, given


def option_table(command: Any) -> str:
    """The table of a command's options."""
    rows = list(options(command))
    return table(("option", "what", "type", "default"), iter(rows)) if rows else "It has no options."


def described(command: Any, name: str, level: int) -> str:
    """A command's heading, text and options, and then those of its subcommands."""
    text = " ".join((command.help or "").split())
    parts = [f"{'#' * level} `{name}`", html.escape(text, quote=False)]
    if hasattr(command, "commands"):
        parts += [described(one, f"{name} {title}", level + 1) for title, one in sorted(command.commands.items())]
    else:
        parts.append(option_table(command))
    return "\n\n".join(parts)


def command_line() -> str:
    """All commands with all options."""
    from hf_binaryformer.commands.prepare import app as prepare

    commands: Any = typer.main.get_command(app)
    parts = [
        "# Command line",
        f"{commands.help} `python -m hf_binaryformer` is the same as `binaryformer`.",
        "Each command prints its options with `--help`. Bad input ends in one line that says what was expected, what "
        "came, and the remedy; the exit code is then 1. `BINARYFORMER_TRACEBACK=1` shows the whole traceback.",
    ]
    for name, command in commands.commands.items():
        if name not in ("prepare", "train"):
            parts.append(described(command, f"binaryformer {name}", 2))
    parts.append(described(typer.main.get_command(prepare), "binaryformer prepare", 2))
    parts += ["## `binaryformer train`", f"```text\n{help_text().rstrip()}\n```"]
    for module in TRAININGS_OF_COMMAND:
        one = typer.Typer(add_completion=False)
        one.command()(module.main)
        command = typer.main.get_command(one)
        training = module.__name__.rpartition(".")[2]
        parts += [f"### Options of the training: {training}", option_table(command)]
    return "\n\n".join(parts) + "\n"


def commented(path: Path) -> str:
    """A recipe as it stands in the package."""
    return f"```yaml\n{path.read_text(encoding='utf-8').rstrip()}\n```"


def recipes() -> str:
    """Keys that every training has, and all recipes."""
    parts = [
        "# Recipe keys",
        "A recipe is a YAML file with sections. Each section holds settings. `--set section.key=value` overrides one of "
        "them. A misspelt key is an error that lists the known keys.",
        table(
            ("section", "what its keys are"),
            iter(
                (
                    (
                        "`model`",
                        "fields of [`BinaryFormerConfig`](configuration.md), and where its weights come from: "
                        "`from_timm`, `timm_checkpoint`, `from_pretrained`",
                    ),
                    ("`processor`", "arguments of [`BinaryFormerImageProcessor`](configuration.md)"),
                    ("`augment`", "random changes of training images; see the recipe `hippocampus` below"),
                    ("`train`, `sampler`, `vqae`", "the training itself; defaults are in the next table"),
                    ("`vqmodel`, `transformer`, `scheduler`", "arguments of those [classes](configuration.md)"),
                    ("`data`", "what the training reads from its data folder"),
                    ("`like`", "no section: the name of a recipe whose settings fill the gaps"),
                )
            ),
        ),
        "## Defaults that a recipe may leave out",
        "These keys belong to the sections `train`, `sampler` and `vqae`. The last two are for networks with attention.",
        table(("key", "default", "what"), recipe_defaults("train")),
        "These belong to the section `augment` of a segmentation.",
        table(("key", "default", "what"), recipe_defaults("augment")),
        "## Recipes in the package",
        table(
            ("recipe", "for", "made for"),
            ((f"[`{name}`](#{name})", ", ".join(trainings_of(name)), cell(opening(name))) for name in known_recipes()),
        ),
    ]
    for name in known_recipes():
        parts += [f"### {name}", commented(next(RECIPES.rglob(f"{name}.yaml")))]
    return "\n\n".join(parts) + "\n"


def opening(name: str) -> str:
    """First sentence of a recipe's comment."""
    lines = next(RECIPES.rglob(f"{name}.yaml")).read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in lines[:4] if line.startswith("#"))
    return comment.partition(". ")[0].rstrip(".")


def recipe_defaults(section: str) -> Iterator[tuple[object, ...]]:
    """Keys, defaults, and the comments beside them in the source."""
    source = inspect.getsource(inspect.getmodule(trainings_of) or inspect)
    for key, default in OPTIONAL[section].items():
        line = next(line for line in source.splitlines() if line.strip().startswith(f'"{key}":'))
        shown = yaml.safe_dump(default, default_flow_style=True).splitlines()[0]
        yield f"`{key}`", f"`{shown}`", cell(line.partition("#")[2])


def configuration() -> str:
    """Fields of the classes that are saved as JSON, each with its default."""
    parts = [
        "# Configuration fields",
        "Everything on this page is saved as JSON beside the weights. The text is that of the classes' docstrings.",
        "## Attention",
        "All networks share these fields.",
        table(("field", "type", "default", "meaning"), dataclass_rows(AttentionConfig)),
        "### Forms of attention",
        "`attention_type` names one of these forms. λ is `logit_scale`.",
        table(
            ("`attention_type`", "scores before the softmax", "`bit_gradient` possible", "fields that it reads"),
            (
                (
                    f"`{form.name}`",
                    cell(form.scores.replace("lambda", "λ").replace("_", chr(92) + "_")),
                    "yes" if form.takes_bit_gradient else "no",
                    ", ".join(f"`{name}`" for name in form.reads),
                )
                for form in attention_forms()
            ),
        ),
        "## BinaryFormerConfig",
        "These fields come in addition to those of attention.",
        table(("field", "type", "default", "meaning"), own_rows()),
    ]
    for kind in (BinaryFormerImageProcessor, BinaryVQModel, BinaryVQTransformer3DModel, AbsorbingScheduler):
        parts += [f"## {kind.__name__}", table(("field", "default", "meaning"), argument_rows(kind))]
    return "\n\n".join(parts) + "\n"


def dataclass_rows(kind: Any) -> Iterator[tuple[object, ...]]:
    """Name, type and default of each field."""
    text = meanings(kind)
    for field in dataclasses.fields(kind):
        shown = field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)
        shown = re.sub(r"Optional\[(.*)\]", r"\1 | None", shown.replace("typing.", "")).replace("|", "\\|")
        yield f"`{field.name}`", f"`{shown}`", f"`{field.default!r}`", text.get(field.name, "")


def meanings(kind: type) -> dict[str, str]:
    """What a class's docstring says of each field."""
    found: dict[str, str] = {}
    for names, text in FIELD.findall(f"{inspect.getdoc(kind)}\n"):
        words = SPHINX.sub(lambda match: f"`{match[1].rpartition('.')[2]}`", " ".join(text.split()))
        found |= dict.fromkeys(re.findall(r"\w+", names), cell(words.replace("``", "`")))
    return found


def own_rows() -> Iterator[tuple[object, ...]]:
    """Fields that BinaryFormerConfig itself defines."""
    own = BinaryFormerConfig.__annotations__
    for row in dataclass_rows(BinaryFormerConfig):
        name = str(row[0]).strip("`")
        if name in own and name not in ("model_type", "attribute_map") and not name.startswith("_"):
            yield row
    text = meanings(BinaryFormerConfig)
    for name, kind in (("out_features", "list[str] \\| None"), ("out_indices", "list[int] \\| None")):
        yield f"`{name}`", f"`{kind}`", "`None`", text[name]


def argument_rows(kind: Any) -> Iterator[tuple[object, ...]]:
    """Arguments of a constructor, without those of attention."""
    text = meanings(kind)
    shared = {field.name for field in dataclasses.fields(AttentionConfig)}
    for name, one in inspect.signature(kind.__init__).parameters.items():
        if name == "self" or name in shared or one.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        yield f"`{name}`", f"`{one.default!r}`", text.get(name, "")


def zoo() -> str:
    """The checkpoints, from the front matter and the first paragraph of their cards."""
    parts = [
        "# Model zoo",
        "Checkpoints that come with the project. All are for research only, not for clinical use. Each card says what "
        "the network was trained on, how it was tested, and what it cannot do.",
    ]
    for path in sorted(CARDS.glob("*.md")):
        _, front, text = path.read_text(encoding="utf-8").split("---\n", 2)
        described_by = yaml.safe_load(front)
        name, packaged = path.stem, (RECIPES.parents[1] / "checkpoints" / path.stem).is_dir()
        paragraphs = [part for part in text.strip().split("\n\n") if not part.startswith("#")]
        place = "comes with the package" if packaged else "in the repository, not in the package"
        weights = f"Licence of the weights: {described_by.get('license')}. Where: {place}"
        if "model-index" not in described_by:
            weights = "There are no weights yet, only a recipe"
        results = (
            (cell(result["dataset"]["name"]), cell(metric["name"]), metric["value"])
            for index in described_by.get("model-index", [])
            for result in index["results"]
            for metric in result["metrics"]
        )
        parts += [
            f"## {name}",
            " ".join(paragraphs[0].split()),
            f"{weights} ([card](../model_cards/{path.name})).",
            table(("test", "measure", "value"), results) if "model-index" in described_by else "",
        ]
    return "\n\n".join(parts) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "reference/command-line.md": command_line,
    "reference/recipes.md": recipes,
    "reference/configuration.md": configuration,
    "zoo/index.md": zoo,
}
