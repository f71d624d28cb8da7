"""The engine that synthesises scans, on toy heads; the oracles are written here or are numpy's and scipy's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from scipy import ndimage
from typer.testing import CliRunner

from hf_binaryformer.commands import prepare
from hf_binaryformer.data.synthesis.anatomy import Anatomy, read_anatomy
from hf_binaryformer.data.synthesis.description import DESCRIPTIONS, Ranges, load_description
from hf_binaryformer.data.synthesis.engine import SynthVolume, synthesize
from hf_binaryformer.data.synthesis.paint import draw_means
from hf_binaryformer.data.synthesis.shapes import Deformation, affine_matrix
from hf_binaryformer.modeling.intensities import IntensityScale
from hf_binaryformer.pipelines.sides import mirrored_labels

BRAIN = DESCRIPTIONS / "brain-sides.yaml"
# FreeSurfer's numbers, written out a second time.
LEFT = {
    2: "cerebral white matter", 3: "cerebral cortex", 4: "lateral ventricle", 5: "inferior lateral ventricle",
    7: "cerebellum white matter", 8: "cerebellum cortex", 10: "thalamus", 11: "caudate", 12: "putamen", 13: "pallidum",
    17: "hippocampus", 18: "amygdala", 26: "accumbens", 28: "ventral DC",
}  # fmt: skip
RIGHT = dict(zip(LEFT, (41, 42, 43, 44, 46, 47, 49, 50, 51, 52, 53, 54, 58, 60), strict=True))
MIDDLE = {14: "third ventricle", 15: "fourth ventricle", 16: "brain stem", 24: "CSF"}
# Values without a label of their own: what they are labelled as.
OTHERS = {25: 2, 57: 41, 136: 4, 137: 5, 163: 43, 164: 44, 30: 0, 62: 0, 72: 24, 85: 0, 507: 0, 511: 0, 515: 0}
EXPECTED = {**{v: v for v in (*LEFT, *RIGHT.values(), *MIDDLE)}, **OTHERS}
ONE_MM = {"only": {"probability": 1.0, "plane": [1.0, 1.0], "slice": None, "axis": None}}
# No deformation, one voxel a mm, nothing random about intensities but the means.
STILL: dict[str, Any] = dict(
    rotation_degrees=0.0, scale=0.0, shear=0.0, elastic=[], mirror_probability=0.0, contrasts={"t1": 1.0},
    mean_jitter=0.0, tissue_std=(0.0, 0.0), agent_probability=0.0, lesion_probability=0.0, whole_probability=1.0,
    margin=(3.0, 3.0), below=(99.0, 99.0), cuts={"none": {"probability": 1.0}}, resolutions=ONE_MM, blur=(0.0, 0.0),
    ringing_probability=0.0, motion_probability=0.0, bias_log=(0.0, 0.0), noise=(0.0, 0.0), log_gamma=0.0,
    keep_grid=True,
)  # fmt: skip


def still(**changes: Any) -> Ranges:
    return dataclasses.replace(load_description(BRAIN).train_ranges, **(STILL | changes))


def toy_head(shape: tuple[int, int, int] = (44, 48, 40)) -> np.ndarray:
    """Nested ellipsoids with all other values as cubes in the white matter of one side; left is at low I."""
    index = np.indices(shape)
    radius = np.sqrt(sum(((axis - (n - 1) / 2) / (n / 2 - 3)) ** 2 for axis, n in zip(index, shape, strict=True)))
    left = index[0] < shape[0] / 2
    values = np.zeros(shape, np.int16)
    for limit, pair in ((1.0, (511, 511)), (0.92, (515, 515)), (0.84, (24, 24)), (0.75, (3, 42)), (0.62, (2, 41))):
        values[(radius < limit) & left], values[(radius < limit) & ~left] = pair
    corners = np.argwhere((radius < 0.5) & (index % 4 == 0).all(axis=0))
    rest = sorted(set(EXPECTED) - {*np.unique(values).tolist()})
    assert len(corners) >= len(rest)
    for value, (i, j, k) in zip(rest, corners, strict=False):
        values[i : i + 2, j : j + 2, k : k + 2] = value
    return values


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    affine = np.eye(4)
    affine[:3, 3] = (-20, -25, -11)
    return Anatomy(toy_head(), affine, load_description(BRAIN))


def in_anatomy(volume: SynthVolume, anatomy: Anatomy) -> np.ndarray:
    """Voxel of the anatomy (3, I, J, K) at the same mm as each voxel of a volume, rounded."""
    to = np.linalg.inv(anatomy.affine) @ volume.affine
    place = np.einsum("ab,bijk->aijk", to[:3, :3], np.indices(volume.labels.shape)) + to[:3, 3, None, None, None]
    return np.rint(place).astype(int)


def at(array: np.ndarray, place: np.ndarray) -> np.ndarray:
    inside = ((place >= 0) & (place < np.array(array.shape)[:, None, None, None])).all(0)
    return np.where(inside, array[tuple(place * inside)], 0)


# The description


def test_labels_are_those_of_freesurfer() -> None:
    names = {0: "background"} | MIDDLE
    names |= {value: f"left {name}" for value, name in LEFT.items()}
    names |= {RIGHT[value]: f"right {name}" for value, name in LEFT.items()}
    found = load_description(BRAIN)
    assert found.label_names == dict(sorted(names.items())) and len(names) == 33
    labels = {v: label for region in found.regions for v, label in zip(region.values, region.labels, strict=True)}
    assert {value: labels[value] for value in EXPECTED} == EXPECTED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tissues": {"white": {"t1": [0, 1]}}}, "has no mean for"),
        ({"lesion": 3}, "unknown keys"),
        ({"ranges": {"scale": 1}}, "ranges lack"),
        ({"surroundings": {"muscle": [2]}}, r"values \[2\] stand in two regions"),
        ({"surroundings": {"stone": [600]}}, r"has the tissue \['stone'\]"),
        ({"evaluation": {"ranges": {}, "sets": {"a": {"contrst": 1}}}}, "unknown"),
    ],
)
def test_a_wrong_description_is_told(change: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(BRAIN.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_description(path)


def test_a_description_like_another_says_only_what_differs(tmp_path: Path) -> None:
    path, full = tmp_path / "mine.yaml", yaml.safe_load(BRAIN.read_text())
    path.write_text("like: brain-sides\ncase: head\nranges: {contrasts: {random: 1.0}}\n")
    full["ranges"]["contrasts"] = {"random": 1.0}
    assert dataclasses.asdict(load_description(path)) == full | {
        name: value for name, value in dataclasses.asdict(load_description(BRAIN)).items() if name not in full
    } | {"case": "head"}
    path = tmp_path / "wrong.yaml"
    path.write_text("like: brains\n")
    with pytest.raises(ValueError, match=r"brains.yaml does not exist; those of the project are abdomen, brain-sides"):
        load_description(path)


@pytest.mark.parametrize(
    ("contrast", "order"),
    [
        ("t1", ("cerebral white matter", "cerebral cortex", "lateral ventricle")),
        ("t2", ("lateral ventricle", "cerebral cortex", "cerebral white matter")),
        ("pd", ("lateral ventricle", "cerebral white matter", "cerebral vessel")),
        ("flair", ("cerebral cortex", "cerebral white matter", "lateral ventricle")),
    ],
)
def test_contrasts_order_tissues(contrast: str, order: tuple[str, ...]) -> None:
    description, right = load_description(BRAIN), 0
    for seed in range(50):
        means = draw_means(description, contrast, description.train_ranges, np.random.default_rng(seed))
        first, second, third = (means[name] for name in order)
        right += first > second > third
    assert right >= 40, right


def test_random_contrasts_have_every_order() -> None:
    description = load_description(BRAIN)
    names = ("cerebral white matter", "cerebral cortex", "lateral ventricle")
    orders = set()
    for seed in range(80):
        means = draw_means(description, "random", description.train_ranges, np.random.default_rng(seed))
        orders.add(tuple(sorted(names, key=lambda name: means[name])))
    assert len(orders) == 6


# Volumes


@pytest.mark.parametrize("keep_grid", [True, False])
def test_every_value_gets_its_label_at_its_place(anatomy: Anatomy, keep_grid: bool) -> None:
    volume = synthesize(anatomy, still(keep_grid=keep_grid), (0,))
    values = at(anatomy.values, in_anatomy(volume, anatomy))
    expected = np.vectorize(EXPECTED.get)(values, 0)
    offset = (volume.affine[:3, 3] - anatomy.affine[:3, 3]) % 1
    assert ((offset < 1e-6) | (offset > 1 - 1e-6)).all(), "the toy's voxels and the scan's are the same"
    np.testing.assert_array_equal(volume.labels, expected)
    assert (volume.labels > 0).sum() == sum((anatomy.values == value).sum() for value, to in EXPECTED.items() if to)
    levels = [np.unique(volume.image[values == value]) for value in (2, 41, 3, 42)]
    for left, right in (levels[:2], levels[2:]):
        assert abs(int(np.median(left)) - int(np.median(right))) <= 1, "sides have one mean"


def test_a_mirrored_volume_has_its_sides_exchanged(anatomy: Anatomy) -> None:
    volume = synthesize(anatomy, still(), (0,))
    mirrored = synthesize(anatomy, still(mirror_probability=1.0), (0,))
    other = {**dict(zip(RIGHT, RIGHT.values(), strict=True)), **{b: a for a, b in RIGHT.items()}}
    place = in_anatomy(mirrored, anatomy)
    place[0] = anatomy.values.shape[0] - 1 - place[0]
    labels = np.vectorize(EXPECTED.get)(at(anatomy.values, place), 0)
    np.testing.assert_array_equal(mirrored.labels, np.vectorize(lambda label: other.get(label, label))(labels))
    levels = [np.median(v.image[v.labels == label]) for label in (14, 24) for v in (volume, mirrored)]
    assert abs(levels[0] - levels[1]) <= 2 and abs(levels[2] - levels[3]) <= 2, "the image moves with its labels"
    # Left stays on the left of space, whatever is mirrored.
    rows = [np.nonzero(v.labels == label)[0].mean() for v in (volume, mirrored) for label in (3, 42)]
    assert rows[0] < rows[1] and rows[2] < rows[3]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_thick_slices_hold_the_mean_of_what_they_cover(anatomy: Anatomy, axis: int) -> None:
    one = {"probability": 1.0, "plane": [1.0, 1.0], "slice": [1.0, 1.0], "axis": axis}
    ranges = {"slice_profile": (1.0, 1.0), "fine": (0.25, 0.25), "margin": (4.0, 4.0)}
    thin, found = (
        synthesize(anatomy, still(**ranges, resolutions={"only": one | {"slice": [mm, mm]}}), (5,)) for mm in (1.0, 4.0)
    )
    assert found.affine[axis, axis] == pytest.approx(4.0) and thin.affine[axis, axis] == pytest.approx(1.0)
    scale = thin.image.max() / 255
    # The mean over 4 mm around each slice of the thin volume, interpolated between its voxels.
    lines = np.moveaxis(thin.image.astype(float), axis, -1)
    first = (found.affine[axis, 3] - thin.affine[axis, 3]) + 4.0 * np.arange(found.image.shape[axis])
    near = first[:, None] + np.arange(-1.875, 2, 0.25)
    weights = np.stack(
        [np.interp(near, np.arange(lines.shape[-1]), row, 0, 0).mean(1) for row in np.eye(lines.shape[-1])]
    )
    expected = np.moveaxis(lines @ weights, -1, axis)
    ratio = np.median(found.image[found.image > 60] / expected[found.image > 60])
    inner = found.image > 0
    assert np.corrcoef(found.image[inner], expected[inner])[0, 1] > 0.995
    assert np.abs(found.image / ratio - expected)[inner].mean() < 3 * scale


def test_voxels_at_a_border_have_a_part_of_both_tissues(anatomy: Anatomy) -> None:
    volume = synthesize(anatomy, still(oversampling=4.0, fine=(0.25, 1.0)), (1,))
    values = at(anatomy.values, in_anatomy(volume, anatomy))
    deep = ndimage.binary_erosion(values == 2, iterations=2)
    air = ndimage.binary_erosion(values == 0, iterations=2)
    assert np.ptp(volume.image[deep].astype(int)) <= 1 and volume.image[air].max() == 0
    skin = (values == 511) & ndimage.binary_dilation(values == 0)
    # Half of a voxel's width reaches into the next one.
    level = np.median(volume.image[ndimage.binary_erosion(values == 511)]) if (values == 511).any() else 0
    assert len(np.unique(volume.image[skin])) > 10 and volume.image[skin].min() < level


def test_a_volume_depends_on_its_seed_alone(anatomy: Anatomy) -> None:
    ranges = load_description(BRAIN).train_ranges
    first = synthesize(anatomy, ranges, (0, 1, 3))
    synthesize(anatomy, ranges, (0, 1, 4))
    torch.manual_seed(7)
    again, other = synthesize(anatomy, ranges, (0, 1, 3)), synthesize(anatomy, ranges, (0, 1, 4))
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert first.image.shape != other.image.shape or (first.image != other.image).any()


def test_lesions_and_contrast_agents_keep_labels(anatomy: Anatomy) -> None:
    plain = synthesize(anatomy, still(), (2,))
    marked = {"lesion_probability": 1.0, "lesion_count": (6, 6), "lesion_mean": (0.0, 0.0), "agent_probability": 1.0}
    changed = synthesize(anatomy, still(**marked), (2,))
    np.testing.assert_array_equal(plain.labels, changed.labels)
    assert changed.drawn["lesions"] == 6 and changed.drawn["agent"]
    inner = ndimage.binary_erosion(np.isin(plain.labels, [2, 41]))
    assert changed.image[inner].min() < 10 < plain.image[inner].min()
    # The agent is brightest in the membrane, the fluid beside the bone; there is none without it.
    dura = (plain.labels == 24) & ndimage.binary_dilation(at(anatomy.values, in_anatomy(plain, anatomy)) == 515)
    assert changed.image[dura].mean() > 2 * plain.image[dura].mean()


def test_stripping_removes_what_is_outside_and_its_labels(anatomy: Anatomy) -> None:
    for margin in (0.5, 3.0):
        strips = {
            "one": {"probability": 1.0, "margin": [margin, margin], "wobble": [0.0, 0.0], "spacing": [20.0, 20.0]}
        }
        volume = synthesize(anatomy, still(whole_probability=0.0, strips=strips, noise=(0.1, 0.1)), (3,))
        values = at(anatomy.values, in_anatomy(volume, anatomy))
        tissue = (values > 0) & (values < 500) & ~np.isin(values, [24, 72])
        distance = ndimage.distance_transform_edt(~tissue)
        # The outline is that of the closed organ, which lies up to 2 mm outside of the toy's cubes of fluid.
        assert volume.image[distance > margin + 2.5].max(initial=0) == 0
        assert (volume.image[tissue] > 0).mean() > 0.97
        assert not volume.labels[volume.image == 0][:].any() or (volume.labels[volume.image == 0] > 0).mean() < 0.01
    assert (volume.labels == 24).any()


def test_uneven_stripping_loses_brain_and_leaves_skull(anatomy: Anatomy) -> None:
    strips = {"ragged": {"probability": 1.0, "margin": [0.0, 0.0], "wobble": [3.0, 3.0], "spacing": [9.0, 9.0]}}
    volume = synthesize(anatomy, still(whole_probability=0.0, strips=strips, margin=(8.0, 8.0)), (3,))
    values = at(anatomy.values, in_anatomy(volume, anatomy))
    cortex, outside = np.isin(values, [3, 42]), values >= 500
    assert 0.3 < (volume.image[cortex] > 0).mean() < 0.98
    assert (volume.image[outside] > 0).any()
    assert not volume.labels[cortex & (volume.image == 0)].any()


@pytest.mark.parametrize(("axis", "side"), [(2, "high"), (2, "low"), (1, "high"), (0, "slab")])
def test_a_cut_field_of_view(anatomy: Anatomy, axis: int, side: str) -> None:
    cuts = {"cut": {"probability": 1.0, "axis": axis, "side": side, "mm": [12.0, 12.0]}}
    volume, whole = (synthesize(anatomy, still(cuts=c), (4,)) for c in (cuts, STILL["cuts"]))
    low, high = (
        [v.affine[a, 3] + end * (v.image.shape[a] - 1) for v in (volume, whole) for a in range(3)] for end in (0, 1)
    )
    lost = {"low": low[axis] - low[3 + axis], "high": high[3 + axis] - high[axis]}
    for other in {0, 1, 2} - {axis}:
        assert low[other] == pytest.approx(low[3 + other], abs=1) and high[other] == pytest.approx(
            high[3 + other], abs=1
        )
    if side == "slab":
        assert high[axis] - low[axis] == pytest.approx(12, abs=1.5)
    else:
        # The head reaches about 4 mm beyond the brain, the margin 3 mm more; the brain's box is known to 4 mm.
        assert 13 <= lost[side] <= 26
        assert lost["low" if side == "high" else "high"] == pytest.approx(0, abs=1)


def test_deformation_never_folds() -> None:
    """The determinant of the map's derivative stays positive, by finite differences."""
    ranges = load_description(BRAIN).train_ranges
    axes = [np.arange(0.0, 200, 4)] * 3
    strength = []
    for seed in range(12):
        places = Deformation(
            (200, 200, 200), dataclasses.replace(ranges, mirror_probability=0), np.random.default_rng(seed)
        )
        moved = places.places(axes).numpy()
        slopes = np.stack([np.stack(np.gradient(row, 4.0), -1) for row in moved], -2)
        folded = (np.linalg.det(slopes) <= 0.05).mean()
        assert folded < 2e-3, (seed, folded)
        middle = moved.mean((1, 2, 3), keepdims=True)
        strength.append(np.abs(moved - middle - np.stack(np.meshgrid(*axes, indexing="ij")) + 98).mean())
    assert np.mean(strength) > 3, "mm"


def test_affine_matrix_turns_about_each_axis() -> None:
    ranges = still(rotation_degrees=20.0)
    for seed in range(5):
        matrix = affine_matrix(ranges, np.random.default_rng(seed))
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(matrix) == pytest.approx(1)


@pytest.mark.parametrize(("gain", "background"), [(1.0, 0.0), (3.5, -1024.0), (0.01, 7.0)])
def test_any_level_of_the_background_scales_alike(anatomy: Anatomy, gain: float, background: float) -> None:
    """Training on backgrounds of 0 covers files that have another level there."""
    image = synthesize(anatomy, still(whole_probability=0.0, noise=(0.02, 0.02)), (6,)).image.astype(np.float32)
    scaled, other = (
        IntensityScale.of(array, (0.5, 99.5), 1.5).apply(array) for array in (image, gain * image + background)
    )
    np.testing.assert_allclose(scaled, other, atol=1e-3)


def test_sides_of_names() -> None:
    names = {0: "background", 3: "left eye", 7: "right eye", 9: "Left Ear", 8: "Right Ear", 5: "leftover"}
    assert mirrored_labels(names) == {0: 0, 3: 7, 7: 3, 9: 8, 8: 9, 5: 5}
    with pytest.raises(ValueError, match="label 3 is 'left eye' and no label is the same on the right"):
        mirrored_labels({3: "left eye"})
    assert mirrored_labels({3: "left eye", 4: "right ear", 5: "left ear"}, strict=False) == {3: 3, 4: 5, 5: 4}


# The data set


def save_toy(folder: Path, number: int, values: np.ndarray) -> None:
    nib.save(nib.Nifti1Image(values, np.eye(4)), folder / f"training_seg_{number:02d}.nii.gz")


def test_prepare_writes_sets_by_anatomy(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.mkdir()
    for number in (1, 2, 3):
        save_toy(maps, number, toy_head((44, 48, 38 + number)))
    arguments = ["synth-brain-sides", "--labels", str(maps), "--out", str(tmp_path / "out"), "--variants", "2"]
    splits = ["--train", "1", "--validation", "2", "--test", "3", "--qc-every", "7"]
    result = CliRunner().invoke(prepare.app, arguments + splits)
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    names = load_description(BRAIN).label_names
    assert {int(label): name for label, name in manifest["label_names"].items()} == names
    rows = manifest["cases"]
    sets = {row["case"]: row["set"] for row in rows if row["split"] == "test"}
    expected = {f"{c}-{s}" for c in ("t1", "t2", "flair", "random", "t1-axial-5mm") for s in ("whole", "stripped")}
    assert set(sets.values()) == expected and len(sets) == 10
    assert [row["group"] for row in rows if row["split"] == "train"] == ["anatomy_01"] * 2
    for row in rows:
        image, label = (nib.load(tmp_path / "out" / row[kind]) for kind in ("image", "label"))
        assert image.shape == label.shape and nib.aff2axcodes(image.affine) == ("R", "A", "S")
        assert image.get_data_dtype() == label.get_data_dtype() == np.uint8
        assert set(np.unique(label.dataobj)) <= set(names)
        if "5mm" in row["set"]:
            np.testing.assert_allclose(row["spacing"], [1, 1, 5])
            assert row["contrast"] == "t1"
        else:
            np.testing.assert_allclose(row["spacing"], [1, 1, 1])
    assert len({row["image_sha256"] for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((20, 20, 20), 777, np.int16), r"has the values \[777\], which brain-sides.yaml lacks"),
        (np.full((20, 20, 20), 515, np.int16), "has none of the labels"),
    ],
)
def test_a_foreign_label_map_is_told(values: np.ndarray, message: str, tmp_path: Path) -> None:
    save_toy(tmp_path, 1, values)
    with pytest.raises(ValueError, match=message):
        read_anatomy(tmp_path / "training_seg_01.nii.gz", BRAIN)
