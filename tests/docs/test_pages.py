"""Every example of the site, the README and the model cards runs, in the order of its page, or says in a comment why not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import unittest
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from sybil import Document, Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from hf_binaryformer.kernels import backends
from hf_binaryformer.modeling import attention_configuration, attention_forms  # noqa: F401 (registers the forms)

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CARDS = sorted((ROOT / "model_cards").glob("*.md"))
PAGES = {path.relative_to(DOCS).as_posix(): path for path in sorted(DOCS.rglob("*.md"))}
PAGES |= {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *CARDS)}
# They segment whole brains, train, or load the packaged networks several times.
SLOW = {
    *(path.relative_to(ROOT).as_posix() for path in CARDS),
    "start.md",
    "howto/add-data-set.md",
    "howto/own-data.md",
    "howto/inpaint.md",
    "howto/many-scans.md",
    "howto/transformers.md",
}
RUN, SHOWN = {"python", "bash"}, {"text", "json"}
SKIP = re.compile(r"<!--- skip: (.*?) -->")
FENCE = re.compile(r"^ *```(\S*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def run_bash(example: Example) -> None:
    """A block of commands, each of which must succeed, with the package of this checkout."""
    functions = f'python() {{ "{sys.executable}" "$@"; }}; binaryformer() {{ python -m hf_binaryformer "$@"; }}\n'
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["bash", "-euo", "pipefail", "-c", functions + str(example.parsed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{example.parsed}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def parse(path: Path) -> Document:
    return Sybil([PythonCodeBlockParser(), CodeBlockParser("bash", run_bash), SkipParser()]).parse(path)


def run_page(path: Path) -> int:
    """Run a page's examples; returns how many ran."""
    ran = 0
    for example in parse(path).examples():
        try:
            example.evaluate()
        except unittest.SkipTest:
            continue
        ran += example.region.parsed is not None and not isinstance(example.parsed, tuple)
    return ran


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages take for granted: a scan, a hole in it, and a folder of scans."""
    random = np.random.default_rng(0)
    i, j, k = np.indices((64, 24, 64)) - np.array([32, 12, 32])[:, None, None, None]
    head = i**2 / 900 + j**2 / 100 + k**2 / 900 < 1
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    (tmp_path / "scans").mkdir()
    (tmp_path / "published").symlink_to(ROOT / "published")
    scans = "scan", "scans/first", "scans/second", "abdomen", "hippocampus_001"
    for name in (f"{scan}.nii.gz" for scan in scans):
        image = head * (100 + random.normal(0, 10, head.shape))
        nib.save(nib.Nifti1Image(image.astype(np.float32), affine), tmp_path / name)
    hole = i**2 + j**2 + k**2 < 16
    nib.save(nib.Nifti1Image(hole.astype(np.uint8), affine), tmp_path / "hole.nii.gz")
    monkeypatch.chdir(tmp_path)
    # What a page registers ends with the page.
    for module, name in ((backends, "_registered"), (backends, "_missing"), (attention_configuration, "_forms")):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))
    return tmp_path


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in PAGES])
def test_examples_run(name: str, made_up: Path):
    run_page(PAGES[name])


@pytest.mark.parametrize("name", PAGES)
def test_every_block_runs_or_is_only_shown(name: str):
    text = PAGES[name].read_text(encoding="utf-8")
    languages = [language for language, _ in FENCE.findall(text)]
    assert not set(languages) - RUN - SHOWN, "another language, or none: it would not run"
    assert text.count("```") == 2 * len(languages)
    found = [one for one in parse(PAGES[name]).examples() if not isinstance(one.parsed, tuple)]
    assert len(found) == sum(language in RUN for language in languages)
    for language, block in FENCE.findall(text):
        if language == "json":
            json.loads(block)


@pytest.mark.parametrize("name", PAGES)
def test_what_does_not_run_says_why(name: str):
    for skipped in SKIP.findall(PAGES[name].read_text(encoding="utf-8")):
        assert re.fullmatch(r'next "[^"]{10,}"', skipped), skipped


def broken(tmp_path: Path, text: str) -> Any:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


def test_a_broken_example_is_seen(made_up: Path):
    for block in ("```python\nassert 1 == 2\n```\n", "```bash\nfalse\ntrue\n```\n"):
        with pytest.raises(AssertionError):
            run_page(broken(made_up, block))
    assert run_page(broken(made_up, "```python\nx = 1\n```\n\n```python\nassert x == 1\n```\n")) == 2
    assert run_page(broken(made_up, '<!--- skip: next "it needs a moon" -->\n\n```bash\nfalse\n```\n')) == 0
