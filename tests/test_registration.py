"""transformers knows this package after ``import hf_binaryformer``, whichever of the two is imported first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_binaryformer import registration

ROOT = Path(__file__).parent.parent
TINY_BRAIN = ROOT / "hf_binaryformer" / "checkpoints" / "binaryformer-tiny-brain"
HERE_FIRST = """
import json, sys
import hf_binaryformer
assert not {"torch", "transformers"} & sys.modules.keys()
"""
THERE_FIRST = """
import json, sys
from transformers import AutoConfig, AutoImageProcessor, pipelines
assert "mri-segmentation" not in pipelines.PIPELINE_REGISTRY.supported_tasks
import hf_binaryformer
"""
# The image processor comes first: nothing has loaded the networks before it.
ASK = """
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation
from transformers.pipelines import PIPELINE_REGISTRY
folder = sys.argv[1]
assert "timm" not in sys.modules
found = [type(kind.from_pretrained(folder)).__name__ for kind in
         (AutoImageProcessor, AutoConfig, AutoModel, AutoModelForSemanticSegmentation)]
print(json.dumps([found, PIPELINE_REGISTRY.supported_tasks["mri-segmentation"]["impl"].__name__]))
"""


@pytest.mark.parametrize("start", [HERE_FIRST, THERE_FIRST], ids=["package first", "transformers first"])
def test_auto_classes_and_tasks(start):
    package = Path(registration.__file__).parents[1]  # of the code under test, wherever it lies
    environment = os.environ | {"PYTHONPATH": str(package), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-P", "-c", start + ASK, str(TINY_BRAIN)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    classes, task = json.loads(done.stdout.splitlines()[-1])
    assert classes == [
        "BinaryFormerImageProcessor",
        "BinaryFormerConfig",
        "BinaryFormerModel",
        "BinaryFormerForSemanticSegmentation",
    ]
    assert task == "MRISegmentationPipeline"


def test_other_modules_and_other_model_types_are_left_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(registration, "register_networks", lambda: asked.append(1))
    assert registration.AfterImport().find_spec("transformers.modeling_utils", None) is None
    entries = registration.LazyEntries({"theirs": 1})
    assert "theirs" in entries and "another" not in entries and not asked
    assert registration.MODEL_TYPE not in entries and asked == [1]
    assert list(entries.values()) == [1] and asked == [1, 1]


def test_it_is_installed_once():
    before = list(sys.meta_path)
    registration.install()
    assert sys.meta_path == before
    assert sum(isinstance(one, registration.AfterImport) for one in before) == 1
