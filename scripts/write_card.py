"""python scripts/write_card.py binaryformer-tiny-brain

Renders ``model_cards/<name>.md`` from the texts in ``model_cards/<name>.yaml`` and the records in
``model_cards/evidence/<name>/``. Copies it to the folder of the weights, in the package or in ``published/``. Every
number in a card comes from a record: {{ placeholders }} in the texts name it as ``record.key.key``.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from hf_binaryformer.training.cards import checkpoint_card

ROOT = Path(__file__).parent.parent
CARDS = ROOT / "model_cards"
# Weights in the package, and weights for the Hub only, which are under the licence of their data.
WEIGHTS = (ROOT / "hf_binaryformer" / "checkpoints", ROOT / "published")


def main(name: Annotated[str, typer.Argument(help="Checkpoint name, as in model_cards/<name>.yaml.")]) -> None:
    """Write the card."""
    card = CARDS / f"{name}.md"
    card.write_text(str(checkpoint_card(name, CARDS)))
    for folder in WEIGHTS:
        if (folder / name).is_dir():
            shutil.copyfile(card, folder / name / "README.md")
    print(f"wrote {card.relative_to(ROOT)}")


if __name__ == "__main__":
    typer.run(main)
