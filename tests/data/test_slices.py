"""Training windows against images whose grey value is their own position, with one augmentation on at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from hf_binaryformer.data.prepared_folder import Case
from hf_binaryformer.data.slices import SliceSamples, build_augmentation
from hf_binaryformer.modeling.image_processing import BinaryFormerImageProcessor

STILL: dict[str, Any] = {
    "foreground_fraction": 0.5, "max_shift": 0, "max_rotation": 0.0, "max_zoom": 0.0, "max_shear": 0.0, "flip_axis": None,
    "intensity_probability": 0.0, "max_blur": 0.3, "max_bias": 0.0, "max_gamma": 1.0, "max_gain": 0.0, "max_noise": 0.0,
}  # fmt: skip
# Slices are taken along the middle axis; 1 in the image's corner fixes the scale, so that intensities stay as they are.
WINDOW = (24, 24)


def processor(**fields: Any) -> BinaryFormerImageProcessor:
    given = dict(
        image_size=WINDOW, num_slices=1, slice_axis=1, spacing=None, percentiles=(0, 100), foreground_only=False
    )
    return BinaryFormerImageProcessor(**(given | {"intensity_ceiling": 2.0} | fields))


def samples_of(
    folder: Path, image: np.ndarray, label: np.ndarray, *, count: int = 100, mm: float = 1.0, **augment: Any
) -> tuple[SliceSamples, list[dict[str, torch.Tensor]]]:
    """The data set of one case, and its samples; `augment` changes STILL."""
    affine = np.diag([mm, mm, mm, 1.0])
    for name, array in (("image", image.astype(np.float32)), ("label", label.astype(np.uint8))):
        nib.save(nib.Nifti1Image(array, affine), folder / f"{name}.nii.gz")
    case = Case("c", "c", "train", folder / "image.nii.gz", folder / "label.nii.gz")
    wanted = processor(spacing=(1.0, 1.0, 1.0) if mm != 1 else None)
    samples = SliceSamples([case], wanted, STILL | augment, 0, count)
    return samples, [samples[number] for number in range(count)]


def lopsided(shape: tuple[int, int, int] = (24, 6, 24)) -> np.ndarray:
    """Labels 0 and 5, unlike themselves under every flip and turn; the outline of the image, where it is not 0."""
    label = np.zeros(shape, np.uint8)
    label[3:9, :, 4:20] = label[9:21, :, 4:8] = 5
    return label


def bright(label: np.ndarray) -> np.ndarray:
    """An image that is 0.5 everywhere and 1 where there is a label; nothing of it is cropped."""
    image = np.where(label > 0, 1.0, 0.5)
    image.flat[0] = 0
    return image


def test_a_flip_moves_image_and_labels_together(tmp_path: Path) -> None:
    label = lopsided()
    flipped = {axis: False for axis in (None, 0, 1)}
    for axis in flipped:
        _, found = samples_of(tmp_path, bright(label), label, count=20, flip_axis=axis)
        for sample in found:
            assert torch.equal(sample["labels"] > 0, sample["pixel_values"][0] > 0.75)
        seen = {bool((s["labels"].numpy() == label[:, 0]).all()) for s in found}
        assert seen == ({True} if axis is None else {True, False}), "half of them are flipped"
        if axis is not None:
            other = next(s["labels"].numpy() for s in found if (s["labels"].numpy() != label[:, 0]).any())
            np.testing.assert_array_equal(other, np.flip(label[:, 0], axis))


@pytest.mark.parametrize("mm", [0.5, 0.7, 1.6])
def test_resampled_labels_lie_where_the_image_is_and_are_not_mixed(mm: float, tmp_path: Path) -> None:
    label = np.kron(lopsided((12, 6, 12)), np.ones((3, 3, 3), np.uint8))
    samples, _ = samples_of(tmp_path, bright(label), label, mm=mm, count=1)
    assert set(samples.labels[0].unique().tolist()) == {0, 5}
    # The grey value is 3/4 on the very edge of the label.
    image, found = samples.images[0].float(), samples.labels[0] > 0
    clear = (image - 0.75).abs() > 0.1
    clear[0] = False
    assert torch.equal(found[clear], (image > 0.75)[clear]) and clear.float().mean() > 0.7
    assert ((image > 0.55) & (image < 0.95)).any(), "intensities are mixed, labels are not"


@pytest.mark.parametrize(("fraction", "expected"), [(1.0, 1.0), (0.8, 0.8 + 0.2 * 0.1), (0.0, 0.1)])
def test_the_stated_share_of_samples_is_labelled(fraction: float, expected: float, tmp_path: Path) -> None:
    """Two of twenty slices have labels: a sample is one of them by request, or by chance."""
    label = np.zeros((8, 20, 8), np.uint8)
    label[2:5, 7:9, 3:6] = 1
    _, samples = samples_of(tmp_path, bright(label), label, count=300, foreground_fraction=fraction)
    share = np.mean([bool(sample["labels"].any()) for sample in samples])
    assert abs(share - expected) <= 4 * (expected * (1 - expected) / 300) ** 0.5


@pytest.mark.parametrize(("fraction", "expected"), [(1.0, 1 / 2), (0.5, 0.5 / 2 + 0.5 / 10), (0.0, 1 / 10)])
def test_slices_are_drawn_for_a_class(fraction: float, expected: float, tmp_path: Path) -> None:
    """Class 3 is in one of the ten labelled slices, class 1 in all; class 2 is in no slice and is never asked for."""
    label = np.zeros((8, 20, 8), np.uint8)
    label[2:5, 5:15, 3:6] = 1
    label[6, 9, 6] = 3
    _, samples = samples_of(tmp_path, bright(label), label, count=300, foreground_fraction=1.0, class_fraction=fraction)
    assert all((sample["labels"] == 1).any() for sample in samples)
    share = np.mean([bool((sample["labels"] == 3).any()) for sample in samples])
    assert abs(share - expected) <= 4 * (expected * (1 - expected) / 300) ** 0.5


@pytest.mark.parametrize("augment", [{"max_gain": 0.4}, {"max_rotation": 0.5}, {"max_zoom": 0.3}, {"max_shear": 0.4}])
def test_every_sample_draws_its_own_augmentation(augment: dict[str, float], tmp_path: Path) -> None:
    label = lopsided()
    samples, found = samples_of(tmp_path, bright(label), label, count=8, **augment)
    pixels = [sample["pixel_values"] for sample in found]
    assert all(torch.equal(samples[number]["pixel_values"], pixels[number]) for number in (5, 2))
    apart = [(a - b).abs().max() for n, a in enumerate(pixels) for b in pixels[:n]]
    assert min(apart) > 1e-5


def position(shape: tuple[int, int]) -> np.ndarray:
    """Image (I, 4, K) whose grey value is its row and column, 1 + 100 · row + column, and a label everywhere."""
    row, column = np.indices(shape)
    return np.repeat((1 + 100 * row + column)[:, None], 4, 1).astype(np.float32)


def starts(samples: list[dict[str, torch.Tensor]], shape: tuple[int, int]) -> np.ndarray:
    """(row, column) of the first pixel of every window, found in the image that is its own position."""
    found = []
    for sample in samples:
        # The image is scaled to 0 ... 1.
        pixels = sample["pixel_values"][0].numpy() * (100 * (shape[0] - 1) + shape[1] - 1)
        rows, columns = np.nonzero(sample["labels"].numpy())
        middle = rows[len(rows) // 2], columns[len(rows) // 2]
        row, column = divmod(round(float(pixels[middle])), 100)
        found.append((row - middle[0], column - middle[1]))
    return np.array(found)


def test_a_small_slice_lies_in_the_middle_of_its_window(tmp_path: Path) -> None:
    """As the pipeline puts it."""
    shape = (10, 16)
    image = position(shape)
    for sample in samples_of(tmp_path, image, np.ones_like(image), count=3)[1]:
        expected = np.pad(image[:, 0] - 1, ((7, 7), (4, 4))) / (image.max() - 1)
        np.testing.assert_allclose(sample["pixel_values"][0].numpy(), expected, atol=1e-3)
        np.testing.assert_array_equal(sample["labels"].numpy(), np.pad(np.ones(shape), ((7, 7), (4, 4))))


def test_windows_of_a_large_slice_lie_anywhere_in_it(tmp_path: Path) -> None:
    shape = (34, 44)
    image = position(shape)
    found = starts(samples_of(tmp_path, image, np.ones_like(image), count=150)[1], shape)
    spare = np.array(shape) - WINDOW
    assert (found.min(0) == 0).all() and (found.max(0) == spare).all()
    deviation = np.sqrt((spare**2 / 12 + 1 / 6) / len(found))
    assert (np.abs(found.mean(0) - spare / 2) < 4 * deviation).all()


def test_windows_are_shifted_by_at_most_what_is_asked(tmp_path: Path) -> None:
    shape = (24, 24)
    image = position(shape)
    found = starts(samples_of(tmp_path, image, np.ones_like(image), count=80, max_shift=4)[1], shape)
    assert (found.min(0) == -4).all() and (found.max(0) == 4).all()
    assert (np.abs(found.mean(0)) < 4 * np.sqrt(8**2 / 12 / len(found))).all()


def test_turned_labels_are_not_mixed(tmp_path: Path) -> None:
    label = lopsided()
    for sample in samples_of(tmp_path, bright(label), label, count=20, max_rotation=0.5, max_zoom=0.2, max_shear=0.2)[
        1
    ]:
        assert set(sample["labels"].unique().tolist()) <= {0, 5}
        clear = (sample["pixel_values"][0] - 0.75).abs() > 0.24
        assert torch.equal((sample["labels"] > 0)[clear], (sample["pixel_values"][0] > 0.75)[clear])


@pytest.mark.parametrize("side", [64, 96])
def test_low_resolution_does_not_move_the_image_off_its_labels(side: int) -> None:
    """A ramp stays a ramp: its mean difference in the middle is the shift in pixels."""
    ramp = torch.arange(float(side)).expand(1, side, side).clone() / side
    wanted = processor(image_size=(side, side))
    intensity = build_augmentation(STILL | {"intensity_probability": 1.0}, wanted)[1]
    lowered = 0
    for seed in range(24):
        intensity.set_random_state(seed=seed)
        image = intensity({"image": ramp[0][None].clone(), "label": torch.zeros(1, side, side)})["image"]
        inner = (image - ramp)[0, 20:-20, 20:-20] * side
        assert abs(float(inner.mean())) < 0.05, f"shifted by {float(inner.mean()):.2f} pixels"
        lowered += bool(inner.abs().max() > 1e-3)
    assert lowered >= 3


@pytest.mark.parametrize("name", ["curve_probability", "redraw_probability"])
@pytest.mark.parametrize("probability", [None, 1.0])
def test_contrasts_are_drawn_for_each_window(name: str, probability: float | None, tmp_path: Path) -> None:
    label = lopsided()
    _, samples = samples_of(tmp_path, bright(label), label, count=20, **{name: probability})
    means = {round(float(sample["pixel_values"][0][sample["labels"] > 0].mean()), 4) for sample in samples}
    assert len(means) > (12 if name == "redraw_probability" else 18) if probability else len(means) == 1


EYES = {0: "background", 3: "left eye", 9: "right eye", 20: "nose"}


def face() -> np.ndarray:
    """A left eye at low I, a right eye at high I, of different shapes, and a nose; unlike itself in every mirror."""
    label = np.zeros((24, 24, 24), np.uint8)
    label[3:7, 4:9, 5:11] = 3
    label[15:22, 6:12, 4:9] = 9
    label[10:13, 12:20, 12:20] = 20
    return label


def face_samples(folder: Path, axes: list[int], mirror: float, count: int = 60, num_slices: int = 3, **augment: Any):
    image = bright(face()) + 0.3 * np.linspace(0, 1, 24)[:, None, None] * (face() > 0)
    for name, array in (("image", image.astype(np.float32)), ("label", face())):
        nib.save(nib.Nifti1Image(array, np.eye(4)), folder / f"{name}.nii.gz")
    case = Case("c", "c", "train", folder / "image.nii.gz", folder / "label.nii.gz")
    wanted = processor(num_slices=num_slices, slice_position=True, slice_axis=axes[0])
    settings = STILL | {"slice_axes": axes, "mirror": mirror, "foreground_fraction": 1.0} | augment
    samples = SliceSamples([case], wanted, settings, 0, count, EYES)
    return samples, [samples[number] for number in range(count)]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_mirror_exchanges_the_sides_and_their_labels(axis: int, mirrored: bool, tmp_path: Path) -> None:
    samples, found = face_samples(tmp_path, [axis], float(mirrored))
    classes = np.searchsorted(sorted(EYES), face())
    image = samples.images[0].float().numpy()
    if mirrored:
        # The whole volume in a mirror, where a left eye is a right one.
        image, classes = image[::-1], np.array([0, 2, 1, 3])[classes[::-1]]
    image, classes = (np.moveaxis(array, axis, 0) for array in (image, classes))
    seen = set()
    for sample in found:
        place = round((float(sample["pixel_values"][-1, 0, 0]) + 1) / 2 * 23)
        np.testing.assert_array_equal(sample["labels"].numpy(), classes[place])
        neighbours = image[np.clip([place - 1, place, place + 1], 0, 23)]
        np.testing.assert_allclose(sample["pixel_values"][:3].numpy(), neighbours, atol=2e-3)
        seen |= set(sample["labels"].unique().tolist())
    assert seen == {0, 1, 2, 3}


def test_half_of_the_samples_are_mirrored_and_all_axes_occur(tmp_path: Path) -> None:
    samples, found = face_samples(tmp_path, [1, 2, 0], 0.5, count=240)
    views = {axis: np.moveaxis(np.searchsorted(sorted(EYES), face()), axis, 0) for axis in range(3)}
    other = {
        axis: np.moveaxis(np.array([0, 2, 1, 3])[np.searchsorted(sorted(EYES), face())[::-1]], axis, 0)
        for axis in views
    }
    counts = np.zeros((3, 2), int)
    for sample in found:
        labels, place = sample["labels"].numpy(), round((float(sample["pixel_values"][-1, 0, 0]) + 1) / 2 * 23)
        fits = [[(v[axis][place] == labels).all() for v in (views, other)] for axis in range(3)]
        assert np.any(fits)
        counts += np.array(fits)
    shares = counts.sum(1) / counts.sum()
    assert (np.abs(shares - 1 / 3) < 0.13).all() and abs(counts[:, 1].sum() / counts.sum() - 0.5) < 0.13
    assert torch.equal(samples[7]["labels"], found[7]["labels"])


def test_a_plain_flip_of_labels_with_sides_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set augment.flip_axis to null and use augment.mirror"):
        face_samples(tmp_path, [1], 0.0, count=1, flip_axis=0)
    face_samples(tmp_path, [1], 0.0, count=1, flip_axis=1)  # upside down, each side stays
    face_samples(tmp_path, [0], 0.0, count=1, flip_axis=0)  # back to front


def test_a_label_without_a_name_is_refused(tmp_path: Path) -> None:
    label = lopsided()
    for name, array in (("image", bright(label).astype(np.float32)), ("label", label)):
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / f"{name}.nii.gz")
    case = Case("c", "c", "train", tmp_path / "image.nii.gz", tmp_path / "label.nii.gz")
    with pytest.raises(ValueError, match=r"has the labels \[5\], which have no name"):
        SliceSamples([case], processor(), STILL, 0, 1, {0: "background", 1: "a"})
