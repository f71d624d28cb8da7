"""Bodies drawn around organs, on a toy abdomen of ellipsoids; the oracles are written here or are numpy's and scipy's."""

from __future__ import annotations

import dataclasses
import importlib.util
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
from hf_binaryformer.data.public_data import DATA_SETS
from hf_binaryformer.data.synthesis.anatomy import Anatomy, read_anatomy, resampled
from hf_binaryformer.data.synthesis.body import embodied
from hf_binaryformer.data.synthesis.description import DESCRIPTIONS, Ranges, load_description
from hf_binaryformer.data.synthesis.engine import SynthVolume, synthesize
from hf_binaryformer.data.synthesis.paint import draw_means

ABDOMEN = DESCRIPTIONS / "abdomen.yaml"
WORDS = yaml.safe_load(ABDOMEN.read_text())
# Value -> label, from the file: parts inside organs keep their label, all others have none.
LABEL_OF = {v: v for v in (1, 2, 3, 4, 6, 7, 8, 10)}
LABEL_OF |= {v: label for one in WORDS["parts"].values() for v, label in zip(one["values"], one["labels"], strict=True)}
VALUE = {name: one["values"] for name, one in WORDS["parts"].items()}
MM = 4.0
# Centre (R, A, S) and half axes in mm of a person of 300 mm height; left is at low R.
ORGANS = {
    6: ((205, 120, 190), (55, 60, 55)), 1: ((75, 85, 195), (25, 30, 40)), 7: ((105, 140, 195), (30, 28, 40)),
    2: ((190, 62, 120), (24, 20, 42)), 3: ((90, 62, 130), (24, 20, 42)), 10: ((140, 120, 150), (42, 12, 12)),
    4: ((190, 160, 140), (14, 14, 20)), 8: ((135, 92, 165), (11, 11, 110)),
}  # fmt: skip
# Nothing is deformed, blurred or noisy.
STILL: dict[str, Any] = dict(
    rotation_degrees=0.0, scale=0.0, shear=0.0, elastic=[], mean_jitter=0.0, tissue_std=(0.0, 0.0), lesion_probability=0.0,
    margin=(4.0, 4.0), below=(99.0, 99.0), cuts={"none": {"probability": 1.0}}, blur=(0.0, 0.0), ringing_probability=0.0,
    motion_probability=0.0, bias_log=(0.0, 0.0), noise=(0.0, 0.0), log_gamma=0.0, slice_profile=(1.0, 1.0),
    resolutions={"axial": {"probability": 1.0, "plane": [4.0, 4.0], "slice": [8.0, 8.0], "axis": 2}}, fine=(2.0, 2.0),
)  # fmt: skip


def still(**changes: Any) -> Ranges:
    return dataclasses.replace(load_description(ABDOMEN).train_ranges, **(STILL | changes))


def ellipsoids(spacing: tuple[float, float, float], shape: tuple[int, int, int]) -> np.ndarray:
    """Label map of the toy on a grid whose first voxel is at 0 mm."""
    place = [s * np.arange(n) for s, n in zip(spacing, shape, strict=True)]
    x, y, z = np.ix_(*place)
    values = np.zeros(shape, np.uint8)
    for label, ((a, b, c), (p, q, r)) in ORGANS.items():
        values[((x - a) / p) ** 2 + ((y - b) / q) ** 2 + ((z - c) / r) ** 2 < 1] = label
    return values


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The abdomen's description at a resolution that is drawn in a moment."""
    path = tmp_path_factory.mktemp("described") / "abdomen.yaml"
    body = WORDS["body"] | {"skin": [6.0, 6.0]}
    path.write_text(yaml.safe_dump(WORDS | {"resample_mm": MM, "grid_mm": [MM, MM, None], "body": body}))
    return path


@pytest.fixture(scope="module")
def anatomy(described: Path, tmp_path_factory: pytest.TempPathFactory) -> Anatomy:
    """The toy as a CT has it: fine in the plane, thick slices, stored from right to left."""
    values = ellipsoids((2.0, 2.0, 5.0), (150, 110, 60))
    affine = np.diag([-2.0, 2.0, 5.0, 1.0])
    affine[:3, 3] = (-150 + 2 * 149, -60, 11)
    path = tmp_path_factory.mktemp("map") / "btcv_0001.nii.gz"
    nib.save(nib.Nifti1Image(values[::-1], affine), path)
    return read_anatomy(path, described)


def body_of(anatomy: Anatomy, seed: int) -> Anatomy:
    return embodied(anatomy, np.random.default_rng(seed))


def in_mm(anatomy: Anatomy, where: np.ndarray) -> np.ndarray:
    """Mean place (3,) of voxels in mm of the patient."""
    return anatomy.affine[:3, :3] @ (anatomy.mm * np.argwhere(where).mean(0)) + anatomy.affine[:3, 3]


# What must not change


def test_the_brain_of_a_seed_is_what_it_was() -> None:
    """Recorded before the engine could draw bodies. Rounding may differ between processors, by a level or a voxel."""
    spec = importlib.util.spec_from_file_location("test_synthesis", Path(__file__).parent / "test_synthesis.py")
    assert spec is not None and spec.loader is not None
    brains = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(brains)
    affine = np.eye(4)
    affine[:3, 3] = (-20, -25, -11)
    description = load_description(brains.BRAIN)
    head = Anatomy(brains.toy_head(), affine, description)
    records = json.loads((Path(__file__).parent / "brain_of_seeds.json").read_text())
    assert len(records) == 4
    for seed, record in enumerate(records):
        volume = synthesize(head, description.train_ranges, (0, 1, seed))
        assert list(volume.image.shape) == record["shape"]
        np.testing.assert_allclose(volume.affine[:3, 3], record["corner"], atol=1e-5)
        assert {key: volume.drawn[key] for key in record["drawn"]} == record["drawn"]
        counts = np.bincount(volume.labels.ravel(), minlength=61)
        expected = np.zeros(61)
        expected[[int(label) for label in record["counts"]]] = list(record["counts"].values())
        np.testing.assert_allclose(counts[1:], expected[1:], atol=3)
        every = max(1, volume.image.size // 60)
        np.testing.assert_allclose(volume.image.ravel()[::every].astype(int), record["image"], atol=2)


# The anatomy


def test_a_map_in_thick_slices_becomes_smooth(anatomy: Anatomy) -> None:
    assert anatomy.mm == MM
    # The same ellipsoids, on the grid that the map was brought to.
    corner = anatomy.affine[:3, 3] - (-150, -60, 11)
    np.testing.assert_allclose(anatomy.affine[:3, :3], np.eye(3), atol=1e-6)
    axes = [c + MM * np.arange(n) for c, n in zip(corner, anatomy.values.shape, strict=True)]
    x, y, z = np.ix_(*axes)
    for label, ((a, b, c), (p, q, r)) in ORGANS.items():
        truth = ((x - a) / p) ** 2 + ((y - b) / q) ** 2 + ((z - c) / r) ** 2 < 1
        found = anatomy.values == label
        assert 2 * (truth & found).sum() / (truth.sum() + found.sum()) > 0.93, label
        assert found.sum() * MM**3 == pytest.approx(4 / 3 * np.pi * p * q * r, rel=0.12), label


def test_thick_slices_leave_no_steps() -> None:
    """A slanted plane in slices of 10 mm: copies of slices would be off by up to 5 mm, distances are nearly exact."""
    i, _, k = np.indices((60, 10, 9))
    slanted = resampled((2.0 * i < 40 + 6.0 * k).astype(np.int16), np.array([2.0, 2.0, 10.0]), 2.0)
    edge = 2.0 * (slanted[:, 3] > 0).sum(0)[5:-5]
    line = 40 + 0.6 * 2.0 * np.arange(slanted.shape[2])[5:-5]
    assert np.abs(edge - line - (edge - line).mean()).max() <= 2.0
    steps = np.diff(edge)
    assert steps.max() <= 2.0 and (steps > 0).mean() > 0.4


# The body


@pytest.mark.parametrize("seed", range(4))
def test_organs_stay_where_they_are_and_keep_their_labels(anatomy: Anatomy, seed: int) -> None:
    body = body_of(anatomy, seed)
    labels = np.vectorize(lambda value: LABEL_OF.get(value, 0))(body.values)
    for label in LABEL_OF.keys() & ORGANS.keys() - {8}:
        assert (labels == label).sum() == (anatomy.values == label).sum(), label
        np.testing.assert_allclose(in_mm(body, labels == label), in_mm(anatomy, anatomy.values == label), atol=1e-3)
    # The great vessel ends with the body; nothing of it moves.
    assert 0 < (labels == 8).sum() <= (anatomy.values == 8).sum()
    np.testing.assert_allclose(in_mm(body, labels == 8)[:2], in_mm(anatomy, anatomy.values == 8)[:2], atol=1.0)


@pytest.mark.parametrize("seed", range(4))
def test_organs_lie_deep_in_one_closed_body(anatomy: Anatomy, seed: int) -> None:
    values = body_of(anatomy, seed).values
    organs = np.isin(values, [v for v, label in LABEL_OF.items() if label])
    for k in range(values.shape[2]):
        inside = values[:, :, k] > 0
        _, pieces = ndimage.label(inside)
        assert pieces == 1 and not (ndimage.binary_fill_holes(inside) & ~inside).any(), k
        assert not (inside[[0, -1]].any() or inside[:, [0, -1]].any()), "air on each side"
        deep = ndimage.distance_transform_edt(inside) * MM
        assert deep[organs[:, :, k]].min(initial=99) > 8, "wall and skin lie before an organ"
    skin = np.isin(values, VALUE["skin"])
    rim = (values > 0) & ndimage.binary_dilation(values == 0, np.ones((3, 3, 1)))
    assert skin[rim].mean() > 0.9, "the outermost layer is skin"


def test_every_draw_has_another_body_with_all_its_parts(anatomy: Anatomy) -> None:
    bodies = [body_of(anatomy, seed).values for seed in range(6)]
    assert len({body.shape for body in bodies}) > 3
    sizes = [(body[:, :, body.shape[2] // 2] > 0).sum() for body in bodies]
    assert max(sizes) > 1.15 * min(sizes)
    wanted = {"skin", "subcutaneous fat", "visceral fat", "muscle", "bone", "marrow", "disc", "fluid", "cord", "lung"}
    wanted |= {"vein", "blood", "bowel wall", "medulla", "liver vessel", "gallbladder wall"}
    for body in bodies:
        assert not (missing := [name for name in wanted if not np.isin(body, VALUE[name]).any()]), missing
    some = {"bowel gas", "bowel fluid", "stool", "stomach gas", "stomach fluid", "stomach food", "cyst", "renal sinus"}
    assert not [name for name in some if not any(np.isin(body, VALUE[name]).any() for body in bodies)]


@pytest.mark.parametrize("seed", range(4))
def test_parts_lie_where_a_person_has_them(anatomy: Anatomy, seed: int) -> None:
    body = body_of(anatomy, seed)

    def middle(name: str) -> np.ndarray:
        return in_mm(body, np.isin(body.values, VALUE[name]))

    aorta, liver = in_mm(body, body.values == 8), in_mm(body, np.isin(body.values, [6, 110]))
    assert middle("disc")[1] < aorta[1], "the spine lies behind the aorta"
    assert middle("cord")[1] < middle("disc")[1], "the canal lies behind the discs"
    assert middle("lung")[2] > liver[2], "lungs lie above the middle of the liver"
    assert middle("heart")[2] > liver[2] if np.isin(body.values, VALUE["heart"]).any() else True
    top = np.flatnonzero(np.isin(body.values, [6, 110]).any((0, 1)))[-1]
    columns = np.isin(body.values, [6, 110]).any(2)
    lungs = np.isin(body.values, VALUE["lung"])
    below = lungs & (np.arange(body.values.shape[2]) < top) & columns[..., None]
    # Above each part of the liver, never under it.
    upper = body.values.shape[2] - 1 - np.argmax(np.isin(body.values, [6, 110])[:, :, ::-1], axis=2)
    assert not (below & (np.arange(body.values.shape[2]) < upper[..., None])).any()
    assert not (lungs & np.isin(body.values, [v for v, label in LABEL_OF.items() if label])).any()


@pytest.mark.parametrize("reach", [60.0, 95.0])
def test_the_back_is_as_thick_as_asked(anatomy: Anatomy, reach: float) -> None:
    """With a thin back in every image, kidneys and great vessel of a real scan were missed."""
    words = anatomy.description.body | {
        "back_reach": [reach, reach],
        "back_width": [34.0, 34.0],
        "back_depth": [23.0, 23.0],
    }
    body = body_of(dataclasses.replace(anatomy, description=dataclasses.replace(anatomy.description, body=words)), 0)
    spine = in_mm(body, np.isin(body.values, VALUE["disc core"]))
    heights = np.isin(body.values, VALUE["disc core"]).any((0, 1))
    muscle = np.argwhere(np.isin(body.values, VALUE["muscle"]) & heights) * body.mm + body.affine[:3, 3]
    beside = np.abs(np.abs(muscle[:, 0] - spine[0]) - 38) < 6
    assert spine[1] - muscle[beside, 1].min() == pytest.approx(reach, abs=1.5 * MM)


@pytest.mark.parametrize("seed", range(3))
def test_a_pelvis_closes_the_body_below(anatomy: Anatomy, seed: int) -> None:
    """Without one, networks find livers in hips. Seen from the great vessel's end, in directions of the patient."""
    words = anatomy.description.body | {"below": [220.0, 220.0]}
    body = body_of(dataclasses.replace(anatomy, description=dataclasses.replace(anatomy.description, body=words)), seed)
    mm, values = body.mm, body.values
    end = np.flatnonzero((values == 8).any((0, 1)))[0]
    below = np.arange(values.shape[2]) < end - 25 / mm
    aorta = in_mm(body, values == 8)
    bone = np.isin(values, [*VALUE["bone"], *VALUE["marrow"]])

    def places(where: np.ndarray) -> np.ndarray:
        return np.argwhere(where & below) * mm + body.affine[:3, 3]

    assert not np.isin(values[:, :, : int(end - 75 / mm)], [*VALUE["disc"], *VALUE["cord"]]).any(), "the spine ends"
    # Two thigh bones at the lowest slice, on either side and as far from the middle.
    pieces, count = ndimage.label(bone[:, :, 2])
    legs = [np.argwhere(pieces == n + 1)[:, 0].mean() * mm + body.affine[0, 3] for n in range(count)]
    assert count in (2, 4, 6) and max(legs) - aorta[0] > 70 and aorta[0] - min(legs) > 60
    # Sockets in their cartilage, between the height of the wings and that of the thigh bones.
    joints = places(np.isin(values, VALUE["cartilage"]))
    sides = [joints[joints[:, 0] > aorta[0] + 30], joints[joints[:, 0] < aorta[0] - 30]]
    assert all(len(side) * mm**3 > 2000 for side in sides)
    assert abs(sides[0][:, 2].mean() - sides[1][:, 2].mean()) < 2 * mm
    urine = places(np.isin(values, VALUE["urine"])).mean(0)
    behind = places(bone & (np.abs(np.arange(values.shape[0]) * mm + body.affine[0, 3] - urine[0]) < 15)[:, None, None])
    sacrum = behind[(behind[:, 2] > urine[2]) & (behind[:, 2] < urine[2] + 25)]  # the pubis is lower
    assert abs(urine[0] - 0.5 * (sides[0][:, 0].mean() + sides[1][:, 0].mean())) < 12
    assert sacrum[:, 1].mean() < urine[1] - 30, "the sacrum lies behind the bladder"
    skin = np.isin(values, VALUE["skin"])
    rim = (values > 0) & ndimage.binary_dilation(values == 0, np.ones((3, 3, 1)))
    assert skin[rim].mean() > 0.9, "no bone reaches the air"
    # More muscle than above, as in a body's.
    muscle = np.isin(values, VALUE["muscle"]).sum((0, 1)) * mm**2
    assert muscle[: end - int(100 / mm)].mean() > 1.5 * muscle[end:].mean()


def test_gas_lies_in_front_of_fluid(anatomy: Anatomy) -> None:
    """People lie on their backs: in one bubble of the stomach, the lowest gas is in front of the highest fluid."""
    seen = 0
    for seed in range(8):
        values = body_of(anatomy, seed).values
        gas, fluid = (np.argwhere(np.isin(values, VALUE[f"stomach {name}"])) for name in ("gas", "fluid"))
        if len(gas) and len(fluid):
            seen += 1
            assert gas[:, 1].min() > fluid[:, 1].max()
    assert seen >= 3


# The image


def contrast_of(volume: SynthVolume, label: int) -> float:
    inner = ndimage.binary_erosion(volume.labels == label, np.ones((3, 3, 1)))
    return float(np.median(volume.image[inner]))


def test_fat_cancels_water_out_of_phase(anatomy: Anatomy) -> None:
    """Voxels with both are dark, a line around the organs; in phase they lie between the two."""
    dark = {}
    for contrast in ("t1", "out"):
        body = synthesize(anatomy, still(contrasts={contrast: 1.0}), (3,))
        spleen = body.labels == 1
        ring = ndimage.binary_dilation(spleen, np.ones((3, 3, 1))) ^ ndimage.binary_erosion(spleen, np.ones((3, 3, 1)))
        dark[contrast] = float(np.quantile(body.image[ring], 0.15)) / contrast_of(body, 1)
        # Alone, fat is bright in both.
        assert np.quantile(body.image[(body.labels == 0) & (body.image > 10)], 0.9) > 1.15 * contrast_of(body, 1)
    assert dark["out"] < 0.6 < dark["t1"], dark


def test_a_scan_keeps_its_slices_and_gets_the_grid_in_the_plane(anatomy: Anatomy) -> None:
    finer = {"axial": {"probability": 1.0, "plane": [3.0, 3.0], "slice": [8.0, 8.0], "axis": 2}}
    volume = synthesize(anatomy, still(contrasts={"t2": 1.0}, resolutions=finer), (5,))
    np.testing.assert_allclose(np.diag(volume.affine)[:3], [MM, MM, 8.0])
    for label in (1, 2, 3, 6):
        where = np.argwhere(volume.labels == label).mean(0)
        found = volume.affine[:3, :3] @ where + volume.affine[:3, 3]
        expected = np.add(ORGANS[label][0], (-150, -60, 11))
        np.testing.assert_allclose(found, expected, atol=3.0)
    assert contrast_of(volume, 4) > 1.3 * contrast_of(volume, 6), "bile is brighter than liver in T2"


def test_a_body_goes_on_beyond_its_ends(anatomy: Anatomy) -> None:
    """No black slices where the field of view reaches beyond what was drawn."""
    volume = synthesize(anatomy, still(margin=(30.0, 30.0), contrasts={"t1": 1.0}), (6,))
    assert (volume.image > 20).mean((0, 1)).min() > 0.15
    assert (volume.image[[0, -1]] < 10).mean() > 0.9


def test_ct_is_no_mr(anatomy: Anatomy) -> None:
    description = load_description(ABDOMEN)
    ranges = description.contrast_ranges(description.train_ranges, "ct")
    assert ranges.log_gamma == 0 and ranges.bias_log == (0, 0) and ranges.window is not None
    assert description.contrast_ranges(description.train_ranges, "t2") == description.train_ranges
    means = draw_means(description, "ct", ranges, np.random.default_rng(0))
    in_hu = {name: 1500 * mean - 1000 for name, mean in means.items()}
    assert in_hu["visceral fat"] == pytest.approx(-105, abs=30) and in_hu["liver"] == pytest.approx(50, abs=40)
    assert in_hu["bowel gas"] < -900 and in_hu["bone"] > 300 and in_hu["lung"] < -650
    # A window clips both ends.
    window = {"window": [[0.55, 0.55], [0.8, 0.8]], "window_probability": 1.0, "noise": [0.0, 0.0]}
    told = dataclasses.replace(anatomy.description, by_contrast={"ct": window})
    volume = synthesize(dataclasses.replace(anatomy, description=told), still(contrasts={"ct": 1.0}), (7,))
    bone = volume.image == volume.image.max()
    assert bone.sum() > 50 and (volume.image == 0).mean() > 0.2
    liver = (contrast_of(volume, 6) / 255 * 0.25 + 0.55) * 1500 - 1000
    assert liver == pytest.approx(50, abs=45)
    # Most of what has no label is fat, nearly black in this window, and a little darker than the liver without it.
    fat = np.quantile(volume.image[(volume.labels == 0) & (volume.image > 0)], 0.3)
    assert fat < 0.5 * contrast_of(volume, 6)


def test_gas_is_dark_in_random_contrasts() -> None:
    description = load_description(ABDOMEN)
    gas, fat = [], []
    for seed in range(60):
        means = draw_means(description, "random", description.train_ranges, np.random.default_rng(seed))
        gas.append(means["bowel gas"])
        fat.append(means["visceral fat"])
    assert max(gas) < 0.2 and max(fat) > 0.8 and min(fat) < 0.2


# The description and the command


def test_labels_are_those_of_amos() -> None:
    amos = yaml.safe_load((DATA_SETS / "amos.yaml").read_text())["labels"]
    assert load_description(ABDOMEN).label_names == {label: one["name"] for label, one in amos.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"by_contrast": {"t9": {}}}, "by_contrast has 't9', which no tissue has"),
        ({"by_contrast": {"ct": {"nois": 1}}}, "nois"),
        ({"body": {"above": [1, 2]}}, r"ranges of the body lack .*'below'"),
        ({"body": WORDS["body"] | {"tail": [1, 2]}}, r"unknown \['tail'\]"),
    ],
)
def test_a_wrong_description_is_told(change: dict, message: str, anatomy: Anatomy, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(WORDS | change))
    with pytest.raises(ValueError, match=message):
        embodied(dataclasses.replace(anatomy, description=load_description(path)), np.random.default_rng(0))


def test_prepare_has_the_splits_of_the_description(described: Path, tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.mkdir()
    for number in (1, 35, 38):
        values = np.roll(ellipsoids((6.0, 6.0, 6.0), (50, 38, 50)), number % 3, axis=0)
        nib.save(nib.Nifti1Image(values, np.diag([6.0, 6.0, 6.0, 1.0])), maps / f"btcv_{number:04d}.nii.gz")
    common = ["synth-abdomen", "--labels", str(maps), "--out", str(tmp_path / "out"), "--description", str(described)]
    result = CliRunner().invoke(prepare.app, common)
    assert result.exit_code != 0 and "btcv_0002.nii.gz" in result.output and "btcv_0021.nii.gz" in result.output
    assert "btcv_0011.nii.gz" not in result.output, "the default is the description's, not the heads'"
    splits = ["--variants", "2", "--train", "1", "--validation", "35", "--test", "38", "--qc-every", "0"]
    result = CliRunner().invoke(prepare.app, common + splits)
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["spacing"] == [MM, MM, None] and "CC BY 4.0 as third parties state it" in manifest["licence"]
    tests = {row["set"] for row in manifest["cases"] if row["split"] == "test"}
    assert tests == {"t1", "out-of-phase", "t2", "t2-fat-suppressed", "portal", "random", "ct"}
    for row in manifest["cases"]:
        label = nib.load(tmp_path / "out" / row["label"])
        assert set(np.unique(label.dataobj)) <= {0, *ORGANS}
        np.testing.assert_allclose(row["spacing"][:2], [MM, MM])
        if row["split"] == "train":
            assert 2.9 < row["spacing"][2] < 8.1
    assert torch.get_num_threads() >= 1
