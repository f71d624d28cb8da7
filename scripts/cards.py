"""Model cards out of words and records: one template, front matter, and the tables that stand in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

CARDS = Path(__file__).parent.parent / "model_cards"


def dice_table(results: dict[str, Any]) -> str:
    """Markdown table of a ``results.json`` of finetune.py: a row a label, a column a method; n/a: no volume has it."""
    methods = results["rows"]
    lines = ["| label | " + " | ".join(methods) + " |", "| --- |" + " --- |" * len(methods)]
    for label in next(iter(methods.values()))["labels"]:
        cells = [row["labels"][label] for row in methods.values()]
        shown = ["n/a" if c["mean"] is None else f"{c['mean']:.3f} ± {c['sd']:.3f}" for c in cells]
        lines.append(f"| {label} | " + " | ".join(shown) + " |")
    means = ["n/a" if row["mean"] is None else f"**{row['mean']:.3f}**" for row in methods.values()]
    lines.append("| **mean** | " + " | ".join(means) + " |")
    return "\n".join(lines)


def render_card(
    name: str, words: dict[str, Any], records: dict[str, Any], template: Path, licence: str | None
) -> ModelCard:
    """A card whose every number comes from a record.

    Args:
        name: heading, and the model's name in the front matter.
        words: ``task``, ``tags``, ``sections`` of the template, and ``metrics`` of the front matter; their texts may name
            records as ``{{ record.key }}``. A metric whose value is an empty text is left out.
        records: what the texts may name, tables included.
        template: the card's frame.
        licence: of the weights, as the Hub spells it; None: the card's front matter gives none.

    Raises:
        jinja2.UndefinedError: the words name a figure that no record holds.
    """
    environment = Environment(undefined=StrictUndefined)
    environment.globals.update(records, dice_table=dice_table)

    def fill(text: str) -> str:
        return environment.from_string(text).render()

    sections = {key: fill(text) for key, text in words["sections"].items()}
    metrics = [
        EvalResult(
            task_type=words["task"],
            dataset_type=fill(metric["dataset"]),
            dataset_name=fill(metric["dataset"]),
            metric_type=metric["type"],
            metric_name=metric["name"],
            metric_value=float(value),
        )
        for metric in words["metrics"]
        if (value := fill(metric["value"]))
    ]
    data = ModelCardData(
        model_name=name,
        license=licence,
        library_name="hf-binaryformer",
        pipeline_tag=words["task"],
        tags=words.get("tags", ["medical", "mri", "vision-transformer", "binary-attention"]),
        eval_results=metrics or None,
    )
    return ModelCard.from_template(data, template_path=str(template), name=name, **sections)
