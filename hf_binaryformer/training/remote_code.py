"""Puts the networks into one file beside a checkpoint, for ``trust_remote_code=True`` where this package is missing.

The file is made from this package's own modules, so there is no second copy to maintain. Attention in it is that of the
reference backend. Imports between the modules are left out, names that two modules use are told apart, and the operators
get a namespace of their own, so that the file and this package can be loaded into one process.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from hf_binaryformer import __version__
from hf_binaryformer.modeling.checkpoint_files import read_json
from hf_binaryformer.pipelines.whole_files import write_text

FILE = "modeling_binaryformer.py"
# transformers' class for each of the networks. Every one of them also has the encoder.
AUTO_CLASSES = {
    "BinaryFormerModel": "AutoModel",
    "BinaryFormerForSemanticSegmentation": "AutoModelForSemanticSegmentation",
    "BinaryFormerForImageClassification": "AutoModelForImageClassification",
}
PACKAGE = Path(__file__).parents[1]
NAME = "hf_binaryformer"
ENTRIES = ("modeling.image_processing", "modeling.networks")
# Compiled backends, which need more than one file.
LEFT_OUT = ("kernels.cpu", "kernels.triton")
# What takes the place of loading by short name.
STAND_INS = {
    "modeling.pretrained": '''class CheckpointMixin:
    """Nothing: transformers' own loading is used."""


class ProcessorCheckpointMixin:
    """Nothing: transformers' own loading is used."""
'''
}
# A file with the same name as a module of the package, but another place, is another module and has other operators.
NAMESPACE = 'NAMESPACE = "binaryformer_" + hashlib.sha256(__name__.encode()).hexdigest()[:12]\n'
HEAD = '''"""The networks of hf-binaryformer {version} in one file, for ``trust_remote_code=True``.

Made from the package's source; changes belong there. It needs torch, timm and transformers. Attention is computed by the
reference backend: ``pip install hf-binaryformer`` computes the same faster. Licence: Apache-2.0.
"""

{imports}
{namespace}'''


def save_remote_code(folder: Path) -> bool:
    """Make a saved checkpoint loadable with ``trust_remote_code=True`` where this package is not installed.

    Writes ``modeling_binaryformer.py``, and names its classes in ``config.json`` and ``preprocessor_config.json``
    (``auto_map``). This package itself never runs that file.

    Args:
        folder: a folder made by ``save_pretrained`` of a network, with its image processor if there is one.

    Returns:
        False if the folder holds something else, such as a pipeline of diffusers; nothing is written then.

    Raises:
        CheckpointError: the configuration is damaged.

    Example:
        >>> save_remote_code(Path("runs/mine/model"))
    """
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    saved_from = config.get("architectures") or [None]
    if saved_from[0] not in AUTO_CLASSES:
        return False
    names = {
        "AutoConfig": "BinaryFormerConfig",
        "AutoModel": "BinaryFormerModel",
        AUTO_CLASSES[saved_from[0]]: saved_from[0],
    }
    _write_map(folder / "config.json", config, names)
    processor = folder / "preprocessor_config.json"
    if processor.is_file():
        _write_map(processor, read_json(processor), {"AutoImageProcessor": "BinaryFormerImageProcessor"})
    write_text(folder / FILE, flat_source())
    return True


def _write_map(path: Path, content: dict[str, Any], names: dict[str, str]) -> None:
    module = FILE.removesuffix(".py")
    content = content | {"auto_map": {auto: f"{module}.{name}" for auto, name in names.items()}}
    write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


@dataclass
class Module:
    """A module of the package.

    Args:
        name: dotted, without the package.
        source: its text, UTF-8.
        tree: its syntax.
        own: (module, name, local name) of what it imports from this package; the name is None for a whole module.
        others: import statements of other libraries, by the name that they define.
    """

    name: str
    source: bytes
    tree: ast.Module
    own: list[tuple[str, str | None, str]] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)

    @property
    def line_starts(self) -> list[int]:
        """Byte offset of each line."""
        lengths = (len(line) for line in self.source.splitlines(keepends=True))
        return [0, *accumulate(lengths)]

    @property
    def defined(self) -> set[str]:
        """Names that the module defines itself."""
        found = set()
        for node in self.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.For)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)}
        return found - {"_", "__all__"}


@cache
def flat_source() -> str:
    """The text of the file.

    Raises:
        ValueError: the source has what cannot be put into one file, for example two libraries under one name.
    """
    modules = list(_in_order(ENTRIES, set()))
    imports, flat, parts = {"hashlib": "import hashlib"}, dict[tuple[str, str], str](), []
    for module in modules:
        for name, statement in module.others.items():
            if imports.setdefault(name, statement) != statement:
                raise ValueError(f"{module.name} has '{statement}', another module '{imports[name]}': use one name")
    taken = set(imports)
    for module in modules:
        for name in sorted(module.defined):
            new = name if name not in taken else f"{name}_of_{module.name.rpartition('.')[2]}"
            if new in taken:
                raise ValueError(f"'{name}' of {module.name} has the name of an import: rename it")
            flat[module.name, name] = new
            taken.add(new)
        parts.append(_flattened(module, flat))
    body = "\n".join(parts)
    imports = {name: one for name, one in imports.items() if name == "hashlib" or re.search(rf"\b{name}\b", body)}
    head = HEAD.format(version=__version__, imports=_sorted_imports(imports), namespace=NAMESPACE)
    text = "\n\n".join([head, *STAND_INS.values(), *parts])
    text = re.sub(rf'"{NAME}::(\w+)"', r'f"{NAMESPACE}::\1"', text)
    text = re.sub(rf"~?{NAME}(?:\.\w+)*\.(\w+)", r"\1", text)  # in docstrings
    if NAME in text:
        raise ValueError(f"the file still names {NAME}, which is not there when it runs")
    return re.sub(r"\n{4,}", "\n\n\n", text).rstrip() + "\n"


def _in_order(names: tuple[str, ...], seen: set[str]) -> Iterator[Module]:
    """Modules, each after those that it imports."""
    for name in names:
        if name in seen or name in LEFT_OUT or name in STAND_INS:
            continue
        seen.add(name)
        module = _read(name)
        yield from _in_order(tuple(source for source, _, _ in module.own), seen)
        yield module


def _read(name: str) -> Module:
    source = PACKAGE.joinpath(*name.split(".")).with_suffix(".py").read_bytes()
    module = Module(name, source, ast.parse(source))
    for node in ast.walk(module.tree):
        top = node in module.tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == NAME:
            if not top:
                raise ValueError(f"{name} imports {node.module} inside a function: import it at the top")
            module.own += [_origin((node.module or "").partition(".")[2], one) for one in node.names]
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and top and not _is_future(node):
            start = f"from {node.module} import " if isinstance(node, ast.ImportFrom) else "import "
            for one in node.names:
                module.others[one.asname or one.name] = start + ast.unparse(one)
    return module


def _origin(source: str, alias: ast.alias) -> tuple[str, str | None, str]:
    """Where an imported name is defined, which may be another module than the one it is imported from."""
    local = alias.asname or alias.name
    folder = PACKAGE.joinpath(*source.split("."))
    if not folder.is_dir():
        return source, alias.name, local
    if (folder / f"{alias.name}.py").is_file():
        return f"{source}.{alias.name}", None, local
    for node in ast.parse((folder / "__init__.py").read_bytes()).body:
        if isinstance(node, ast.ImportFrom) and alias.name in (one.name for one in node.names):
            return str(node.module).partition(".")[2], alias.name, local
    raise ValueError(f"{source} does not define {alias.name} where this can see it: import it from its module")


def _flattened(module: Module, flat: dict[tuple[str, str], str]) -> str:
    """The module's own statements with the names that they have in the file."""
    new = {name: flat[module.name, name] for name in module.defined}
    for source, name, local in module.own:
        if name is not None:
            new[local] = flat.get((source, name), name)
    new = {name: other for name, other in new.items() if name != other}
    if clash := sorted({node.arg for node in ast.walk(module.tree) if isinstance(node, ast.arg)} & new.keys()):
        raise ValueError(
            f"{module.name} has an argument '{clash[0]}', which is also a name that must change: rename it"
        )
    edits = dict(_renamings(module, new))
    if any(_is_future(node) for node in module.tree.body):
        edits = _quoted(module, new, edits)
    for node in module.tree.body:
        if _is_dropped(node):
            start, end = _span(module, node)
            end += len(module.source[end:].partition(b"\n")[0])  # with the comment behind it
            edits = _replaced(edits, start, end, "")
    text = module.source
    for (start, end), replacement in sorted(edits.items(), reverse=True):
        text = text[:start] + replacement.encode() + text[end:]
    return text.decode().strip() + "\n"


def _renamings(module: Module, new: dict[str, str]) -> Iterator[tuple[tuple[int, int], str]]:
    """Places in the source, as byte offsets, and what stands there in the file."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Name) and node.id in new:
            yield _span(module, node), new[node.id]
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node in module.tree.body and node.name in new:
            start = module.source.index(node.name.encode(), _span(module, node)[0])
            yield (start, start + len(node.name.encode())), new[node.name]


def _quoted(module: Module, new: dict[str, str], edits: dict[tuple[int, int], str]) -> dict[tuple[int, int], str]:
    """The edits, and annotations as texts.

    ``from __future__ import annotations`` would do the same to a whole file, and with it to the configurations, which are
    checked by their annotations.
    """
    for node in ast.walk(module.tree):
        found = [node.returns] if isinstance(node, ast.FunctionDef) else []
        found += [node.annotation] if isinstance(node, (ast.arg, ast.AnnAssign)) else []
        for one in found:
            if one is None:
                continue
            text = ast.unparse(one)
            for name, other in new.items():
                text = re.sub(rf"\b{name}\b", other, text)
            edits = _replaced(edits, *_span(module, one), repr(text))
    return edits


def _replaced(edits: dict[tuple[int, int], str], start: int, end: int, text: str) -> dict[tuple[int, int], str]:
    """The edits with one more, in place of those inside it."""
    return {place: what for place, what in edits.items() if not start <= place[0] < end} | {(start, end): text}


def _span(module: Module, node: ast.expr | ast.stmt) -> tuple[int, int]:
    """First and last byte offset of a piece of the source."""
    starts = module.line_starts
    return starts[node.lineno - 1] + node.col_offset, starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)


def _is_future(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _is_dropped(node: ast.stmt) -> bool:
    """Imports, docstrings of modules, and registrations, which are for the installed package."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) or ast.unparse(node.value).startswith("Auto")
    return isinstance(node, (ast.Import, ast.ImportFrom))


def _sorted_imports(imports: dict[str, str]) -> str:
    return "\n".join(sorted(set(imports.values()), key=lambda one: (one.startswith("from"), one))) + "\n"
