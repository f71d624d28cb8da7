"""Experiments and benchmarks find each other as files of one folder, as they do when one of them is run."""

import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path[:0] = [str(SCRIPTS / "experiments"), str(SCRIPTS / "benchmarks")]
