"""python kernels/cpu/sanitize.py [address,undefined | thread] [--calls 10000] [--seed 0] [--record sanitizers.json]

Builds the kernel and its C++ test with the compiler's sanitizers, warnings as errors, and runs the test: chosen shapes, then
random calls with each instruction set. Instruction sets are compiled with the flags of setup.py; ``CXX`` names the
compiler. The record holds the number of random calls with each instruction set.
"""

import argparse
import json
import os
import platform
import re
import runpy
import subprocess
import sys
import tempfile
import time
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sanitizers", nargs="?", default="address,undefined")
    parser.add_argument("--calls", type=int, default=10_000, help="random calls with each instruction set")
    parser.add_argument("--seed", type=int, default=0, help="of the first random case")
    parser.add_argument("--record", type=Path, help="JSON to write if nothing failed")
    options = parser.parse_args()
    setuptools.setup = lambda **_: None
    sources = runpy.run_path(str(FOLDER.parents[1] / "setup.py"))["instruction_flags"]()
    compiler = [os.environ.get("CXX", "c++"), *FLAGS, f"-fsanitize={options.sanitizers}", "-fno-sanitize-recover=all"]
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for source, flags in {**sources, "test_kernel.cpp": []}.items():
            objects.append(str(Path(folder) / source) + ".o")
            subprocess.run([*compiler, *flags, "-c", str(FOLDER / source), "-o", objects[-1]], check=True)
        program = str(Path(folder) / "test_kernel")
        subprocess.run([*compiler, *objects, "-o", program], check=True)
        start = time.perf_counter()
        words = [program, str(options.calls), str(options.seed)]
        run = subprocess.run(words, env={**os.environ, **SETTINGS}, stdout=subprocess.PIPE, text=True)
        print(run.stdout, end="")
        if run.returncode == 0 and options.record is not None:
            write_record(options, run.stdout, time.perf_counter() - start)
        sys.exit(run.returncode)


def write_record(options: argparse.Namespace, output: str, seconds: float) -> None:
    """Write how many random calls passed, and with what."""
    found = re.findall(r"^(\w+): done, (\d+) random calls$", output, re.MULTILINE)
    compiler = subprocess.run([os.environ.get("CXX", "c++"), "--version"], stdout=subprocess.PIPE, text=True).stdout
    record = {
        "command": f"python kernels/cpu/sanitize.py {options.sanitizers} --calls {options.calls} --seed {options.seed}",
        "sanitizers": options.sanitizers,
        "seed": options.seed,
        "random_calls": {name: int(calls) for name, calls in found},
        "failures": 0,
        "seconds": round(seconds),
        "compiler": compiler.partition("\n")[0],
        "processor": processor(),
    }
    options.record.parent.mkdir(parents=True, exist_ok=True)
    options.record.write_text(json.dumps(record, indent=1) + "\n")


def processor() -> str:
    """The processor's name, as Linux states it."""
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.*)", path.read_text()) if path.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
