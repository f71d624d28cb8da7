"""The scripts that disturb the package find each other as files of one folder, as they do when one of them is run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "reliability"))
# And the DICOM files of another folder's tests.
sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
