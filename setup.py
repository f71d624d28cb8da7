"""Builds the compiled CPU kernel, a plain C library that Python loads with ctypes; everything else is in pyproject.toml.

The kernel is optional: where it cannot be built, the installation continues with a message, and the reference backend is
used. ``HF_BINARYFORMER_NO_KERNEL=1`` leaves it out on purpose, ``HF_BINARYFORMER_REQUIRE_KERNEL=1`` makes its absence an
error; ``CXX`` and ``CXXFLAGS`` are honoured. A wheel with the kernel serves every Python 3 of its platform, because the
library does not use Python. A wheel without it serves every platform.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDER = Path("kernels/cpu")
# Contraction would move additions to the multiplier, which is the bottleneck.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-pthread", "-g0", "-w"]
AVX2 = ["-mavx2", "-mfma", "-mbmi2", "-mpopcnt"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi", "-mavx512vpopcntdq"]
X86 = {"avx2.cpp": AVX2, "avx512.cpp": AVX512, "avx512_bf16.cpp": [*AVX512, "-mavx512bf16"]}
ARM = {"neon.cpp": []}
WITHOUT = "hf-binaryformer is installed without its compiled CPU kernel, and computes by the slower reference: "


def instruction_flags() -> dict[str, list[str]]:
    """Sources and the flags of each: one file for each instruction set, chosen at run time."""
    machine = platform.machine().lower()
    special = X86 if machine in ("x86_64", "amd64") else ARM if machine in ("arm64", "aarch64") else {}
    return {"dispatch.cpp": [], "portable.cpp": [], **special}


def reason_to_skip() -> str:
    """Why the kernel is not even tried; empty: it is."""
    if os.environ.get("HF_BINARYFORMER_NO_KERNEL"):
        return "HF_BINARYFORMER_NO_KERNEL is set"
    # MSVC has neither the vector types nor the flags; GCC for Windows misaligns AVX vectors on the stack.
    return "its sources are not for compilers of Windows" if sys.platform == "win32" else ""


class BuildKernel(build_ext):
    """Compiles every source with its own flags and links a shared library without a Python module in it."""

    def get_ext_filename(self, fullname: str) -> str:
        """One name on every platform, without Python's version, because the library does not use Python."""
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """No symbols beyond those that the sources export."""
        return []

    def build_extension(self, ext: Extension) -> None:
        """Compile and link; a failure is told in plain words before setuptools decides what becomes of it."""
        try:
            self.compile_and_link(ext)
        except Exception as error:
            tell(f"it could not be built ({error}). For the kernel, install g++ or clang++ and install again")
            raise

    def compile_and_link(self, ext: Extension) -> None:
        """Compile and link."""
        objects = [
            object_file
            for source, flags in instruction_flags().items()
            for object_file in self.compiler.compile(
                [str(FOLDER / source)],
                output_dir=self.build_temp,
                extra_postargs=[*FLAGS, *flags],
                depends=ext.depends,
            )
        ]
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, target, extra_postargs=["-pthread"], target_lang="c++")


class PlatformWheel(bdist_wheel):
    """Names the platform, but no version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """(python, abi, platform) of the wheel's name."""
        return "py3", "none", super().get_tag()[2]


def tell(reason: str) -> None:
    """Say that the kernel is missing, and why."""
    print(f"WARNING: {WITHOUT}{reason}", file=sys.stderr)


def kernel() -> list[Extension]:
    """The extension, or nothing.

    Raises:
        SystemExit: there is none, and one is required.
    """
    required, skipped = bool(os.environ.get("HF_BINARYFORMER_REQUIRE_KERNEL")), reason_to_skip()
    if skipped:
        if required:
            sys.exit(f"HF_BINARYFORMER_REQUIRE_KERNEL is set, but the kernel is left out: {skipped}")
        tell(skipped)
        return []
    headers = sorted(str(p) for p in FOLDER.glob("*.h"))
    sources = [str(FOLDER / name) for name in instruction_flags()]
    return [Extension("hf_binaryformer.kernels._cpu", sources, depends=headers, optional=not required, language="c++")]


setup(ext_modules=kernel(), cmdclass={"build_ext": BuildKernel, "bdist_wheel": PlatformWheel})
