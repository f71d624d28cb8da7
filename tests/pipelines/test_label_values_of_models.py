"""Models whose classes have label values of their own, such as FreeSurfer's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from hf_binaryformer.commands import jobs
from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.image_processing import BinaryFormerImageProcessor
from hf_binaryformer.modeling.networks import BinaryFormerForSemanticSegmentation
from hf_binaryformer.pipelines.segmentation import VolumeSegmentationPipeline
from hf_binaryformer.pipelines.volumes import read_volume


def tiny_model(**changes: Any) -> BinaryFormerForSemanticSegmentation:
    sizes = {"image_size": 32, "hidden_size": 48, "num_heads": 3, "num_hidden_layers": 2, "decoder_hidden_size": 64}
    names = {"id2label": {0: "background", 1: "left", 2: "right"}, "label2id": {"background": 0, "left": 1, "right": 2}}
    return BinaryFormerForSemanticSegmentation(
        BinaryFormerConfig(**sizes, **names, attention_type="sign", **changes)
    ).eval()


def test_classes_become_the_label_values_of_the_checkpoint(tmp_path: Path) -> None:
    """The same weights with FreeSurfer's numbers write those, with the same voxels for each name."""
    array = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((20, 18, 22)), 2).astype(np.float32)
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "head.nii.gz")
    volume, p = read_volume(tmp_path / "head.nii.gz"), BinaryFormerImageProcessor(image_size=(32, 32))
    torch.manual_seed(3)
    plain = tiny_model()
    numbered = tiny_model(label_values=[0, 17, 53])
    numbered.load_state_dict(plain.state_dict())
    numbered.save_pretrained(tmp_path / "numbered")
    p.save_pretrained(tmp_path / "numbered")
    assert plain.config.label_values is None
    expected = VolumeSegmentationPipeline(plain, p)(volume, return_probabilities=True)
    result = VolumeSegmentationPipeline.from_pretrained(tmp_path / "numbered")(volume, return_probabilities=True)
    np.testing.assert_array_equal(result.labels, np.array([0, 17, 53])[expected.labels])
    assert len(np.unique(result.labels)) > 1 and result.labels.dtype == np.int32
    np.testing.assert_array_equal(result.probabilities, expected.probabilities)
    assert result.label_names == {0: "background", 17: "left", 53: "right"}
    rows = [(row["label"], row["name"], row["voxels"]) for row in result.report["labels"]]
    counts = np.bincount(expected.labels.ravel(), minlength=3).tolist()
    assert rows == [(0, "background", counts[0]), (17, "left", counts[1]), (53, "right", counts[2])]
    saved = nib.load(result.save(tmp_path / "labels.nii.gz"))
    assert set(np.unique(saved.dataobj).astype(int)) == set(np.unique(result.labels))


@pytest.mark.parametrize("values", [[0, 17], [1, 17, 53], [0, 53, 17], [0, 17, 17]])
def test_label_values_that_do_not_fit_are_refused(values: list[int]) -> None:
    with pytest.raises(Exception, match=r"label_values are .* expected 3 ascending numbers from 0"):
        tiny_model(label_values=values)


def test_label_names_of_a_model_with_values_of_its_own(tmp_path: Path) -> None:
    content = {"id2label": {"0": "background", "1": "cube", "2": "corner"}, "label_values": [0, 17, 53]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert jobs.read_label_names(tmp_path / "config.json") == {0: "background", 17: "cube", 53: "corner"}
