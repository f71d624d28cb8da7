"""The shape of the package: who imports whom, what an import costs, what lies where."""

from __future__ import annotations

import ast
import os
import shutil
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import hf_binaryformer as bf

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_binaryformer"
# Each may import itself and what stands before it. The face is what lies directly in the package: the command line.
FLOORS = ["kernels", "modeling", "pipelines", "data", "training", "commands", "app", "face", "scripts"]
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])
# Of these formats, the first ones run code when they are read; what is in the last two can be named anywhere on the disk.
UNSAFE = {"pickle", "cloudpickle", "joblib", "dill", "shelve", "marshal", "tarfile", "zipfile"}
# Zips are read in one place, member by member into files of its own naming.
READS_ZIPS = PACKAGE / "app" / "dicom_zip.py"
SCRIPTS = {path.stem for path in (ROOT / "scripts").rglob("*.py")}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def floor_of(path: Path) -> str:
    if path.is_relative_to(ROOT / "scripts"):
        return "scripts"
    first = path.relative_to(PACKAGE).parts[0]
    return first if first in FLOORS else "face"


def imported(tree: ast.Module) -> Iterator[str]:
    """Dotted names of all imports, also of those inside functions and under TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide from these tests"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wrong_way(floor: str, tree: ast.Module) -> list[str]:
    """What a module of this floor imports from a floor above it."""
    found = []
    for name in imported(tree):
        first, _, rest = name.partition(".")
        second = rest.partition(".")[0]
        # The version is a constant of the package's root, which every import passes through anyway.
        if name == "hf_binaryformer.__version__":
            continue
        if first == "hf_binaryformer":
            theirs = second if second in FLOORS else "face"
        elif first in SCRIPTS:
            theirs = "scripts"
        else:
            continue
        if FLOORS.index(theirs) > FLOORS.index(floor):
            found.append(name)
    return found


def module_of(path: Path) -> str:
    """Name that a file is imported by: scripts find each other by their bare names."""
    if not path.is_relative_to(PACKAGE):
        return path.stem
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def circles(trees: dict[str, ast.Module]) -> list[tuple[str, ...]]:
    """Modules that import each other, by whatever way, also inside functions."""
    edges = {name: {target for one in imported(tree) if (target := owner(one, trees))} for name, tree in trees.items()}
    reached: dict[str, set[str]] = {}
    for name in trees:
        frontier = edges[name] - {name}
        reached[name] = set()
        while frontier:
            reached[name] |= frontier
            frontier = set().union(*(edges[one] for one in frontier)) - reached[name]
    together = {name: {one for one in reached[name] if name in reached[one]} for name in trees}
    return sorted({tuple(sorted(group)) for group in together.values() if group})


def owner(name: str, trees: dict[str, ast.Module]) -> str | None:
    """The module that an imported name lies in: itself, or what it is taken from."""
    return next((one for one in (name, name.rpartition(".")[0]) if one in trees), None)


def unsafe(tree: ast.Module) -> list[str]:
    """What can run code that comes in a file: pickles, and the calls that read them; and archives, which write anywhere."""
    found = [n for n in imported(tree) if UNSAFE & set(n.split(".")) and n != "pickle.UnpicklingError"]
    found += [name for name in imported(tree) if name in ("torch.load", "yaml.load", "yaml.unsafe_load")]
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        called, keywords = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
        if called == "torch.load" and keywords.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if keywords.get("weights_only", "True") != "True" or keywords.get("allow_pickle", "False") != "False":
            found.append(ast.unparse(call))
        if {keywords.get(name, "False") for name in ("trust_remote_code", "shell")} != {"False"}:
            found.append(ast.unparse(call))
        if called in ("yaml.load", "yaml.unsafe_load", "eval", "exec", "os.system", "shutil.unpack_archive"):
            found.append(called)
    return found


@pytest.mark.parametrize("path", [p for p in SOURCES if p != PACKAGE / "__init__.py"], ids=name_of)
def test_imports_run_one_way(path):
    assert wrong_way(floor_of(path), tree_of(path)) == []


def test_no_two_modules_import_each_other():
    # The package's root names everything, lazily, and nothing but its version is taken from it.
    assert circles({module_of(p): tree_of(p) for p in SOURCES if p != PACKAGE / "__init__.py"}) == []


def test_circles_are_seen():
    code = {"a": "import b", "b": "def f():\n    from c import x", "c": "import a", "d": "import a"}
    assert circles({name: ast.parse(text) for name, text in code.items()}) == [("a", "b", "c")]


@pytest.mark.parametrize("path", sorted((PACKAGE / "kernels").rglob("*.py")), ids=name_of)
def test_kernels_know_torch_and_triton_only(path):
    roots = {name.partition(".")[0] for name in imported(tree_of(path))}
    assert roots - {"torch", "triton", "hf_binaryformer"} <= sys.stdlib_module_names


@pytest.mark.parametrize(
    ("floor", "code"),
    [
        ("kernels", "from hf_binaryformer.modeling import attention"),
        ("modeling", "def f():\n    import hf_binaryformer.pipelines.volumes"),
        ("modeling", "from hf_binaryformer import pipelines"),
        ("pipelines", "from hf_binaryformer import BinaryFormerModel"),
        ("pipelines", "import hf_binaryformer"),
        ("data", "from hf_binaryformer.training.loop import run"),
        ("training", "import hf_binaryformer as bf"),
        ("commands", "from hf_binaryformer import cli"),
        ("commands", "from hf_binaryformer.app import serve"),
        ("app", "from hf_binaryformer import cli"),
        ("face", "import finetune"),
    ],
)
def test_the_wrong_way_is_seen(floor, code):
    assert len(wrong_way(floor, ast.parse(code))) == 1


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_in_a_file_is_executed(path):
    assert unsafe(tree_of(path)) == (["zipfile"] if path == READS_ZIPS else [])


def test_zips_are_never_extracted_by_their_own_names():
    called = {ast.unparse(node.func) for node in ast.walk(tree_of(READS_ZIPS)) if isinstance(node, ast.Call)}
    assert not [name for name in called if "extract" in name] and "content.open" in called


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from torch import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "from pickle import UnpicklingError, load",
        "import tarfile",
        "shutil.unpack_archive(path)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_unsafe_reading_is_seen(code):
    assert unsafe(ast.parse(code))
    assert not unsafe(ast.parse("torch.load(path, weights_only=True)\nyaml.safe_load(text)\nnumpy.load(path)"))


def test_front_doors_are_never_imported():
    # `import modeling` from the root would load every module a second time, with its own classes and registrations.
    for path in [*SOURCES, *(ROOT / "tests").rglob("*.py")]:
        roots = {name.partition(".")[0] for name in imported(tree_of(path))}
        assert not roots & {"modeling", "pipelines"}, name_of(path)


@pytest.mark.parametrize("name", ["modeling", "pipelines"])
def test_front_doors_lead_into_the_package(name):
    assert (ROOT / name).is_symlink()
    assert (ROOT / name).resolve() == (PACKAGE / name).resolve()


def test_no_package_shadows_the_kernels_library():
    # transformers looks for a library called kernels; ours is a folder of native sources and must not be taken for it.
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert "hf_binaryformer/kernels/" in (ROOT / "kernels" / "README.md").read_text(encoding="utf-8").splitlines()[0]


@pytest.mark.parametrize("path", sorted([*SOURCES, *(ROOT / "tests").rglob("*.py")]), ids=name_of)
def test_files_stay_readable(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 400, "which two things are in it?"


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def import_seconds(statement: str) -> float:
    code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    return statistics.median(float(run_python(code)) for _ in range(3))


def test_import_is_fast():
    assert import_seconds("import hf_binaryformer") < 0.5 * import_seconds("import transformers; import torch")


def test_no_telemetry_of_libraries():
    """onnxruntime, which diffusers imports, has telemetry; what the user sets is left."""
    code = "import os, hf_binaryformer; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert run_python(code).split() == ["1"]
    assert run_python("import os; os.environ['ORT_DISABLE_TELEMETRY'] = '0'; " + code).split() == ["0"]


def test_import_is_light():
    code = "import sys, hf_binaryformer, hf_binaryformer.cli; print(*{m.partition('.')[0] for m in sys.modules})"
    loaded = set(run_python(code).split())
    assert "hf_binaryformer" in loaded
    assert not {"torch", "transformers", "timm", "monai", "diffusers", "SimpleITK", "nilearn", "matplotlib"} & loaded


@pytest.mark.parametrize("name", bf.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert name in dir(bf)
    assert len(getattr(bf, name).__doc__) > 20


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bf.nothing


def test_static_tools_see_every_lazy_name():
    # What __getattr__ resolves, __all__ and the imports under TYPE_CHECKING must be one list.
    typed = {name for name in imported(tree_of(PACKAGE / "__init__.py")) if name.startswith("hf_binaryformer.")}
    assert typed == {f"hf_binaryformer.{module}.{name}" for name, module in bf._HOME.items()}
    assert sorted(bf.__all__) == sorted(bf._HOME)


def test_the_wheel_holds_the_package_once(tmp_path):
    # Built from a copy, as a build leaves its folders in the tree that it builds from.
    tree = tmp_path / "tree"
    unwanted = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("hf_binaryformer", "kernels", "scripts", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=unwanted)
    for name in ("modeling", "pipelines"):
        (tree / name).symlink_to(ROOT.joinpath(name).readlink())
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    environment = os.environ | {"HF_BINARYFORMER_NO_KERNEL": "1"}  # a kernel would be one file more, minutes later
    subprocess.run([*command, tree], check=True, capture_output=True, env=environment)

    (wheel,) = tmp_path.glob("*.whl")
    packaged = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    ours = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    compiled = {"hf_binaryformer/kernels/_cpu.so"}  # where there is a compiler
    assert packaged - compiled == {path.relative_to(ROOT).as_posix() for path in ours} - compiled
