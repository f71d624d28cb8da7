"""From the tree to a source archive, to a wheel, to an environment without a compiler: it segments with the compiled kernel."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TREE = ("hf_binaryformer", "kernels", "setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md")
KERNEL = "hf_binaryformer/kernels/_cpu.so"
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
pytestmark = pytest.mark.slow
CONSUMER = """
import hf_binaryformer as bf
from hf_binaryformer.kernels import available_backends

pipeline = bf.VolumeSegmentationPipeline.from_pretrained("binaryformer-tiny-brain")
names: list[str] = available_backends()
wrong: int = bf.__version__
bf.VolumeSegmentationPipeline.from_pretrained("binaryformer-tiny-brain", backend=3)
"""


def call(*words: object, **settings: object) -> str:
    """The output of a program that must succeed."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **settings)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def build_wheel(source: Path, out: Path, **variables: str) -> Path:
    """A wheel, by pip, without a network."""
    words = ["pip", "wheel", "-v", "--no-index", "--no-deps", "--no-build-isolation", "-w", out, source]
    call(sys.executable, "-m", *words, env=os.environ | variables)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, made from a copy of the tree."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, folder / "tree")
    call(
        sys.executable,
        "-c",
        f"from setuptools import build_meta as b; b.build_sdist({str(folder)!r})",
        cwd=folder / "tree",
    )
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip makes of the source archive."""
    if COMPILER is None:
        pytest.skip("no compiler")
    return build_wheel(sdist, tmp_path_factory.mktemp("wheel"), HF_BINARYFORMER_REQUIRE_KERNEL="1")


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a new environment with the wheel; what the package needs is taken from the environment of these tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    call(python, "-m", "pip", "install", "--no-index", "--no-deps", wheel)
    (packages,) = (folder / "lib").glob("*/site-packages")
    (packages / "needed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return python


def bare(python: Path) -> dict[str, str]:
    """Variables without a compiler in reach, and without the clone."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CC", "CXX")}
    return kept | {"PATH": str(python.parent)}


def test_the_source_archive_has_what_a_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("hf_binaryformer", "kernels/cpu"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so":
                assert path.relative_to(ROOT).as_posix() in names


def test_the_wheel_is_for_any_python_and_has_the_kernel(wheel: Path) -> None:
    python, abi, system = wheel.stem.split("-")[-3:]
    assert (python, abi) == ("py3", "none") and system.endswith(platform.machine().lower())
    names = zipfile.ZipFile(wheel).namelist()
    assert KERNEL in names and "hf_binaryformer/py.typed" in names
    assert sum(name.endswith((".so", ".dll", ".pyd", ".dylib")) for name in names) == 1


def test_without_a_compiler_it_segments_with_the_compiled_kernel(environment: Path) -> None:
    said = call(environment, ROOT / "scripts/release/check_install.py", "--no-compiler", env=bare(environment))
    assert "cpu available: compiled" in said and "segment used it" in said


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="not these instruction sets")
def test_one_wheel_has_every_instruction_set_of_its_platform(environment: Path) -> None:
    code = "from hf_binaryformer.kernels.cpu_library import LIBRARY as l; print(l.instruction_sets, l.instruction_set)"
    assert "['avx512-bf16', 'avx512', 'avx2', 'portable']" in call(environment, "-c", code, env=bare(environment))
    plain = bare(environment) | {"HF_BINARYFORMER_CPU_ISA": "portable"}
    assert call(environment, "-c", code, env=plain).split()[-1] == "portable"


def test_a_wheel_without_the_kernel_serves_every_platform(sdist: Path, tmp_path: Path) -> None:
    wheel = build_wheel(sdist, tmp_path, HF_BINARYFORMER_NO_KERNEL="1")
    assert wheel.name.endswith("-py3-none-any.whl") and KERNEL not in zipfile.ZipFile(wheel).namelist()


def test_a_consumers_type_checker_sees_our_types(environment: Path, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "consumer.py").write_text(CONSUMER)
    below = "torch.*,transformers.*,diffusers.*,numpy.*,monai.*,timm.*,nibabel.*,PIL.*,huggingface_hub.*,safetensors.*"
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nstrict = true\n[mypy-{below}]\nfollow_imports = skip\n")
    words = [sys.executable, "-m", "mypy", "--python-executable", str(environment), "consumer.py"]
    found = subprocess.run(words, cwd=tmp_path, env=bare(environment), capture_output=True, text=True).stdout
    assert "py.typed" not in found and "import-untyped" not in found, found
    assert 'consumer.py:7: error: Incompatible types in assignment (expression has type "str"' in found
    assert 'consumer.py:8: error: Argument "backend"' in found and "Found 2 errors" in found, found
