"""scripts/prepare_data.py and its generator, on toy heads; the oracles are written here, not taken from the scripts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from typer.testing import CliRunner

from hf_binaryformer.commands import prepare
from hf_binaryformer.data import folder_writer, synth_brain, synth_dataset
from hf_binaryformer.data.folder_writer import write_qc
from hf_binaryformer.data.synth_brain import SynthSettings, read_anatomy, synthesize
from hf_binaryformer.pipelines.overlay import label_overlay

# The label table of the brain checkpoint, written out a second time.
EXPECTED_CLASSES = {
    2: 1, 41: 1, 3: 2, 42: 2, 4: 3, 5: 3, 43: 3, 44: 3, 7: 4, 46: 4, 8: 5, 47: 5, 10: 6, 49: 6, 11: 7, 50: 7, 12: 8,
    51: 8, 13: 9, 52: 9, 14: 10, 15: 10, 16: 11, 17: 12, 53: 12, 18: 13, 54: 13, 28: 14, 60: 14, 26: 15, 58: 15, 24: 16,
    25: 0, 57: 0, 30: 0, 72: 0, 85: 0, 136: 0, 163: 0, 507: 0, 515: 0,
}  # fmt: skip
STILL = SynthSettings(
    rotation_degrees=0, scale_range=0, shear_range=0, elastic_std=(0, 0), flip_probability=0, neck_crop_probability=0
)
CLEAN = dataclasses.replace(
    STILL, label_std=(0, 0), texture_amplitude=(0, 0), blur_sigma=(0.01, 0.01), strong_blur_probability=0,
    thick_slice_probability=0, bias_log_amplitude=(0, 0), noise_std=(0, 0), log_gamma=0,
)  # fmt: skip


def toy_head(shape: tuple[int, int, int] = (44, 48, 40)) -> np.ndarray:
    """Nested ellipsoids: skin 515, skull 507, CSF 24, cortex 3 | 42, white matter 2 | 41, ventricle 4 | 43; and every
    other value of the table as a 2x2x2 cube in the white matter. Left values at low I."""
    radius = np.sqrt(
        sum(((axis - (n - 1) / 2) / (n / 2 - 3)) ** 2 for axis, n in zip(np.indices(shape), shape, strict=False))
    )
    left = np.indices(shape)[0] < shape[0] / 2
    values = np.zeros(shape, np.int16)
    for limit, left_value, right_value in (
        (1.0, 515, 515), (0.92, 507, 507), (0.84, 24, 24), (0.75, 3, 42), (0.62, 2, 41), (0.15, 4, 43),
    ):  # fmt: skip
        values[(radius < limit) & left] = left_value
        values[(radius < limit) & ~left] = right_value
    corners = np.argwhere((radius > 0.25) & (radius < 0.5) & (np.indices(shape) % 4 == 0).all(axis=0))
    for value, (i, j, k) in zip(sorted(set(EXPECTED_CLASSES) - set(np.unique(values))), corners, strict=False):
        values[i : i + 2, j : j + 2, k : k + 2] = value
    assert set(EXPECTED_CLASSES) <= set(np.unique(values))
    return values


def save_lia(values_ras: np.ndarray, path: Path, origin: tuple[float, float, float] = (-20, -25, -11)) -> None:
    """Store a RAS array with the axes of the real label maps: left, inferior, anterior."""
    affine = np.eye(4)
    affine[:3, 3] = origin
    image = nib.Nifti1Image(values_ras, affine)
    to_lia = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt("LIA"))
    nib.save(image.as_reoriented(to_lia), path)


@pytest.fixture(scope="module")
def label_maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("maps")
    for number in (1, 2, 3, 4):
        save_lia(toy_head((44, 48, 38 + number)), folder / f"training_seg_{number:02d}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def anatomy(label_maps: Path) -> synth_brain.Anatomy:
    return read_anatomy(label_maps / "training_seg_02.nii.gz")


def make(anatomy: synth_brain.Anatomy, variant: int = 0, settings: SynthSettings = SynthSettings(), **changes):
    keywords = {"contrast": "t1", "skull": True, "mild": False} | changes
    return synthesize(anatomy, (0, 1, variant), settings=settings, **keywords)


def test_every_value_gets_its_class_at_its_place(anatomy: synth_brain.Anatomy) -> None:
    volume = make(anatomy, settings=STILL)
    values = toy_head((44, 48, 40))
    expected = np.vectorize(EXPECTED_CLASSES.get)(values, 0)
    # The same point in mm must carry the same label, whatever the crop.
    voxels = np.argwhere(expected > 0)
    in_mm = voxels + np.array([-20, -25, -11])
    found = np.rint(nib.affines.apply_affine(np.linalg.inv(volume.affine), in_mm)).astype(int)
    np.testing.assert_array_equal(volume.labels[tuple(found.T)], expected[tuple(voxels.T)])
    assert (volume.labels > 0).sum() == len(voxels)
    assert volume.image.dtype == volume.labels.dtype == np.uint8
    assert set(synth_brain.LABEL_NAMES) == set(range(17))


def test_t1_contrast_orders_tissues_and_sides_agree(anatomy: synth_brain.Anatomy) -> None:
    settings = dataclasses.replace(CLEAN, mean_jitter=0.0, extracerebral_mean=(0.5, 0.5))
    for variant in range(3):
        volume = make(anatomy, variant, settings)
        tissue = [{int(v) for v in np.unique(volume.image[volume.labels == index])} for index in range(1, 17)]
        assert all(len(levels) == 1 for levels in tissue), "left and right of a class must have one mean"
        white, cortex, ventricle, *_, fluid = (levels.pop() for levels in tissue)
        assert white > cortex > max(ventricle, fluid) > 0
        assert volume.image[0, 0, 0] == 0


def test_random_contrast_is_not_t1(anatomy: synth_brain.Anatomy) -> None:
    volumes = [make(anatomy, variant, CLEAN, contrast="random") for variant in range(12)]
    darker = [v.image[v.labels == 1].mean() < v.image[v.labels == 16].mean() for v in volumes]
    assert any(darker) and not all(darker)


def test_mixed_draws_about_the_stated_fraction(anatomy: synth_brain.Anatomy) -> None:
    settings = dataclasses.replace(CLEAN, random_contrast_fraction=0.5)
    drawn = [make(anatomy, variant, settings, contrast="mixed").drawn["contrast"] for variant in range(20)]
    assert 4 <= drawn.count("random") <= 16 and set(drawn) == {"random", "t1"}


def test_a_volume_depends_on_its_seed_alone(anatomy: synth_brain.Anatomy) -> None:
    first = make(anatomy, 3)
    make(anatomy, 4, skull=False)
    torch.manual_seed(7)
    again, other = make(anatomy, 3), make(anatomy, 4)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert first.image.shape != other.image.shape or (first.image != other.image).any()


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_stripping_removes_the_skull_and_its_labels(anatomy: synth_brain.Anatomy, kind: int) -> None:
    chosen = tuple(float(index == kind) for index in range(3))
    settings = dataclasses.replace(STILL, strip_kinds=chosen, strip_margin=(1.0, 1.0), noise_std=(0.05, 0.05))
    volume = make(anatomy, settings=settings, skull=False)
    # The toy's brain tissue fills 0.75 of the head's radius, CSF 0.84; half a head of 19 voxels: 1.7 voxels of CSF.
    tissue = (volume.labels > 0) & (volume.labels != 16)
    distance = ndimage.distance_transform_edt(~ndimage.binary_closing(tissue, iterations=2))
    assert volume.image[distance > 7].max(initial=0) == 0, "noise or skull outside of the mask"
    assert not volume.labels[volume.image == 0].astype(bool).mean() > 0.02
    assert tissue.sum() > 0.9 * (make(anatomy, settings=STILL).labels % 16 > 0).sum()
    has_csf = (volume.labels == 16).sum()
    assert has_csf < 300 if kind == 2 else has_csf > 500, has_csf


def test_deformation_moves_labels_and_mild_moves_them_less(anatomy: synth_brain.Anatomy) -> None:
    values = anatomy.values
    settings = dataclasses.replace(SynthSettings(), flip_probability=0)
    overlaps = {}
    for strength in (0.0, 0.3, 1.0):
        moved = [synth_brain.deform(values, settings, np.random.default_rng(seed), strength) for seed in range(4)]
        assert all(set(np.unique(m)) <= set(np.unique(values)) for m in moved), "nearest neighbour makes no new label"
        overlaps[strength] = np.mean([(m == values)[values > 0].mean() for m in moved])
    assert overlaps[0.0] == 1.0
    assert 1.0 > overlaps[0.3] > overlaps[1.0] + 0.05 > 0.4


def test_gaussian_equals_scipy() -> None:
    volume = np.random.default_rng(0).standard_normal((11, 12, 13)).astype(np.float32)
    expected = ndimage.gaussian_filter(volume, (1.5, 0, 0.7), mode="constant", radius=(5, 0, 3))
    found = synth_brain.gaussian(torch.from_numpy(volume), (1.5, 0.0, 0.7)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_read_anatomy_names_what_is_wrong(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.ones((8, 8, 8), np.int16), np.diag([2, 1, 1, 1])), tmp_path / "coarse.nii.gz")
    with pytest.raises(ValueError, match=r"expected voxels of 1 mm, found \[2"):
        read_anatomy(tmp_path / "coarse.nii.gz")
    nib.save(nib.Nifti1Image(np.full((8, 8, 8), 515, np.int16), np.eye(4)), tmp_path / "skin.nii.gz")
    with pytest.raises(ValueError, match="no brain label"):
        read_anatomy(tmp_path / "skin.nii.gz")
    nib.save(nib.Nifti1Image(np.full((8, 8, 8), np.nan, np.float32), np.eye(4)), tmp_path / "nan.nii.gz")
    with pytest.raises(ValueError, match="512 NaN or infinite voxels"):
        read_anatomy(tmp_path / "nan.nii.gz")


def test_read_anatomy_rounds_nearly_whole_labels(tmp_path: Path) -> None:
    values = np.full((8, 8, 8), 2.9999, np.float32)
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "near.nii.gz")
    with pytest.warns(UserWarning, match=r"near\.nii\.gz has labels up to 0.0001 off"):
        assert set(np.unique(read_anatomy(tmp_path / "near.nii.gz").values)) == {0, 3}


def check_folder(out: Path) -> dict:
    """What every prepared folder promises; returns its manifest."""
    manifest = json.loads((out / "manifest.json").read_text())
    groups: dict[str, set[str]] = {}
    for row in manifest["cases"]:
        groups.setdefault(row["group"], set()).add(row["split"])
        image, label = nib.load(out / row["image"]), nib.load(out / row["label"])
        assert list(image.shape) == list(label.shape) == row["shape"]
        np.testing.assert_array_equal(image.affine, label.affine)
        assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
        assert label.get_data_dtype() == np.uint8
        assert {str(value) for value in np.unique(label.dataobj)} <= set(manifest["label_names"])
        for kind in ("image", "label"):
            assert hashlib.sha256((out / row[kind]).read_bytes()).hexdigest() == row[f"{kind}_sha256"]
    assert all(len(splits) == 1 for splits in groups.values()), "a group in two splits leaks"
    assert manifest["licence"] and manifest["command"].startswith("python ")
    return manifest


def invoke(*arguments: object):
    return CliRunner().invoke(prepare.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def brain_arguments(label_maps: Path) -> list[object]:
    return ["synth-brain", "--labels", label_maps, "--train", "1-2", "--validation", "3", "--test", "4"]


@pytest.mark.parametrize("workers", [1, 2])
def test_synth_brain_command(brain_arguments: list[object], tmp_path: Path, workers: int) -> None:
    options = ["--variants", 3, "--eval-variants", 2, "--qc-every", 4, "--workers", workers, "--contrast", "mixed"]
    result = invoke(*brain_arguments, "--out", tmp_path / "new", *options)
    assert result.exit_code == 0, result.output
    manifest = check_folder(tmp_path / "new")
    rows = manifest["cases"]
    assert [row["split"] for row in rows] == ["train"] * 6 + ["validation"] * 2 + ["test"] * 2
    assert [row["group"] for row in rows][5:7] == ["anatomy_02", "anatomy_03"]
    assert {row["contrast"] for row in rows if row["split"] != "train"} == {"t1"}
    assert [row["skull"] for row in rows[:3]] == [True, False, True]
    assert manifest["settings"]["rotation_degrees"] == SynthSettings().rotation_degrees
    assert len(list((tmp_path / "new" / "qc").glob("*.png"))) == 3

    again = invoke(*brain_arguments, "--out", tmp_path / "new", *options)
    assert again.exit_code == 2 and "not empty" in again.output


def test_settings_of_the_generator_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ranges.yaml"
    path.write_text("noise_std: [0.0, 0.001]\nlog_gamma: 0.5\n")
    changed, usual = synth_dataset.read_settings(path), synth_dataset.read_settings(None)
    assert (
        changed == dataclasses.replace(SynthSettings(), noise_std=(0.0, 0.001), log_gamma=0.5)
        and usual == SynthSettings()
    )
    path.write_text("noise: 1\n")
    with pytest.raises(ValueError, match="has noise"):
        synth_dataset.read_settings(path)
    for shipped in sorted(synth_dataset.SETTINGS.glob("*.yaml")):
        assert synth_dataset.read_settings(shipped) != SynthSettings()


def test_synth_brain_rejects_leaks_and_missing_maps(brain_arguments: list[object], tmp_path: Path) -> None:
    result = invoke(*brain_arguments, "--out", tmp_path, "--test", "2,4")
    assert result.exit_code == 2 and "[2] are in two splits" in result.output
    result = invoke(*brain_arguments, "--out", tmp_path, "--test", "4-6")
    assert result.exit_code == 2 and "training_seg_05.nii.gz, training_seg_06.nii.gz" in " ".join(result.output.split())
    assert invoke(*brain_arguments, "--out", tmp_path, "--test", "4;5").exit_code == 2
    assert not list(tmp_path.iterdir())


@pytest.fixture
def decathlon(tmp_path: Path) -> Path:
    """Twelve tiny cases with IDs 1-13 without 5, stored LPS, int16."""
    rng = np.random.default_rng(0)
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / "raw" / folder).mkdir(parents=True)
    for number in (*range(1, 5), *range(6, 14)):
        affine = np.diag([-1.0, -1.0, 1.5, 1.0])
        name = f"hippocampus_{number:03d}.nii.gz"
        image = rng.integers(0, 900, (6, 7, 8)).astype(np.int16)
        nib.save(nib.Nifti1Image(image, affine), tmp_path / "raw" / "imagesTr" / name)
        label = rng.integers(0, 3, (6, 7, 8)).astype(np.uint8)
        nib.save(nib.Nifti1Image(label, affine), tmp_path / "raw" / "labelsTr" / name)
    (tmp_path / "raw" / "imagesTr" / "._hippocampus_001.nii.gz").write_bytes(b"left by a Mac")
    return tmp_path / "raw"


def test_hippocampus_command(decathlon: Path, tmp_path: Path) -> None:
    result = invoke("hippocampus", "--source", decathlon, "--out", tmp_path / "new", "--qc-every", 6)
    assert result.exit_code == 0, result.output
    manifest = check_folder(tmp_path / "new")
    assert manifest["label_names"] == {"0": "background", "1": "anterior", "2": "posterior"}
    assert manifest["spacing"] == [1.0, 1.0, 1.5]
    groups = {row["case"]: row["group"] for row in manifest["cases"]}
    assert groups["hippocampus_001"] == groups["hippocampus_002"] != groups["hippocampus_003"]
    assert len(groups) == 12 and len(set(groups.values())) == 7
    row = manifest["cases"][4]
    assert row["case"] == "hippocampus_006"
    for kind, folder in (("image", "imagesTr"), ("label", "labelsTr")):
        source = np.asanyarray(nib.load(decathlon / folder / "hippocampus_006.nii.gz").dataobj)
        copy = nib.load(tmp_path / "new" / row[kind])
        np.testing.assert_array_equal(np.asanyarray(copy.dataobj), source[::-1, ::-1])
        assert copy.get_data_dtype() == source.dtype


@pytest.mark.parametrize(
    ("described", "licence"),
    [
        ({"licence": "CC0", "labels": {"0": "background", "1": "Anterior", "2": "Posterior"}}, "CC0"),
        ({"labels": {"background": 0, "anterior": 1, "posterior": 2}}, "not stated"),
        ({"labels": {"1": "anterior", "2": "posterior"}}, "not stated"),
    ],
)
def test_dataset_json_names_the_labels(described: dict, licence: str, decathlon: Path, tmp_path: Path) -> None:
    (decathlon / "dataset.json").write_text(json.dumps({"name": "toy", **described}))
    result = invoke("hippocampus", "--source", decathlon, "--out", tmp_path / "new", "--group-rule", "none")
    assert result.exit_code == 0, result.output
    manifest = check_folder(tmp_path / "new")
    assert (manifest["name"], manifest["licence"]) == ("toy", licence)
    assert manifest["label_names"] == {"0": "background", "1": "anterior", "2": "posterior"}
    assert len({row["group"] for row in manifest["cases"]}) == 12


def test_a_dataset_json_with_other_labels_is_refused(decathlon: Path, tmp_path: Path) -> None:
    (decathlon / "dataset.json").write_text(json.dumps({"labels": {"whole": [1, 2]}}))
    result = invoke("hippocampus", "--source", decathlon, "--out", tmp_path / "new")
    assert result.exit_code == 2 and 'expected {"1": "anterior"} or {"anterior": 1}' in " ".join(result.output.split())


@pytest.mark.parametrize("value", [3, 300])
def test_label_values_that_no_network_has_are_refused(decathlon: Path, tmp_path: Path, value: int) -> None:
    (decathlon / "dataset.json").write_text(json.dumps({"labels": {"anterior": 1, "posterior": value}}))
    result = invoke("hippocampus", "--source", decathlon, "--out", tmp_path / "new")
    words = " ".join(result.output.split())
    assert result.exit_code == 2 and f"label values [0, 1, {value}], expected 0, 1, 2 and so on" in words


def test_all_problems_are_reported_at_once(decathlon: Path, tmp_path: Path) -> None:
    affine = np.diag([-1.0, -1.0, 1.5, 1.0])
    images, labels = decathlon / "imagesTr", decathlon / "labelsTr"
    (labels / "hippocampus_001.nii.gz").unlink()
    nib.save(nib.Nifti1Image(np.zeros((6, 7, 9), np.uint8), affine), labels / "hippocampus_002.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros((6, 7, 8), np.uint8), np.eye(4)), labels / "hippocampus_003.nii.gz")
    holed = np.ones((6, 7, 8), np.float32)
    holed[0, 0, :2] = np.nan, np.inf
    nib.save(nib.Nifti1Image(holed, affine), images / "hippocampus_004.nii.gz")
    nib.save(nib.Nifti1Image(np.full((6, 7, 8), 9, np.uint8), affine), labels / "hippocampus_006.nii.gz")
    (images / "hippocampus_007.nii.gz").write_bytes((images / "hippocampus_007.nii.gz").read_bytes()[:300])
    (images / "hippocampus_008.nii.gz").unlink()
    result = invoke("hippocampus", "--source", decathlon, "--out", tmp_path / "new")
    assert result.exit_code == 2 and not (tmp_path / "new").exists()
    for expected in (
        "7 problems", "no labelsTr/hippocampus_001", "002.nii.gz: image shape (6, 7, 8), label shape (6, 7, 9)",
        "003.nii.gz: image and label have different affines", "004.nii.gz: 2 voxels are NaN",
        "006.nii.gz: unexpected label values [9]", "007.nii.gz: unreadable", "no imagesTr/hippocampus_008",
    ):  # fmt: skip
        assert expected in result.output


def test_not_a_decathlon_folder(tmp_path: Path) -> None:
    result = invoke("hippocampus", "--source", tmp_path, "--out", tmp_path / "new")
    assert result.exit_code == 2 and "imagesTr" in result.output


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_split_sizes(seed: int) -> None:
    groups = [f"g{index // 2}" for index in range(260)]
    splits = folder_writer.split_groups(groups, 0.24, 0.1, seed)
    sizes = {name: sum(splits[group] == name for group in groups) for name in ("train", "validation", "test")}
    assert sizes == {"test": 62, "validation": 20, "train": 178}
    assert splits != folder_writer.split_groups(groups, 0.24, 0.1, seed + 1)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_quality_picture_has_the_case_its_labels_and_true_proportions(tmp_path: Path, labelled: bool) -> None:
    image, labels = np.zeros((10, 12, 14), np.float32), np.zeros((10, 12, 14), np.uint8)
    image[2:8, 3:9, 4:10] = 100
    labels[2:8, 3:9, 4:7] = labelled
    row = {"case": "one", "image": "image.nii.gz"} | ({"label": "label.nii.gz"} if labelled else {})
    for name, array in (("image", image), ("label", labels)):
        nib.save(nib.Nifti1Image(array, np.diag([1.0, 1.0, 4.0, 1.0])), tmp_path / f"{name}.nii.gz")
    (tmp_path / "qc").mkdir()
    write_qc(tmp_path, row, {0: "background", 1: "half"})
    shown = np.asarray(Image.open(tmp_path / "qc" / "one.png"))
    expected = label_overlay(image, labels, (1.0, 1.0, 4.0), {1: "half"}, title="one", max_width=900)
    np.testing.assert_array_equal(shown, np.asarray(expected))
    assert (np.ptp(shown.astype(int), axis=-1).max() > 40) == labelled
