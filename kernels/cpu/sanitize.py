"""python kernels/cpu/sanitize.py [address,undefined | thread]

Builds the kernel and its C++ test with the compiler's sanitizers, warnings as errors, and runs the test. Instruction sets
are compiled with the flags of setup.py; ``CXX`` names the compiler.
"""

import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import setuptools

FOLDER = Path(__file__).parent
# GCC takes the undefined operands in its own AVX-512 headers for mistakes.
TOLERATED = [
    "psabi",
    "unknown-pragmas",
    "unused-function",
    "maybe-uninitialized",
    "uninitialized",
    "unknown-warning-option",
]
WARNINGS = ["-Wall", "-Wextra", "-Werror", *(f"-Wno-{name}" for name in TOLERATED)]
FLAGS = ["-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", "-ffp-contract=off", "-pthread", *WARNINGS]
# New memory is full of NaN, so that a read before the first write shows in the results.
SETTINGS = {
    "ASAN_OPTIONS": "max_malloc_fill_size=1000000000:malloc_fill_byte=255:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def main() -> None:
    """Build in a temporary folder and run."""
    setuptools.setup = lambda **_: None
    sources = runpy.run_path(str(FOLDER.parents[1] / "setup.py"))["instruction_flags"]()
    sanitizers = sys.argv[1] if len(sys.argv) > 1 else "address,undefined"
    compiler = [os.environ.get("CXX", "c++"), *FLAGS, f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for source, flags in {**sources, "test_kernel.cpp": []}.items():
            objects.append(str(Path(folder) / source) + ".o")
            subprocess.run([*compiler, *flags, "-c", str(FOLDER / source), "-o", objects[-1]], check=True)
        program = str(Path(folder) / "test_kernel")
        subprocess.run([*compiler, *objects, "-o", program], check=True)
        sys.exit(subprocess.run([program], env={**os.environ, **SETTINGS}).returncode)


if __name__ == "__main__":
    main()
