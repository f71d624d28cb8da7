"""Anybody's folder of images and label maps: pairs by name, persons, names of labels, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from hf_binaryformer.commands.prepare import app
from hf_binaryformer.data.file_pairs import find_volumes, pair_names, people_of
from hf_binaryformer.data.own_folder import given_names, name_table


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def said(result: Result) -> str:
    return " ".join(result.output.split())


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([-2.0, 1.0, 1.0, 1.0]) if affine is None else affine), path)


def volumes(
    folder: Path, image: str, label: str, count: int = 8, values: tuple[int, ...] = (0, 1, 7), seed: int = 0
) -> None:
    """Pairs of files that are named by their number."""
    random = np.random.default_rng(seed)
    for number in range(count):
        save(folder / image.format(number), random.normal(100, 20, (6, 5, 4)).astype(np.float32))
        save(folder / label.format(number), random.choice(values, (6, 5, 4)).astype(np.uint8))


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (["a", "b"], ["a", "b"]),
        (["case_1_0000", "case_2_0000"], ["case_1", "case_2"]),
        (["case_0000"], ["case"]),
        (["P1_t1", "P2_t1"], ["P1_mask", "P2_mask"]),
        (["P1/t1", "P2/t1"], ["P1/seg", "P2/seg"]),
        (["sub-01_ses-1_T1w", "sub-01_ses-2_T1w"], ["sub-01_ses-1_dseg", "sub-01_ses-2_dseg"]),
        (["img_3", "img_10"], ["lab_3", "lab_10"]),
        (["scan"], ["truth"]),
    ],
)
def test_pairs(images, labels):
    assert pair_names(images[::-1], labels) == dict(zip(images, labels, strict=True))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (["a", "b"], ["a"], r"1 images without labels \(b\), 0 label maps"),
        (["P1_t1", "P2_t1"], ["P1_s", "P2_s", "P3_s"], r"1 label maps without an image \(P3_s\)"),
        (["x_0000", "x_0001"], ["x"], "several channels, such as x_0000, x_0001; expected one: move"),
        (["P1_t1", "P1_t2"], ["P1_s", "P2_s"], "do not make pairs.*Name the two files of a pair alike"),
    ],
)
def test_files_without_a_partner_are_named(images, labels, message):
    with pytest.raises(ValueError, match=message):
        pair_names(images, labels)


def test_persons():
    names = ["sub-01_ses-1", "sub-01_ses-2", "sub-02_ses-1"]
    assert people_of(names, None) == dict(zip(names, ["sub-01", "sub-01", "sub-02"], strict=True))
    assert people_of(["P1_a", "sub-2_b"], None) == {"P1_a": "P1_a", "sub-2_b": "sub-2_b"}
    assert people_of(["P1_a", "P1_b"], r"(P\d+)_") == {"P1_a": "P1", "P1_b": "P1"}
    assert people_of(["P1_a"], r"P\d+") == {"P1_a": "P1"}
    with pytest.raises(ValueError, match=r"finds no person in 1 names \(Q1\)"):
        people_of(["P1", "Q1"], r"P\d+")
    with pytest.raises(ValueError, match=r"finds no person in 1 names \(Q\)"):
        people_of(["Q"], r"Q(\d*)")
    with pytest.raises(ValueError, match="is no regular expression"):
        people_of(["P1"], "(")


def test_only_volumes_are_found_each_name_once(tmp_path):
    for name in ("a.nii.gz", "B.NII.GZ", "sub/c.mha", "notes.txt", "._a.nii.gz", ".hidden/d.nii"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert {*find_volumes(str(tmp_path))} == {"a", "B", "sub/c"}
    assert {*find_volumes(f"{tmp_path}/*/*.mha")} == {"c"}
    (tmp_path / "a.nii").touch()
    with pytest.raises(ValueError, match="have one name"):
        find_volumes(str(tmp_path))
    with pytest.raises(ValueError, match="a pattern in quotes"):
        find_volumes(f"{tmp_path}/*.dcm")


@pytest.mark.parametrize(
    "content",
    ["1: lesion\n7: big vessel\n", "lesion: 1\nbig vessel: 7\n", '{"labels": {"lesion": 1, "big vessel": 7}}'],
)
def test_names_of_labels(tmp_path, content):
    (tmp_path / "n.yaml").write_text(content)
    expected = {0: "background", 1: "lesion", 7: "big vessel"}
    assert given_names(str(tmp_path / "n.yaml")) == given_names("1=lesion, 7=big vessel") == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"whole": [1, 2]}, "expected names by number, such as 1=lesion"),
        ({}, "expected names by number"),
        ({"1": "a", "300": "b"}, r"label values \[300\], expected 0 to 255"),
        ({"1": "a", "2": "a"}, "gives the name a to several values"),
    ],
)
def test_names_that_are_none(content, message):
    with pytest.raises(ValueError, match=message):
        name_table(content, "x")


def test_a_folder_with_own_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    volumes(tmp_path, "t1/P{}_t1.nii.gz", "masks/P{}_mask.nii.gz")
    result = run("folder", "t1", "masks", "-o", "out", "--names", "1=lesion,7=vessel", "--licence", "in-house")
    assert result.exit_code == 0, result.output
    assert "Pairs such as P0_t1.nii.gz with P0_mask.nii.gz" in said(result)
    assert "8 volumes of 8 persons: each file is taken for another person" in said(
        result
    ) and "Warning: no" not in said(result)
    manifest = manifest_of(tmp_path / "out")
    assert (manifest["name"], manifest["licence"]) == ("out", "in-house")
    assert manifest["label_names"] == {"0": "background", "1": "lesion", "7": "vessel"}
    row = manifest["cases"][3]
    assert (row["case"], row["group"], row["source_label"]) == ("P3_t1", "P3_t1", "P3_mask.nii.gz")
    for kind, source in (("image", "t1/P3_t1.nii.gz"), ("label", "masks/P3_mask.nii.gz")):
        copy = nib.load(tmp_path / "out" / row[kind])
        assert nib.aff2axcodes(copy.affine) == ("R", "A", "S")
        np.testing.assert_array_equal(np.asanyarray(copy.dataobj), np.asanyarray(nib.load(source).dataobj)[::-1])


def test_the_layout_of_nnunet_and_scans_of_one_person(tmp_path):
    for seed, visit in enumerate("ab"):
        files = f"imagesTr/P{{}}_{visit}_0000.nii.gz", f"labelsTr/P{{}}_{visit}.nii.gz"
        volumes(tmp_path / "raw", *files, count=4, values=(0, 1), seed=seed)
    description = {"name": "tumours", "licence": "CC0", "labels": {"background": 0, "tumour": 1}}
    (tmp_path / "raw" / "dataset.json").write_text(json.dumps(description))
    result = run("folder", tmp_path / "raw", "-o", tmp_path / "out", "--subject", r"(P\d+)_", "--qc-every", 0)
    assert result.exit_code == 0, result.output
    assert "8 volumes of 4 persons" in said(result) and "another person" not in said(result)
    manifest = manifest_of(tmp_path / "out")
    assert (manifest["name"], manifest["licence"]) == ("tumours", "CC0")
    assert manifest["label_names"] == {"0": "background", "1": "tumour"}
    splits = {row["case"]: row["split"] for row in manifest["cases"]}
    assert {*splits.values()} == {"train", "validation", "test"}
    assert all(splits[f"P{number}_a_0000"] == splits[f"P{number}_b_0000"] for number in range(4))


def test_labels_without_names_and_too_few_volumes_are_told(tmp_path):
    volumes(tmp_path, "i/{}.nii.gz", "l/{}.nii.gz", count=2)
    result = run("folder", tmp_path / "i", tmp_path / "l", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "so they are called background, label 1, label 7; --names" in said(result)
    for split, lost in (("validation", "train.best_by cannot be used"), ("test", "without a score")):
        assert f"Warning: no volume is left for {split}, so" in said(result) and lost in said(result)


@pytest.mark.parametrize(("image", "options"), [("sub-{}_T1w", ()), ("P{}_t1", ("--subject", ".+"))])
def test_a_rule_that_finds_one_scan_of_each_person_is_a_rule(tmp_path, image, options):
    volumes(tmp_path, f"i/{image}.nii.gz", f"l/{image}.nii.gz", count=4)
    result = run("folder", tmp_path / "i", tmp_path / "l", "-o", tmp_path / "out", "--names", "1=a,7=b", *options)
    assert result.exit_code == 0, result.output
    assert "4 volumes of 4 persons" in said(result) and "another person" not in said(result)
    # Noise of one mean is not the same scan.
    assert "may be one scan" not in said(result)


def test_without_names_all_label_maps_are_told_too(tmp_path):
    volumes(tmp_path, "i/{}_t1.nii.gz", "l/{}_mask.nii.gz", count=4)
    save(tmp_path / "l" / "1_mask.nii.gz", np.full((6, 5, 4), 400, np.int16))
    save(tmp_path / "l" / "2_mask.nii.gz", np.zeros((6, 5, 3), np.uint8))
    (tmp_path / "l" / "3_mask.nii.gz").write_bytes(b"no volume")
    result = run("folder", tmp_path / "i", tmp_path / "l", "-o", tmp_path / "out")
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    for expected in (
        "3 problems", "l/1_mask.nii.gz: unexpected label values [400]; known are 0-1, 7; labels end at 255",
        "i/2_t1.nii.gz: image shape (6, 5, 4), label shape (6, 5, 3) (l/2_mask.nii.gz)", "i/3_t1.nii.gz: unreadable label",
    ):  # fmt: skip
        assert expected in said(result), expected


def test_a_copy_in_another_split_is_told_with_its_reason(tmp_path):
    volumes(tmp_path, "i/{}.nii.gz", "l/{}.nii.gz", count=4)
    first = np.asanyarray(nib.load(tmp_path / "i" / "0.nii.gz").dataobj)
    for number in range(1, 4):
        save(tmp_path / "i" / f"{number}.nii.gz", 2 * first + number)
    result = run("folder", tmp_path / "i", tmp_path / "l", "-o", tmp_path / "out", "--names", "1=a,7=b")
    assert result.exit_code == 0, result.output
    assert "may be one scan: they correlate by 1.0000. If so, they belong in one split" in said(result)
    assert "quantiles" not in said(result)


def test_all_problems_are_told_and_nothing_is_written(tmp_path):
    volumes(tmp_path, "i/{}.nii.gz", "l/{}.nii.gz", count=4)
    save(tmp_path / "l" / "1.nii.gz", np.zeros((6, 5, 3), np.uint8))
    save(tmp_path / "i" / "2.nii.gz", np.zeros((6, 5, 4), np.float32))
    moved = nib.load(tmp_path / "l" / "3.nii.gz")
    shifted = moved.affine + np.array([[0, 0, 0, 1.5], [0, 0, 0, 2], [0, 0, 0, 0], [0, 0, 0, 0]])
    nib.save(nib.Nifti1Image(np.asanyarray(moved.dataobj), shifted), tmp_path / "l" / "3.nii.gz")
    result = run("folder", tmp_path / "i", tmp_path / "l", "-o", tmp_path / "out", "--names", "1=a")
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    for expected in (
        "i/1.nii.gz: image shape",
        "i/2.nii.gz: all voxels are 0",
        "unexpected label values [7]",
        "2.5 mm apart (l/3.nii.gz)",
    ):
        assert expected in said(result)
    result = run("folder", tmp_path / "i", "-o", tmp_path / "out")
    assert result.exit_code == 2 and "give two folders" in said(result)


def test_hippocampus_refuses_other_data(tmp_path):
    volumes(tmp_path, "imagesTr/case_{}.nii.gz", "labelsTr/case_{}.nii.gz", count=2, values=(0, 1, 2))
    result = run("hippocampus", "--source", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "is not Task04_Hippocampus" in said(result)
    assert "binaryformer prepare folder" in said(result) and not (tmp_path / "out").exists()
