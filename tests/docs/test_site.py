"""What makes the site: pages from the code, links between pages, and docstrings."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer

from hf_binaryformer.cli import app
from hf_binaryformer.modeling.attention_configuration import attention_forms
from hf_binaryformer.training.recipes import OPTIONAL, known_recipes

ROOT = Path(__file__).parents[2]


def script(name: str) -> ModuleType:
    """A file of scripts/site as mkdocs loads it: its neighbours can be imported."""
    pytest.importorskip("mkdocs")
    folder = ROOT / "scripts" / "site"
    spec = importlib.util.spec_from_file_location(f"site_{name}", folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {uri: write() for uri, write in script("generated_pages").PAGES.items()}


def test_every_command_and_option_is_on_the_page(pages):
    page = pages["reference/command-line.md"]
    for name, command in typer.main.get_command(app).commands.items():
        _, found, rest = page.partition(f"## `binaryformer {name}`\n")
        assert found, name
        section = rest.partition("\n## ")[0]
        for option in (
            one for param in command.params for one in param.opts if one.startswith("-") and one != "--help"
        ):
            assert f"`{option}`" in section, (name, option)
    assert "`binaryformer prepare hippocampus`" in page
    assert "| `--set` |" in page


def test_every_recipe_key_and_form_is_on_its_page(pages):
    for name in (*known_recipes(), *OPTIONAL["train"], *OPTIONAL["augment"]):
        assert name in pages["reference/recipes.md"]
    for form in attention_forms():
        assert f"| `{form.name}` |" in pages["reference/configuration.md"]
    rows = [line for line in pages["reference/configuration.md"].splitlines() if line.startswith("| `")]
    assert sum(line.rstrip().endswith("|  |") for line in rows) < len(rows) / 5, "meanings are missing"


def test_the_zoo_has_every_card(pages):
    for card in (ROOT / "model_cards").glob("*.md"):
        assert f"## {card.stem}\n" in pages["zoo/index.md"]


class SomeFiles:
    """Stands in for the files of the site."""

    def __init__(self, *uris: str) -> None:
        self.uris = uris

    def get_file_from_path(self, uri: str) -> str | None:
        return uri if uri in self.uris else None


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("howto/hub.md", "../training.md#data", "[x](../training.md#data)"),
        ("howto/hub.md", "../../kernels/README.md#triton", "[x](../kernels/README.md#triton)"),
        ("training.md", "../kernels/README.md", "[x](kernels/README.md)"),
        ("model_cards/evidence/README.md", "growth", "[x](growth/README.md)"),
        ("model_cards/evidence/README.md", "../../docs/training.md", "[x](../../training.md)"),
        ("kernels/README.md", "../setup.py", "x (`setup.py` in the repository)"),
        ("training.md", "nowhere.md", "[x](nowhere.md)"),
        ("training.md", "https://example.org", "[x](https://example.org)"),
    ],
)
def test_links(source, target, expected):
    files = SomeFiles("training.md", "kernels/README.md", "model_cards/evidence/growth/README.md")
    assert script("hooks").relink("x", target, source, files) == expected


def test_a_page_that_loads_from_the_network_is_seen():
    loaded = script("hooks").LOADED
    assert loaded.search('<script defer src="https://example.org/a.js">')
    assert loaded.search('<link rel="stylesheet" href="https://example.org/a.css">')
    assert not loaded.search('<a href="https://example.org">paper</a><script src="assets/a.js">')


def test_docstrings_are_tidied():
    text = "Sizes.\n\nArgs:\n    height, width: pixels,\n        at least 1.\n    depth: see :class:`~a.b.C`.\n"
    text += "\nExample:\n    >>> 1"
    assert script("docstrings").tidy(text).splitlines() == [
        *("Sizes.", "", "Args:"),
        *("    height: pixels,", "        at least 1.", "    width: pixels,", "        at least 1."),
        *("    depth: see `C`.", "", "Examples:", "    >>> 1"),
    ]
