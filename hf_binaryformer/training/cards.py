"""Model cards from texts and records: one template, front matter, and the tables in the cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

# The template of every card, and the texts of the cards that a training writes.
TEMPLATES = Path(__file__).parent / "card_templates"
INPAINTING_METRICS = {
    "psnr_hole": ("PSNR hole", ".2f"),
    "ssim_hole": ("SSIM hole", ".3f"),
    "mae_hole": ("MAE hole", ".4f"),
    "psnr_object": ("PSNR all", ".2f"),
    "ssim_object": ("SSIM all", ".4f"),
    "mae_object": ("MAE all", ".5f"),
}


def dice_table(results: dict[str, Any]) -> str:
    """Markdown table of the ``results.json`` of a segmentation, with one row per label and one column per method.

    n/a means that no volume has the label; a single volume has no standard deviation.
    """
    methods = results["rows"]
    lines = ["| label | " + " | ".join(methods) + " |", "| --- |" + " --- |" * len(methods)]
    for label in next(iter(methods.values()))["labels"]:
        cells = [row["labels"][label] for row in methods.values()]
        shown = [
            "n/a" if c["mean"] is None else f"{c['mean']:.3f}" + ("" if c["sd"] is None else f" ± {c['sd']:.3f}")
            for c in cells
        ]
        lines.append(f"| {label} | " + " | ".join(shown) + " |")
    means = ["n/a" if row["mean"] is None else f"**{row['mean']:.3f}**" for row in methods.values()]
    lines.append("| **mean** | " + " | ".join(means) + " |")
    return "\n".join(lines)


def sets_table(results: dict[str, Any], groups: dict[str, list[str]]) -> str:
    """Markdown table of the ``results.json`` of a segmentation with evaluation sets: mean Dice of groups of labels in each set.

    Args:
        results: the record; its ``sets`` have volumes and labels.
        groups: heading of a column -> the labels whose mean it shows. Labels that no volume of a set has do not count.
    """
    lines = ["| set | volumes | " + " | ".join(groups) + " |", "| --- | ---: |" + " ---: |" * len(groups)]
    for name, found in results["sets"].items():
        means = [[found["labels"][label]["mean"] for label in labels] for labels in groups.values()]
        known = [[mean for mean in group if mean is not None] for group in means]
        cells = [f"{sum(group) / len(group):.3f}" if group else "n/a" for group in known]
        lines.append(f"| {name} | {found['volumes']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def inpainting_table(rows: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown table of an evaluation of inpainting, with one row per fill.

    The standard deviation is given where there are several numbers.
    """
    lines = [
        "| fill | " + " | ".join(title for title, _ in INPAINTING_METRICS.values()) + " |",
        "| --- |" + " ---: |" * len(INPAINTING_METRICS),
    ]
    for name, row in rows.items():
        cells = []
        for metric, (_, form) in INPAINTING_METRICS.items():
            cell = format(row[metric]["mean"], form)
            cells.append(cell if row[metric]["n"] == 1 else f"{cell} ± {format(row[metric]['sd'], form)}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def checkpoint_card(name: str, folder: Path) -> ModelCard:
    """The card of a published checkpoint: texts from ``folder/<name>.yaml``, records from ``folder/evidence/<name>/``.

    Raises:
        jinja2.UndefinedError: the texts name a figure that no record holds.
    """
    words = yaml.safe_load((folder / f"{name}.yaml").read_text())
    records = {path.stem: json.loads(path.read_text()) for path in sorted((folder / "evidence" / name).glob("*.json"))}
    return render_card(name, words, records, words.get("licence", "apache-2.0"))


def render_card(name: str, words: dict[str, Any], records: dict[str, Any], licence: str | None) -> ModelCard:
    """A card whose every number comes from a record.

    Args:
        name: heading, and the model's name in the front matter.
        words: ``task``, ``tags``, ``sections`` of the template, and ``metrics`` of the front matter; their texts may name
            records as ``{{ record.key }}``. A metric whose value is an empty text is left out.
        records: what the texts may name, tables included.
        licence: licence of the weights, as the Hub spells it; None: the card's front matter gives none.

    Raises:
        jinja2.UndefinedError: the words name a figure that no record holds.
    """
    environment = Environment(undefined=StrictUndefined)
    environment.globals.update(records, dice_table=dice_table, sets_table=sets_table, inpainting_table=inpainting_table)

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
    return ModelCard.from_template(data, template_path=str(TEMPLATES / "template.md"), name=name, **sections)
