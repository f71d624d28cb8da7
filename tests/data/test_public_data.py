"""Public layouts of AMOS, CrossMoDA, OASIS and SPIDER to prepared folders; the oracles are nibabel, SimpleITK and numpy."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import yaml
from typer.testing import CliRunner

from hf_binaryformer.commands import prepare
from hf_binaryformer.data.integrity import pair_problems
from hf_binaryformer.data.leakage import check_leakage
from hf_binaryformer.data.public_data import DATA_SETS, find_files, load_data_set


def invoke(*arguments: object):
    return CliRunner().invoke(prepare.app, [str(argument) for argument in arguments])


def flat(text: str) -> str:
    return " ".join(text.split())


def save(array: np.ndarray, affine: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def check_manifest(out: Path) -> dict:
    """What every prepared folder promises; returns its manifest."""
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["licence"] and manifest["url"].startswith("https://")
    groups: dict[str, set[str]] = {}
    for row in manifest["cases"]:
        groups.setdefault(row["group"], set()).add(row["split"])
        for kind in ("image", "label"):
            if kind in row:
                assert hashlib.sha256((out / row[kind]).read_bytes()).hexdigest() == row[f"{kind}_sha256"]
                assert nib.aff2axcodes(nib.load(out / row[kind]).affine) == ("R", "A", "S")
    assert all(len(splits) == 1 for splits in groups.values()), "a patient in two splits leaks"
    return manifest


def same_points(values: np.ndarray, in_mm: np.ndarray, stored: nib.Nifti1Image) -> np.ndarray:
    """Which points (n, 3) in mm lie in the stored volume; asserts that it has ``values`` (n,) there."""
    found = np.rint(nib.affines.apply_affine(np.linalg.inv(stored.affine), in_mm)).astype(int)
    inside = ((found >= 0) & (found < stored.shape)).all(axis=1)
    np.testing.assert_array_equal(np.asanyarray(stored.dataobj)[tuple(found[inside].T)], values[inside])
    return inside


AMOS_IDS = (("Tr", 507), ("Tr", 510), ("Tr", 521), ("Tr", 522), ("Tr", 540), ("Tr", 555), ("Va", 583), ("Va", 600))
AMOS_AFFINE = np.array([[-1.5, 0, 0, 30], [0, -1.5, 0, -7], [0, 0, 5, 2], [0, 0, 0, 1.0]])


@pytest.fixture
def amos(tmp_path: Path) -> Path:
    """Eight MR scans, two CT scans, one of them with a label that is none, and a test scan without labels; stored LPS."""
    rng = np.random.default_rng(0)
    raw = tmp_path / "amos22"
    for part, number in (("Tr", 1), ("Tr", 500), *AMOS_IDS):
        shape = (330, 12, 3) if number == 555 else (24, 18, 4)
        name = f"amos_{number:04d}.nii.gz"
        save(rng.integers(1, 900, shape).astype(np.int16), AMOS_AFFINE, raw / f"images{part}" / name)
        values = rng.integers(0, 16, shape) if number != 1 else np.full(shape, 77)
        save(values.astype(np.uint8), AMOS_AFFINE, raw / f"labels{part}" / name)
    save(np.ones((3, 3, 3), np.int16), AMOS_AFFINE, raw / "imagesTs" / "amos_0580.nii.gz")
    (raw / "dataset.json").write_text("{}")
    return raw


def test_amos_and_its_stream(amos: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    out = tmp_path / "new"
    result = invoke("amos", "--source", amos, "--out", out, "--qc-every", 4)
    assert result.exit_code == 0, result.output
    manifest = check_manifest(out)
    rows = {row["case"]: row for row in manifest["cases"]}
    assert sorted(rows) == [f"amos_{number:04d}" for _, number in AMOS_IDS], "MR scans, and no others"
    assert {row["split"] for row in rows.values()} == {"train", "validation", "test"}
    assert len(manifest["label_names"]) == 16 and manifest["label_names"]["6"] == "liver"
    assert len(list((out / "qc").glob("*.png"))) == 2
    for part, number in AMOS_IDS:
        row = rows[f"amos_{number:04d}"]
        source, labels = (
            nib.load(amos / f"{kind}{part}" / f"amos_{number:04d}.nii.gz") for kind in ("images", "labels")
        )
        image, label = nib.load(out / row["image"]), nib.load(out / row["label"])
        assert image.shape == label.shape == (320, 320, source.shape[2]) == tuple(row["shape"])
        np.testing.assert_array_equal(image.affine, label.affine)
        assert label.get_data_dtype() == np.uint8
        in_mm = nib.affines.apply_affine(AMOS_AFFINE, np.argwhere(np.ones(source.shape)))
        # Intensities are the source's: scaling is left to loading.
        kept = same_points(np.asanyarray(source.dataobj).ravel(), in_mm, image)
        values = np.asanyarray(labels.dataobj).ravel()
        same_points(values, in_mm, label)
        assert kept.mean() == pytest.approx(320 / 330 if number == 555 else 1)
        assert row["labels_lost"] == pytest.approx((values[~kept] > 0).sum() / (values > 0).sum(), abs=1e-4)
        assert np.count_nonzero(label.dataobj) == (values[kept] > 0).sum(), "padding has label 0"
        assert row["source_image"] == f"images{part}/amos_{number:04d}.nii.gz"
    assert "1 of 8 volumes lose labels" in flat(result.output) and "most amos_0555" in flat(result.output)

    # The shards stand alone.
    expected = {name: [nib.load(out / row[k]) for k in ("image", "label")] for name, row in rows.items()}
    arrays = {name: [(np.asanyarray(i.dataobj).copy(), i.affine) for i in pair] for name, pair in expected.items()}
    shutil.move(out / "shards", tmp_path / "shards")
    shutil.rmtree(out)
    streams = load_dataset(str(tmp_path / "shards"), streaming=True, cache_dir=str(tmp_path / "cache"))
    seen = {split: {sample["case"]: sample for sample in stream} for split, stream in streams.items()}
    assert {name: split for split, samples in seen.items() for name in samples} == {
        n: r["split"] for n, r in rows.items()
    }
    for samples in seen.values():
        for name, sample in samples.items():
            assert sample["group"] == rows[name]["group"]
            for kind, (array, affine) in zip(("image", "label"), arrays[name], strict=True):
                np.testing.assert_array_equal(np.asanyarray(sample[kind].dataobj), array)
                np.testing.assert_array_equal(sample[kind].affine, affine)
    assert "license: cc-by-4.0" in (tmp_path / "shards" / "README.md").read_text()


# Sagittal slices last: i to the back, j down, k to the left, in ITK's LPS space.
SPIDER_DIRECTION = (0, 0, 1, 1, 0, 0, 0, -1, 0)


def save_mha(array_ijk: np.ndarray, path: Path, spacing: tuple[float, float, float] = (1, 1, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array_ijk.T)
    image.SetSpacing(spacing)
    image.SetOrigin((-9.0, -40.0, 33.0))
    image.SetDirection(SPIDER_DIRECTION)
    sitk.WriteImage(image, str(path), useCompression=True)


@pytest.fixture
def spider(tmp_path: Path) -> Path:
    """Six patients with one to three sequences."""
    rng = np.random.default_rng(1)
    values = np.array([0, *range(1, 10), 12, 100, 105, *range(201, 210), 215])
    for patient in (1, 2, 10, 11, 21, 210):
        for sequence in ("t1", "t2", "t2_SPACE")[: 1 + patient % 3]:
            name = f"{patient}_{sequence}.mha"
            shape = (16, 20, 3)
            save_mha(rng.integers(1, 500, shape).astype(np.int16), tmp_path / "spider" / "images" / name)
            save_mha(rng.choice(values, shape).astype(np.uint8), tmp_path / "spider" / "masks" / name)
    return tmp_path / "spider"


def test_spider(spider: Path, tmp_path: Path) -> None:
    result = invoke("spider", "--source", spider, "--out", tmp_path / "new")
    assert result.exit_code == 0, result.output
    manifest = check_manifest(tmp_path / "new")
    rows = {row["case"]: row for row in manifest["cases"]}
    assert len(rows) == 12 and rows["2_t2_SPACE"]["group"] == rows["2_t1"]["group"] != rows["21_t1"]["group"]
    assert len({row["group"] for row in rows.values()}) == 6
    becomes = {v: v for v in range(10)} | {100: 10} | {200 + v: 10 + v for v in range(1, 10)}
    row = rows["2_t2_SPACE"]
    source = sitk.ReadImage(str(spider / "masks" / "2_t2_SPACE.mha"))
    voxels = np.argwhere(np.ones(source.GetSize()))
    in_mm = np.array([source.TransformIndexToPhysicalPoint(v.tolist()) for v in voxels]) * (-1, -1, 1)
    for kind, folder in (("image", "images"), ("label", "masks")):
        values = sitk.GetArrayFromImage(sitk.ReadImage(str(spider / folder / "2_t2_SPACE.mha"))).T.ravel()
        if kind == "label":
            values = np.array([becomes.get(int(value), 0) for value in values])
        stored = nib.load(tmp_path / "new" / row[kind])
        assert stored.shape == (3, 288, 288)
        np.testing.assert_allclose(stored.header.get_zooms(), (4, 1, 1))
        assert same_points(values, in_mm, stored).all()


def test_all_problems_of_spider_at_once(spider: Path, tmp_path: Path) -> None:
    images, masks, shape = spider / "images", spider / "masks", (16, 20, 3)
    (masks / "1_t1.mha").unlink()
    (images / "1_t2.mha").unlink()
    holed = np.ones(shape, np.float32)
    holed[0, 0, :2] = np.nan, np.inf
    save_mha(holed, images / "2_t1.mha")
    save_mha(np.full(shape, 150, np.uint8), masks / "2_t1.mha")
    save_mha(np.zeros((16, 20, 4), np.uint8), masks / "2_t2.mha")
    save_mha(np.zeros(shape, np.uint8), masks / "2_t2_SPACE.mha", spacing=(1, 1.1, 4))
    save_mha(np.full(shape, 5, np.int16), images / "10_t1.mha")
    (masks / "10_t2.mha").write_bytes((masks / "10_t2.mha").read_bytes()[:200])
    result = invoke("spider", "--source", spider, "--out", tmp_path / "new")
    assert result.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["spider"], "nothing half-written stays"
    for expected in (
        "8 problems", "images/1_t1.mha: no masks/1_t1.mha", "masks/1_t2.mha: no images/1_t2.mha",
        "2_t1.mha: 2 voxels are NaN", "2_t1.mha: unexpected label values [150]; known are 0-25, 100-125, 201-225",
        "2_t2.mha: image shape (16, 20, 3), label shape (16, 20, 4)", "2_t2_SPACE.mha: image and label have different",
        "10_t1.mha: all voxels are 5", "10_t2.mha: unreadable label",
    ):  # fmt: skip
        assert expected in result.output, expected


@pytest.mark.parametrize("folder", [".", "source_training"])
def test_crossmoda_is_resampled(tmp_path: Path, folder: str) -> None:
    """A ramp in mm stays the ramp, the tumour stays where it was, the cochlea becomes background."""
    raw = tmp_path / "raw" / folder
    shape, affine = (60, 50, 6), np.diag([0.3, 0.3, 1.5, 1.0])
    for shift, number in enumerate((1, 2, 17, 104)):
        i, j, k = np.indices(shape)
        image = 100 + 0.3 * i + 7 * 0.3 * j + number * k**2
        labels = np.zeros(shape, np.int16)
        labels[20:40, 10 + 2 * shift : 20 + 2 * shift, 2:4], labels[5:9, 5:9, 1] = 1, 2
        save(image.astype(np.float32), affine, raw / f"crossmoda_{number}_ceT1.nii.gz")
        save(labels, affine, raw / f"crossmoda_{number}_Label.nii.gz")
        save(image.astype(np.float32), affine, raw / f"crossmoda_{number}_hrT2.nii.gz")
    result = invoke("crossmoda", "--source", tmp_path / "raw", "--out", tmp_path / "new")
    assert result.exit_code == 0, result.output
    manifest = check_manifest(tmp_path / "new")
    rows = {row["case"]: row for row in manifest["cases"]}
    assert sorted(rows) == sorted(f"crossmoda_{number}_ceT1" for number in (1, 2, 17, 104))
    assert manifest["label_names"] == {"0": "background", "1": "vestibular schwannoma"}
    row = rows["crossmoda_1_ceT1"]
    image, label = nib.load(tmp_path / "new" / row["image"]), nib.load(tmp_path / "new" / row["label"])
    assert image.shape == (224, 224, 6) and np.allclose(image.header.get_zooms(), (0.6, 0.6, 1.5))
    assert set(np.unique(label.dataobj)) == {0, 1}
    centre = nib.affines.apply_affine(label.affine, np.argwhere(np.asanyarray(label.dataobj))).mean(axis=0)
    np.testing.assert_allclose(centre, [29.5 * 0.3, 14.5 * 0.3, 2.5 * 1.5], atol=0.16)
    voxels = np.argwhere(np.ones(image.shape))
    x, y, z = nib.affines.apply_affine(image.affine, voxels).T
    inner = (x > 0.6) & (x < 17) & (y > 0.6) & (y < 14)
    found = image.get_fdata().ravel()
    np.testing.assert_allclose(found[inner], (100 + x + 7 * y + (z / 1.5) ** 2)[inner], atol=1e-3)
    assert found[(x < -1) | (x > 19)].max() == found.min(), "padding is as dark as the darkest voxel"


def test_a_bad_affine_hides_no_other_problem(tmp_path: Path) -> None:
    save(np.arange(24, dtype=np.float32).reshape(2, 3, 4), np.eye(4), tmp_path / "image.nii")
    content = bytearray((tmp_path / "image.nii").read_bytes())
    content[280:328] = bytes(48)  # srow_x, srow_y, srow_z
    (tmp_path / "image.nii").write_bytes(content)
    save(np.full((2, 3, 5), 77, np.int16), np.eye(4), tmp_path / "label.nii")
    found = pair_problems(tmp_path / "image.nii", tmp_path / "label.nii", [0, 1], tmp_path)
    assert len(found) == 3, found
    for problem, expected in zip(found, ("spans no volume", "label values [77]", "image shape"), strict=True):
        assert expected in problem


def test_folders_may_be_links(amos: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for folder in amos.iterdir():
        (linked / folder.name).symlink_to(folder)
    data_set = load_data_set(DATA_SETS / "amos.yaml")
    for template in (data_set.image, data_set.label):
        found, there = (find_files(source, template, data_set) for source in (linked, amos))
        assert found.keys() == there.keys() and found


def test_one_image_under_two_patients_leaks(amos: Path, tmp_path: Path) -> None:
    for part, number in AMOS_IDS[1:]:
        for kind in ("images", "labels"):
            target = amos / f"{kind}{part}" / f"amos_{number:04d}.nii.gz"
            shutil.copy(amos / f"{kind}Tr" / "amos_0507.nii.gz", target)
    result = invoke("amos", "--source", amos, "--out", tmp_path / "new")
    assert result.exit_code == 2 and "Leak: image file" in result.output and "Leak: source image file" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["amos22"]


def test_a_failure_leaves_nothing(amos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("hf_binaryformer.data.folder_writer.write_shards", full_disk)
    assert invoke("amos", "--source", amos, "--out", tmp_path / "new", "--shards").exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["amos22"]


def test_hashes_and_voxels_are_of_the_same_file(amos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change_and_hash(path: Path) -> str:
        if path.is_relative_to(amos):
            path.write_bytes(path.read_bytes() + b"x")
        return "0" * 64

    monkeypatch.setattr("hf_binaryformer.data.public_data.file_hash", change_and_hash)
    result = invoke("amos", "--source", amos, "--out", tmp_path / "new")
    assert result.exit_code == 2 and "changed while it was read" in " ".join(result.output.split())
    assert [path.name for path in tmp_path.iterdir()] == ["amos22"]


def leak_rows(folder: Path, images: dict[str, tuple[str, str, np.ndarray]]) -> list[dict]:
    """Rows of a folder with (group, split, array) for each case."""
    rows = []
    for name, (group, split, array) in images.items():
        save(array.astype(np.float32), np.eye(4), folder / f"{name}.nii.gz")
        digest = hashlib.sha256((folder / f"{name}.nii.gz").read_bytes()).hexdigest()
        rows.append({"case": name, "group": group, "split": split, "image": f"{name}.nii.gz", "image_sha256": digest})
    return rows


def test_leakage_finds_patients_copies_and_near_copies(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    first, second, third, fourth = (rng.gamma(2.0, 100.0, (20, 24, 16)) for _ in range(4))
    # Unlike subjects on one grid share most of their anatomy.
    common = sum(axis**2 for axis in np.indices((20, 24, 16)))
    images = {
        "a": ("p1", "train", common + first),
        "b": ("p2", "train", common + second),
        "c": ("p3", "validation", common + third),
        "d": ("p4", "test", common + fourth),
    }
    report = check_leakage(tmp_path, leak_rows(tmp_path, images))
    assert report.errors == [] and report.warnings == []
    assert report.statistics["train"]["volumes"] == 2
    means = [images[name][2][images[name][2] > images[name][2].min()].mean() for name in "ab"]
    assert report.statistics["train"]["mean"] == pytest.approx(np.mean(means), rel=1e-4)
    assert report.statistics["train"]["mean_sd"] == pytest.approx(abs(means[0] - means[1]) / 2**0.5, rel=1e-3)
    assert set(report.statistics["test"]) == {"volumes", "mean", "deviation"}, "one volume has no deviation"

    gain = 3 * images["a"][2] + rng.normal(0, 5, first.shape) + 40
    mirrored = np.pad(images["b"][2][::-1], 2, constant_values=images["b"][2].min())
    images |= {"gain": ("p5", "test", gain), "mirrored": ("p6", "test", mirrored), "again": ("p1", "test", fourth + 9)}
    images["copy"] = ("p7", "validation", images["d"][2])
    report = check_leakage(tmp_path, leak_rows(tmp_path, images))
    assert len(report.errors) == 2
    assert report.errors[0].startswith("group p1 stands in test and train: a, again")
    assert report.errors[1].startswith("image file") and report.errors[1].endswith("d, copy")
    pairs = {tuple(warning.split(" may be")[0].split(" and ")) for warning in report.warnings}
    assert pairs == {
        ("a (train)", "gain (test)"), ("b (train)", "mirrored (test)"), ("d (test)", "copy (validation)")
    }  # fmt: skip
    said = {
        name: next(warning for warning in report.warnings if name in warning) for name in ("gain", "mirrored", "copy")
    }
    assert "correlate" in said["gain"] and "quantiles" not in said["gain"]
    assert "correlate" not in said["mirrored"] and "quantiles" in said["mirrored"]
    assert "correlate" in said["copy"] and "quantiles" in said["copy"]


def test_check_leakage_command(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    rows = leak_rows(tmp_path, {n: (n, s, rng.random((8, 8, 8))) for n, s in (("a", "train"), ("b", "test"))})
    manifest = tmp_path / "manifest.json"
    assert "no manifest.json" in flat(invoke("check-leakage", tmp_path).output)
    manifest.write_text(json.dumps({"cases": rows}))
    result = invoke("check-leakage", tmp_path)
    assert result.exit_code == 0 and "No leak in 2 volumes, 0 warnings" in result.output
    rows[1]["group"] = "a"
    manifest.write_text(json.dumps({"cases": rows}))
    result = invoke("check-leakage", tmp_path)
    assert result.exit_code == 2 and "Leak: group a stands in test and train" in result.output
    save(np.ones((8, 8, 8)), np.eye(4), tmp_path / "b.nii.gz")
    result = invoke("check-leakage", tmp_path)
    assert result.exit_code == 2 and "b.nii.gz (1 files) changed" in flat(result.output)


@pytest.mark.parametrize(
    ("name", "size", "labels"),
    [
        ("amos", (320, 320, None), 16),
        ("crossmoda", (224, 224, None), 2),
        ("oasis", (160, 224, 192), 36),
        ("spider", (None, 288, 288), 20),
    ],
)
def test_sizes_and_labels_of_the_paper(name: str, size: tuple, labels: int) -> None:
    data_set = load_data_set(DATA_SETS / f"{name}.yaml")
    assert tuple(data_set.size) == size and len(data_set.label_names) == labels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"labels": {0: {"name": "a", "values": 0}, 1: {"name": "b", "values": "0-2"}}},
            r"values \[0\] stand under two",
        ),
        ({"labels": {0: {"name": "a", "values": 0}, 2: {"name": "b", "values": 2}}}, r"\[0, 2\], expected 0, 1, 2"),
        ({"labels": {0: {"name": "a", "values": "0;2"}}}, "numbers like"),
        ({"size": [320, 0, None]}, "size is"),
        ({"label": "labels/{number}.nii.gz"}, "has the fields"),
        ({"validation_fraction": 1.5}, "validation_fraction is 1.5"),
        ({"sizes": [1, 2, 3]}, r"unknown keys \['sizes'\]"),
    ],
)
def test_a_wrong_yaml_file_is_named(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load((DATA_SETS / "amos.yaml").read_text()) | change))
    with pytest.raises(ValueError, match=message) as caught:
        load_data_set(path)
    assert "wrong.yaml" in str(caught.value)
