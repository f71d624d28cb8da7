"""Builds the compiled CPU kernel, a plain C library that Python loads with ctypes; everything else is in pyproject.toml.

The kernel is optional: without a compiler the installation continues with a warning, and the reference backend is used.
``HF_BINARYFORMER_NO_KERNEL=1`` leaves it out on purpose; ``CXX`` and ``CXXFLAGS`` are honoured.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = Path("kernels/cpu")
# Contraction would move additions to the multiplier, which is the bottleneck.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-pthread", "-g0", "-w"]
AVX2 = ["-mavx2", "-mfma", "-mbmi2", "-mpopcnt"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vbmi", "-mavx512vpopcntdq"]
X86 = {"avx2.cpp": AVX2, "avx512.cpp": AVX512, "avx512_bf16.cpp": [*AVX512, "-mavx512bf16"]}
ARM = {"neon.cpp": []}


def instruction_flags() -> dict[str, list[str]]:
    """Sources and the flags of each: one file for each instruction set, chosen at run time."""
    machine = platform.machine().lower()
    special = X86 if machine in ("x86_64", "amd64") else ARM if machine in ("arm64", "aarch64") else {}
    return {"dispatch.cpp": [], "portable.cpp": [], **special}


class BuildKernel(build_ext):
    """Compiles every source with its own flags and links a shared library without a Python module in it."""

    def get_ext_filename(self, fullname: str) -> str:
        """One name on every platform, without Python's version, because the library does not use Python."""
        return str(Path(*fullname.split("."))) + (".dll" if sys.platform == "win32" else ".so")

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """No symbols beyond those that the sources export."""
        return []

    def build_extension(self, ext: Extension) -> None:
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


headers = sorted(str(p) for p in FOLDER.glob("*.h"))
sources = [str(FOLDER / name) for name in instruction_flags()]
kernel = Extension("hf_binaryformer.kernels._cpu", sources, depends=headers, optional=True, language="c++")
setup(
    ext_modules=[] if os.environ.get("HF_BINARYFORMER_NO_KERNEL") else [kernel],
    cmdclass={"build_ext": BuildKernel},
)
