"""python scripts/write_card.py binaryformer-tiny-brain

Renders ``model_cards/<name>.md`` from the template, the words in ``model_cards/<name>.yaml`` and the records in
``model_cards/evidence/<name>/``, and puts it beside the weights, in the package or in ``published/``. Every number in a card
comes from a record: {{ placeholders }} in the words name it as ``record.key.key``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer
import yaml
from huggingface_hub import ModelCard

from cards import CARDS, render_card
from evaluate import markdown

ROOT = Path(__file__).parent.parent
# In the package, and for the Hub alone: weights under the licence of their data.
WEIGHTS = (ROOT / "hf_binaryformer" / "checkpoints", ROOT / "published")


def render(name: str) -> ModelCard:
    """The card of a checkpoint.

    Raises:
        jinja2.UndefinedError: the words name a figure that no record holds.
    """
    words = yaml.safe_load((CARDS / f"{name}.yaml").read_text())
    records = {p.stem: json.loads(p.read_text()) for p in sorted((CARDS / "evidence" / name).glob("*.json"))}
    # The template beside the words, which tests put elsewhere.
    licence = words.get("licence", "apache-2.0")
    return render_card(name, words, records | {"inpainting_table": markdown}, CARDS / "template.md", licence)


def main(name: Annotated[str, typer.Argument(help="Checkpoint name, as in model_cards/<name>.yaml.")]) -> None:
    """Write the card."""
    card = CARDS / f"{name}.md"
    card.write_text(str(render(name)))
    for folder in WEIGHTS:
        if (folder / name).is_dir():
            shutil.copyfile(card, folder / name / "README.md")
    print(f"wrote {card.relative_to(ROOT)}")


if __name__ == "__main__":
    typer.run(main)
