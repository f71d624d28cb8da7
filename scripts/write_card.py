"""python scripts/write_card.py binaryformer-tiny-brain

Renders ``model_cards/<name>.md`` from the template, the words in ``model_cards/<name>.yaml`` and the records in
``model_cards/evidence/<name>/``, and puts it beside the weights if the package ships them. Every number in a card comes
from a record: {{ placeholders }} in the words name it as ``record.key.key``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from evaluate import markdown

ROOT = Path(__file__).parent.parent
CARDS = ROOT / "model_cards"


def dice_table(results: dict[str, Any]) -> str:
    """Markdown table of a ``results.json`` of finetune.py: a row a label, a column a method."""
    methods = results["rows"]
    lines = ["| label | " + " | ".join(methods) + " |", "| --- |" + " --- |" * len(methods)]
    for label in next(iter(methods.values()))["labels"]:
        cells = [row["labels"][label] for row in methods.values()]
        lines.append(f"| {label} | " + " | ".join(f"{c['mean']:.3f} ± {c['sd']:.3f}" for c in cells) + " |")
    lines.append("| **mean** | " + " | ".join(f"**{row['mean']:.3f}**" for row in methods.values()) + " |")
    return "\n".join(lines)


def mean_dice(results: dict[str, Any], labels: int) -> float:
    """Mean Dice of the network over the first labels of a ``results.json``."""
    rows = list(results["rows"]["network"]["labels"].values())[:labels]
    return sum(row["mean"] for row in rows) / labels


def render(name: str) -> ModelCard:
    """The card of a checkpoint.

    Raises:
        jinja2.UndefinedError: the words name a figure that no record holds.
    """
    words = yaml.safe_load((CARDS / f"{name}.yaml").read_text())
    records = {p.stem: json.loads(p.read_text()) for p in sorted((CARDS / "evidence" / name).glob("*.json"))}
    environment = Environment(undefined=StrictUndefined)
    environment.globals.update(records, dice_table=dice_table, mean_dice=mean_dice, inpainting_table=markdown)
    sections = {key: environment.from_string(text).render() for key, text in words["sections"].items()}
    metrics = [
        EvalResult(
            task_type=words["task"],
            dataset_type=metric["dataset"],
            dataset_name=metric["dataset"],
            metric_type=metric["type"],
            metric_name=metric["name"],
            metric_value=float(environment.from_string(metric["value"]).render()),
        )
        for metric in words["metrics"]
    ]
    data = ModelCardData(
        model_name=name,
        license="apache-2.0",
        library_name="hf-binaryformer",
        pipeline_tag=words["task"],
        tags=["medical", "mri", "vision-transformer", "binary-attention"],
        eval_results=metrics,
    )
    return ModelCard.from_template(data, template_path=str(CARDS / "template.md"), name=name, **sections)


def main(name: Annotated[str, typer.Argument(help="Checkpoint name, as in model_cards/<name>.yaml.")]) -> None:
    """Write the card."""
    card = CARDS / f"{name}.md"
    card.write_text(str(render(name)))
    packaged = ROOT / "hf_binaryformer" / "checkpoints" / name
    if packaged.is_dir():
        shutil.copyfile(card, packaged / "README.md")
    print(f"wrote {card.relative_to(ROOT)}")


if __name__ == "__main__":
    typer.run(main)
