"""python scripts/release/measure_install.py WHEEL [--record model_cards/evidence/installation/record.json]

Installs a wheel with all that it needs into a new environment, and measures: MB of the wheel, MB of the environment and its
largest packages, and seconds of the import and of `binaryformer --help`, each in a new process. The first process is not
counted, as it reads from disk what later ones find in memory. Needs a network and some gigabytes.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from hf_binaryformer.kernels.processor import processor_name

MB = 10**6
SUBJECTS = {
    "import hf_binaryformer": ["-c", "import hf_binaryformer"],
    "import torch": ["-c", "import torch"],
    "import hf_binaryformer; hf_binaryformer.VolumeSegmentationPipeline": [
        "-c",
        "import hf_binaryformer; hf_binaryformer.VolumeSegmentationPipeline",
    ],
    "binaryformer --help": ["-m", "hf_binaryformer", "--help"],
}
# More running programs than this share of the cores, and times are those of a loaded machine.
LOADED = 0.5


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; links count nothing."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def seconds(python: Path, words: list[str], rounds: int) -> dict[str, float]:
    """Median and spread of a program's time, less that of an empty program."""
    times: dict[str, list[float]] = {"empty": [], "full": []}
    for _ in range(rounds + 1):
        for kind, said in (("empty", ["-c", ""]), ("full", words)):
            start = time.perf_counter()
            subprocess.run([python, *said], check=True, capture_output=True, cwd=tempfile.gettempdir())
            times[kind].append(time.perf_counter() - start)
    full, empty = times["full"][1:], statistics.median(times["empty"][1:])
    return {
        "median": round(statistics.median(full) - empty, 3),
        "least": round(min(full) - empty, 3),
        "most": round(max(full) - empty, 3),
    }


def main() -> None:
    """Install, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="wheel to install")
    parser.add_argument("--record", type=Path, help="JSON to write")
    parser.add_argument("--rounds", type=int, default=7, help="processes that are timed for each figure")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder, with_pip=True)
        python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
        before = size_of(folder)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-compile", options.wheel], check=True)
        load = os.getloadavg()[0] / (os.cpu_count() or 1)
        (packages,) = folder.rglob("site-packages")
        sizes = {path.name: size_of(path) / MB for path in packages.iterdir() if path.is_dir()}
        largest = dict(sorted(sizes.items(), key=lambda one: -one[1])[:6])
        listed = subprocess.run([python, "-m", "pip", "freeze"], check=True, capture_output=True, text=True).stdout
        record = {
            "command": f"python scripts/release/measure_install.py {options.wheel.name}",
            "processor": processor_name(),
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "versions": [line for line in listed.splitlines() if line.split("==")[0] in ("torch", "transformers")],
            "loaded_machine": load > LOADED,
            "rounds": options.rounds,
            "wheel_mb": round(options.wheel.stat().st_size / MB, 1),
            "package_mb": round(sizes["hf_binaryformer"], 1),
            "environment_mb": round((size_of(folder) - before) / MB),
            "largest_mb": {key: round(value) for key, value in largest.items()},
            "seconds": {what: seconds(python, words, options.rounds) for what, words in SUBJECTS.items()},
        }
    text = json.dumps(record, indent=1) + "\n"
    print(text, end="")
    if record["loaded_machine"]:
        print("Other programs run here: sizes are right, times have to be measured again", file=sys.stderr)
    if options.record:
        options.record.parent.mkdir(parents=True, exist_ok=True)
        options.record.write_text(text)


if __name__ == "__main__":
    main()
