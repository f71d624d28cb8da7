"""python kernels/assemble.py OUT [--library hf_binaryformer/kernels/_cpu.so]

Writes the Hub kernel "hamming-attention" into an empty folder: the project that kernel-builder takes (``build.toml``,
``CARD.md``, ``torch-ext/``, ``tests/``), and below ``build/`` the variants that ``kernels.get_local_kernel`` loads.

The Python source is that of ``hf_binaryformer/kernels``. Its imports become relative, and its operators get a namespace
that no other version has, so that several versions, and hf_binaryformer itself, can be loaded into one process.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import platform
import re
import shutil
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "hf_binaryformer" / "kernels"
LIBRARY = "_cpu.so"
# What a Hub kernel may import besides Python's own library.
ALLOWED = {"torch", "triton"}
OPS = '''"""The namespace of this build's operators."""

import torch

ops = torch.ops.{name}


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an operator."""
    return f"{name}::{{op_name}}"
'''


def assemble(out: Path, library: Path | None = None) -> list[Path]:
    """Write the project and its variants.

    Args:
        out: folder that is empty or does not exist yet.
        library: compiled CPU library. None: no compiled variant.

    Returns:
        Folders of the variants.

    Raises:
        FileExistsError: ``out`` holds something.
        FileNotFoundError: there is no library at ``library``.
        ValueError: the source imports what a Hub kernel may not import.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty: choose another folder, or empty it")
    if library is not None and not library.is_file():
        raise FileNotFoundError(f"no library at {library}: pip install . builds it where there is a C++ compiler")
    general = tomllib.loads((ROOT / "kernels" / "build.toml").read_text(encoding="utf-8"))["general"]
    package = general["name"].replace("-", "_")
    modules = {path.name: relative(path, package) for path in sorted(SOURCE.glob("*.py"))}
    project = out / "torch-ext" / package
    project.mkdir(parents=True)
    for name, text in modules.items():
        (project / name).write_text(text, encoding="utf-8")
    for name in ("build.toml", "CARD.md", "flake.nix"):
        shutil.copyfile(ROOT / "kernels" / name, out / name)
    shutil.copyfile(ROOT / "LICENSE", out / "LICENSE")
    shutil.copytree(ROOT / "kernels" / "tests", out / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    variants = [(f"torch-{backend}", backend, None) for backend in general["backends"]]
    if library is not None:
        variants.append((compiled_variant(), "cpu", library))
    return [write_variant(out / "build" / name, modules, general, *what) for name, *what in variants]


def relative(path: Path, package: str) -> str:
    """The source of a module with relative imports and prefixed operators.

    Raises:
        ValueError: it then still needs something that a Hub kernel does not have.
    """
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"^( *)from hf_binaryformer\.kernels import", r"\1from . import", text, flags=re.M)
    text = re.sub(r"^( *)from hf_binaryformer\.kernels\.(\w+) import", r"\1from .\2 import", text, flags=re.M)
    text, operators = re.subn(r'"hf_binaryformer::(\w+)"', r'add_op_namespace_prefix("\1")', text)
    if operators:
        text = re.sub(r"^from \.", "from ._ops import add_op_namespace_prefix\nfrom .", text, count=1, flags=re.M)
    # What is left is in docstrings.
    text = text.replace("hf_binaryformer.kernels", package)
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        for name in (one.partition(".")[0] for one in names):
            if name not in ALLOWED and name not in sys.stdlib_module_names:
                raise ValueError(f"{path.name} imports {name}; a Hub kernel may import torch, triton and itself only")
    if "hf_binaryformer" in text:
        raise ValueError(f"{path.name} still names hf_binaryformer, which is not there when a Hub kernel runs")
    return text


def compiled_variant() -> str:
    """Name of the variant that holds the library.

    The library uses no part of torch, so one build serves every torch from the oldest that the package supports. Such a
    variant is named after that version of torch's stable interface.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest = next(one for one in project["dependencies"] if one.startswith("torch>=")).removeprefix("torch>=")
    machine, system = platform.machine(), platform.system().lower()
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    return f"torch-stable-abi{oldest.replace('.', '')}-cpu-{machine}-{system}"


def write_variant(
    folder: Path, modules: dict[str, str], general: dict[str, object], backend: str, library: Path | None
) -> Path:
    """Write one variant: the modules, the namespace of its operators, and ``metadata.json``."""
    folder.mkdir(parents=True)
    files = {name: text.encode() for name, text in modules.items()}
    if library is not None:
        files[LIBRARY] = library.read_bytes()
    content = hashlib.sha256(b"".join(name.encode() + data for name, data in sorted(files.items()))).hexdigest()
    identity = f"_{str(general['name']).replace('-', '_')}_{backend}_{content[:8]}"
    files["_ops.py"] = OPS.format(name=identity).encode()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    digests = {name: base64.b64encode(hashlib.sha256(data).digest()).decode() for name, data in sorted(files.items())}
    metadata = {
        "id": identity,
        "name": general["name"],
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="write the Hub kernel hamming-attention into an empty folder")
    parser.add_argument("out", type=Path, help="folder that is empty or does not exist yet")
    parser.add_argument("--library", type=Path, help=f"compiled CPU library, as pip install . leaves it in {SOURCE}")
    options = parser.parse_args()
    for variant in assemble(options.out, options.library):
        print(variant)
