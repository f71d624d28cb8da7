"""The image processor: scaling, slicing, and what it hands back."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor

from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.image_processing import BinaryFormerImageProcessor


@pytest.fixture
def volume() -> np.ndarray:
    array = np.random.default_rng(0).gamma(2.0, 100.0, (6, 7, 8)).astype(np.float32)
    array[:2] = 0
    return array


def test_scaling_by_percentiles_of_the_foreground(volume):
    processor = BinaryFormerImageProcessor(percentiles=(0.0, 99.0), intensity_ceiling=1.5)
    high = np.percentile(volume[volume > 0], 99.0)
    low = 0
    np.testing.assert_allclose(
        processor.scale_volume(volume), np.clip((volume - low) / (high - low), 0, 1.5), rtol=1e-5, atol=1e-6
    )
    everything = BinaryFormerImageProcessor(percentiles=(2.0, 98.0), foreground_only=False)
    low, high = np.percentile(volume, [2.0, 98.0])
    np.testing.assert_allclose(
        everything.scale_volume(volume), np.clip((volume - low) / (high - low), 0, 1.5), rtol=1e-5, atol=1e-6
    )


def test_scaling_does_not_depend_on_the_scanners_units(volume):
    processor = BinaryFormerImageProcessor()
    np.testing.assert_allclose(
        processor.scale_volume(volume * 1e4), processor.scale_volume(volume), rtol=1e-4, atol=1e-5
    )


def test_constant_image_is_refused():
    with pytest.raises(ValueError, match="all intensities are equal"):
        BinaryFormerImageProcessor().scale_volume(np.ones((3, 3, 3)))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_hold_their_neighbours_and_go_back(volume, axis):
    processor = BinaryFormerImageProcessor(slice_axis=axis, num_slices=3, slice_position=True)
    slices = processor.volume_to_slices(volume)
    count = volume.shape[axis]
    assert slices.shape == (count, 4, *np.delete(volume.shape, axis))
    for i in range(count):
        for channel, j in enumerate((max(i - 1, 0), i, min(i + 1, count - 1))):
            np.testing.assert_array_equal(slices[i, channel], volume.take(j, axis))
    np.testing.assert_allclose(slices[:, 3, 0, 0], np.linspace(-1, 1, count), atol=1e-6)
    np.testing.assert_array_equal(processor.slices_to_volume(slices[:, 1]), volume)
    assert processor.slices_to_volume(slices).shape == (4, *volume.shape)


def test_mean_and_deviation_leave_the_position_alone(volume):
    plain = BinaryFormerImageProcessor(slice_position=True).volume_to_slices(volume)
    normal = BinaryFormerImageProcessor(slice_position=True, image_mean=5.0, image_std=2.0).volume_to_slices(volume)
    torch.testing.assert_close(normal[:, :3], (plain[:, :3] - 5) / 2)
    assert torch.equal(normal[:, 3], plain[:, 3])


def test_2d_images_and_label_maps():
    processor = BinaryFormerImageProcessor(image_size=(16, 24), num_slices=3)
    grey = np.arange(8 * 12, dtype=np.float32).reshape(8, 12)
    colour = np.stack([grey] * 3, -1)
    batch = processor([grey, colour], segmentation_maps=[(grey > 40).astype(int)] * 2, return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, 16, 24)
    torch.testing.assert_close(batch["pixel_values"][0], batch["pixel_values"][1])
    assert torch.equal(batch["labels"][0], torch.from_numpy(np.kron(grey > 40, np.ones((2, 2)))).long())


def test_a_ct_has_its_own_window():
    """Soft tissue from -160 to 240 HU fills the range, whatever air and metal there is; MRI is scaled as before."""
    ct = np.linspace(-1000, 3000, 4001, dtype=np.float32).reshape(1, 1, -1)
    processor = BinaryFormerImageProcessor(hounsfield_window=(-160, 240))
    wanted = np.clip((ct + 160) / 400, 0, 1)
    np.testing.assert_allclose(processor.scale_volume(ct), wanted, atol=1e-6)
    mri = ct - ct.min()
    assert np.array_equal(processor.scale_volume(mri), BinaryFormerImageProcessor().scale_volume(mri))


def test_a_picture_lies_in_the_middle_unless_it_is_said():
    """The middle slice of a volume is told 0, so a picture of it must be told the same."""
    picture = np.random.default_rng(0).random((32, 32)).astype(np.float32)
    processor = BinaryFormerImageProcessor(num_slices=3, slice_position=True, image_size=(32, 32))
    pixels = processor(picture)["pixel_values"]
    middle = processor.volume_to_slices(np.stack([processor.scale_volume(picture)] * 5, 1))[2:3]
    torch.testing.assert_close(pixels, middle)
    assert (processor(picture, position=-0.5)["pixel_values"][:, 3] == -0.5).all()
    plain = BinaryFormerImageProcessor(num_slices=3, image_size=(32, 32))
    assert torch.equal(plain(picture, position=-0.5)["pixel_values"], pixels[:, :3])


@pytest.mark.parametrize(("side", "wanted"), [(96, 32), (96, 64), (32, 96), (31, 47), (47, 31), (64, 64)])
def test_label_maps_are_resized_about_the_centres_of_pixels(side, wanted):
    """Each new pixel has the label of an old pixel whose centre is nearest, where the resized image has its value."""
    index = np.repeat(np.arange(side)[:, None], side, 1)
    processor = BinaryFormerImageProcessor(
        image_size=(wanted, wanted), num_slices=1, percentiles=(0, 100), foreground_only=False
    )
    for one in (index, index.T):
        batch = processor(one.astype(np.float32), segmentation_maps=one)
        centre = (np.arange(wanted) + 0.5) * side / wanted - 0.5
        expected = np.broadcast_to(centre[:, None], (wanted, wanted))
        found = batch["labels"][0].numpy() if one is index else batch["labels"][0].numpy().T
        assert np.abs(found - expected).max() <= 0.5 + 1e-9
        pixels = batch["pixel_values"][0, 0].numpy() * (side - 1)
        assert np.abs(pixels - batch["labels"][0].numpy())[1:-1, 1:-1].max() <= 0.5 + 1e-3


def test_post_processing_resizes_logits():
    logits = torch.zeros(1, 2, 4, 4)
    logits[0, 1, :, 2:] = 1.0
    logits[0, 0, :, :2] = 1.0
    processor = BinaryFormerImageProcessor()
    outputs = SimpleNamespace(logits=logits)
    assert torch.equal(processor.post_process_semantic_segmentation(outputs)[0], logits[0].argmax(0))
    (large,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(8, 8)])
    assert large.shape == (8, 8) and large[:, 5:].all() and not large[:, :3].any()
    with pytest.raises(ValueError, match="2 target_sizes for 1 images"):
        processor.post_process_semantic_segmentation(outputs, target_sizes=[(8, 8)] * 2)


def test_saved_and_loaded_also_by_auto_class(tmp_path):
    processor = BinaryFormerImageProcessor(
        slice_axis=2, spacing=(0.5, None, 0.5), image_size=(96, 80), slice_position=True
    )
    processor.save_pretrained(tmp_path)
    BinaryFormerConfig().save_pretrained(tmp_path)
    for again in (BinaryFormerImageProcessor.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)):
        assert isinstance(again, BinaryFormerImageProcessor)
        assert again.to_dict() == processor.to_dict()
    assert again.num_channels == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"orientation": "LPS"}, "expected 'RAS'"),
        ({"slice_axis": 3}, "expected 0, 1, 2 or 'all'"),
        ({"num_slices": 2}, "expected an odd number"),
        ({"window_overlap": 1.0}, "below 1"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        BinaryFormerImageProcessor(**fields)


@pytest.mark.parametrize("spacing", [None, (None, 1.0, None), (2.0, 2.0, 3.0)])
def test_spacing_survives_saving(spacing, tmp_path):
    """None is a spacing too: that of the volume, not the default of the class."""
    BinaryFormerImageProcessor(spacing=spacing).save_pretrained(tmp_path)
    loaded = BinaryFormerImageProcessor.from_pretrained(tmp_path)
    expected = tuple(
        own if asked is None else asked for asked, own in zip(spacing or [None] * 3, (0.7, 0.8, 5.0), strict=True)
    )
    assert loaded.target_spacing((0.7, 0.8, 5.0)) == expected
