"""Labels of images whose background people's tools have changed are those of the untouched image."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch

from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.image_processing import BinaryFormerImageProcessor
from hf_binaryformer.modeling.networks import BinaryFormerForSemanticSegmentation
from hf_binaryformer.pipelines.segmentation import VolumeSegmentationPipeline
from hf_binaryformer.pipelines.segmentation_report import VolumeSegmentationOutput
from hf_binaryformer.pipelines.volumes import volume_from_image

SHAPE = (40, 30, 44)


def head() -> np.ndarray:
    """An ellipsoid of tissue in the middle of wide air."""
    grid = (np.indices(SHAPE) - np.reshape([n / 2 for n in SHAPE], (3, 1, 1, 1))) / np.reshape(
        [10, 7, 11], (3, 1, 1, 1)
    )
    texture = 600 + 250 * np.sin(3 * grid[0]) * np.cos(2 * grid[1]) + 150 * np.sin(5 * grid[2])
    return np.where((grid**2).sum(0) < 1, texture, 0).astype(np.float32)


@pytest.fixture(scope="module")
def pipeline() -> VolumeSegmentationPipeline:
    """An untrained network that sees where a slice lies; its labels change with anything that it sees."""
    torch.manual_seed(0)
    config = BinaryFormerConfig(
        hidden_size=16, num_hidden_layers=1, num_heads=2, patch_size=4, image_size=32, num_channels=4, num_labels=5,
        decoder_hidden_size=16, class_token=False, initializer_range=0.5,
    )  # fmt: skip
    processor = BinaryFormerImageProcessor(image_size=(32, 32), spacing=None, slice_position=True)
    return VolumeSegmentationPipeline(BinaryFormerForSemanticSegmentation(config), processor)


def segment(pipeline: VolumeSegmentationPipeline, array: np.ndarray) -> VolumeSegmentationOutput:
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    return pipeline(volume_from_image(nib.Nifti1Image(array.astype(np.float32), affine)))


def changed(fault: str) -> np.ndarray:
    array = head()
    if fault == "two negative voxels":
        array[1, 2, 3], array[38, 1, 40] = -500, -400
    if fault == "bright voxels in air":
        array[0, 0, 0], array[39, 29, 43], array[20, 1, 2] = 900, 2000, 700
    if fault == "other units":
        array = array * 1e-5 - 3
    return array


@pytest.mark.parametrize("fault", ["two negative voxels", "bright voxels in air", "other units"])
def test_labels_are_those_of_the_clean_image(pipeline, fault):
    clean, found = segment(pipeline, head()), segment(pipeline, changed(fault))
    assert len(np.unique(clean.labels)) >= 3
    tissue = head() > 0
    assert (clean.labels[tissue] == found.labels[tissue]).mean() > 0.98
    # Bright voxels are labelled where they are, and do not move the box that the network sees.
    assert clean.report["network_grid"] == found.report["network_grid"]


def test_the_report_says_what_was_taken_as_background(pipeline):
    array = head()
    inside = array > 0
    array[inside] = (array[inside] - array[inside].mean()) / array[inside].std()
    intensities = segment(pipeline, array).report["intensities"]
    assert intensities["background"] == 0 and intensities["low"] < -1.5 and intensities["high"] > 1.5
    assert segment(pipeline, head()).report["intensities"]["low"] == 0
    crop = head()[15:25, 11:19, 16:28]
    assert segment(pipeline, crop).report["intensities"]["background"] is None


def notes_on_extent(pipeline, image) -> list[str]:
    """Notes, without those on how sure the network was: its weights are random."""
    return [note for note in segment(pipeline, image).report["notes"] if "low confidence" not in note]


def test_half_a_head_is_told(pipeline, monkeypatch):
    assert notes_on_extent(pipeline, head()) == []
    # An ellipsoid with half axes of 10, 7 and 11 voxels of 4 mm.
    monkeypatch.setattr(pipeline.processor, "foreground_extent", [76.0, 52.0, 84.0])
    assert notes_on_extent(pipeline, head()) == []
    (note,) = notes_on_extent(pipeline, head()[: SHAPE[0] // 2])
    assert note.startswith("the image shows 36 mm from left to right, the training images at least 76 mm")
    assert len(notes_on_extent(pipeline, head()[:, 14:16, 20:24])) == 2


def test_an_image_in_which_nothing_is_found_is_told(pipeline, monkeypatch):
    bias = pipeline.model.decoder.head.bias if hasattr(pipeline.model.decoder, "head") else None
    parameter = bias if bias is not None else [p for p in pipeline.model.parameters() if p.shape == (5,)][-1]
    monkeypatch.setattr(parameter, "data", torch.tensor([1e6, 0, 0, 0, 0]))
    result = segment(pipeline, head())
    assert not result.labels.any()
    assert result.report["notes"] == [
        "nothing was found, all voxels are background: is this what the model was trained on?"
    ]
