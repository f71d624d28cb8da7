"""python scripts/release/check_install.py [--backend cpu] [--no-compiler]

Tries an installed package, as a user has it: `binaryformer info` must call the backend available, and `binaryformer segment`
must label a small volume with it. Ends with an error if it does not, if the package is that of the clone, or, with
``--no-compiler``, if a compiler is in reach.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

CLONE = Path(__file__).resolve().parents[2]
# Voxels of 2 mm.
SHAPE = (48, 16, 48)
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "cl")
# Run in another folder than the clone, whose package would be found first.
REPORT = "import hf_binaryformer, hf_binaryformer.kernels as k; print(hf_binaryformer.__file__); print(k.backend_report()['{}'])"


def head(path: Path) -> None:
    """A ball of noise in a few coronal slices: small, because the network sees them at 1 mm."""
    i, j, k = np.indices(SHAPE) - np.array([24, 8, 24])[:, None, None, None]
    inside = i**2 / 400 + j**2 / 49 + k**2 / 400 < 1
    image = inside * (100 + np.random.default_rng(0).normal(0, 15, inside.shape))
    nib.save(nib.Nifti1Image(image.astype(np.float32), np.diag([2.0, 2.0, 2.0, 1.0])), path)


def output_of(words: list[str], folder: Path) -> str:
    """What a program prints.

    Raises:
        SystemExit: it failed.
    """
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    """Look at the backend, then segment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cpu", help="backend that must be in use")
    parser.add_argument("--no-compiler", action="store_true", help="fail if a compiler is on the PATH")
    options = parser.parse_args()
    found = [name for name in COMPILERS if shutil.which(name)]
    if options.no_compiler and found:
        sys.exit(f"{', '.join(found)} are on the PATH, expected no compiler")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place, state = output_of([sys.executable, "-c", REPORT.format(options.backend)], folder).splitlines()
        if Path(place).resolve().is_relative_to(CLONE / "hf_binaryformer") or not state.startswith("available"):
            sys.exit(f"{place}: backend '{options.backend}' is {state}, expected an installed package that has it")
        head(folder / "head.nii.gz")
        words = ["segment", "head.nii.gz", "-o", "labels.nii.gz", "--report", "report.json"]
        output_of([sys.executable, "-m", "hf_binaryformer", *words], folder)
        report = json.loads((folder / "report.json").read_text())
        shape = nib.Nifti1Image.from_filename(folder / "labels.nii.gz").shape
    if report["backend"] != options.backend or shape != SHAPE:
        sys.exit(
            f"segment used the backend '{report['backend']}' and wrote {shape}, expected '{options.backend}', {SHAPE}"
        )
    print(f"{place}: {options.backend} {state}; segment used it")


if __name__ == "__main__":
    main()
