"""Hooks of mkdocs.yml: pages from the code and from the rest of the repository, and links between all of them.

Pages that describe the command line, recipes and configurations are made from the code in each build. Cards, evidence
and kernel notes stand elsewhere in the repository and become pages as they are. A link to a file that is not on the
site, such as a source file, becomes the file's name.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from generated_pages import PAGES

ROOT = Path(__file__).parents[2]
# What becomes pages, with the pictures beside it.
OUTSIDE = (
    "model_cards/**/*.md",
    "model_cards/evidence/**/*.png",
    "kernels/README.md",
    "CONTRIBUTING.md",
    "CODE_OF_CONDUCT.md",
    "SECURITY.md",
)
LINK = re.compile(r"\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s]+)\)")
FENCE = re.compile(r"(```.*?```)", re.DOTALL)
# A page must show as it is without a network.
LOADED = re.compile(
    r"<(?:script|img|iframe)[^>]*\ssrc=[\"']?https?:|<link[^>]*rel=[\"']?stylesheet[^>]*href=[\"']?https?:"
)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that do not lie in docs/."""
    for uri, write in PAGES.items():
        files.append(File.generated(config, uri, content=write()))
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=os.fspath(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at pages of the site; those to other files of the repository become text."""

    def replaced(match: re.Match[str]) -> str:
        return relink(match["text"], match["target"], page.file.src_uri, files)

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(replaced, part) for part in parts)


def relink(text: str, target: str, source: str, files: Files) -> str:
    """A link of the page ``source`` as Markdown for the site; a link that leads nowhere stays, for mkdocs to report."""
    address, mark, anchor = target.partition("#")
    unchanged = f"[{text}]({target})"
    if not address or ":" in address:
        return unchanged
    written = ROOT / source
    here = written.parent if written.is_file() else (ROOT / "docs" / source).parent
    place = Path(os.path.normpath(here / address))
    if not place.exists() or not place.is_relative_to(ROOT):
        return unchanged
    inside = place.relative_to(ROOT / "docs") if place.is_relative_to(ROOT / "docs") else place.relative_to(ROOT)
    for uri in (inside.as_posix(), (inside / "README.md").as_posix()):
        if files.get_file_from_path(uri):
            return f"[{text}]({posixpath.relpath(uri, posixpath.dirname(source) or '.')}{mark}{anchor})"
    name = place.relative_to(ROOT).as_posix()
    return text if name in text.strip("`") else f"{text} (`{name}` in the repository)"


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Refuse a page that loads something from elsewhere.

    Raises:
        PluginError: it does.
    """
    if found := LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} loads something from the network: {found[0]}")
    return output
