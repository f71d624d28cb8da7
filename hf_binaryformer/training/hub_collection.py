"""python -m hf_binaryformer.training.hub_collection "Title" namespace/one namespace/two

In a clone: ``scripts/make_collection.py``. Shows several repositories of the Hub on one page, a *collection*. What stands
beside each is the first sentence of its card. Call it again after a change: nothing is listed twice.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from hf_binaryformer.training.publishing import explain

# The Hub's limits, in characters.
NOTE, DESCRIPTION = 500, 150


def first_sentence(card: str) -> str:
    """The first sentence below a card's heading; "" if it has none."""
    text = ModelCard(card, ignore_metadata_errors=True).text
    paragraphs = [
        part.strip() for part in text.split("\n\n") if part.strip() and not part.strip().startswith(("#", "*"))
    ]
    words = " ".join(paragraphs[0].split()) if paragraphs else ""
    return re.split(r"(?<=[.!?]) ", words)[0][:NOTE]


def collect(
    title: str, repo_ids: list[str], *, namespace: str | None = None, description: str = "", private: bool = False
) -> str:
    """Make a collection, or add to the one of this title.

    Args:
        title: of the collection.
        repo_ids: "namespace/name" of models that exist; kept in this order.
        namespace: whose collection it is; None: of the one who is logged in.
        description: at most 150 characters.
        private: only you see it.

    Returns:
        The collection's address.

    Raises:
        ValueError: the description is too long, or there is nothing to collect.
        HfHubHTTPError: a repository is not there, or you may not write.
    """
    if not repo_ids or len(description) > DESCRIPTION:
        raise ValueError(
            f"{len(repo_ids)} repositories and a description of {len(description)} characters, expected at least one "
            f"repository and at most {DESCRIPTION} characters"
        )
    api = HfApi()
    cards = {one: Path(api.hf_hub_download(one, "README.md")).read_text(encoding="utf-8") for one in repo_ids}
    found = api.create_collection(title, namespace=namespace, description=description, private=private, exists_ok=True)
    there = {item.item_id: item for item in found.items}
    for repo_id, card in cards.items():
        note = first_sentence(card)
        if repo_id not in there:
            api.add_collection_item(found.slug, repo_id, "model", note=note)
        elif there[repo_id].note != note:
            api.update_collection_item(found.slug, there[repo_id].item_object_id, note=note)
    return found.url


def main(
    title: Annotated[str, typer.Argument(help="Title of the collection.")],
    repo_ids: Annotated[list[str], typer.Argument(help="Models on the Hub, namespace/name each.")],
    namespace: Annotated[str | None, typer.Option(help="User or organisation; left out: you.")] = None,
    description: Annotated[str, typer.Option(help=f"At most {DESCRIPTION} characters.")] = "",
    private: Annotated[bool, typer.Option(help="Only you see it.")] = False,
) -> None:
    """Make it and print its address."""
    try:
        typer.echo(collect(title, repo_ids, namespace=namespace, description=description, private=private))
    except (ValueError, OSError, HfHubHTTPError) as error:
        raise typer.BadParameter(f"no collection ({explain(error)}): push the models first, and log in") from error


if __name__ == "__main__":
    typer.run(main)
