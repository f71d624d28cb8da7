"""`binaryformer evaluate` on folders as people have them: every volume is scored, or a line names it."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from hf_binaryformer import cli

CUBE = np.zeros((6, 6, 6), np.uint8)
CUBE[1:4, 1:4, 1:4] = 1


def evaluate(pred: Path, truth: Path, *options: Any) -> Result:
    arguments = ["evaluate", "--pred", pred, "--truth", truth, *options]
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [str(a) for a in arguments])


def save(path: Path, array: np.ndarray) -> None:
    """Write a label map under a name whose ending nibabel may not write itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = nib.Nifti1Image(array, np.eye(4)).to_bytes()
    path.write_bytes(gzip.compress(content) if path.name.lower().endswith(".gz") else content)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Predictions and truths that agree on a.nii.gz."""
    for name in ("pred", "truth"):
        save(tmp_path / name / "a.nii.gz", CUBE)
    return tmp_path / "pred", tmp_path / "truth"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("CASE.NII.GZ", "CASE.NII.GZ"),
        ("CASE.NII.GZ", "CASE.nii.gz"),
        ("b.NII", "b.nii"),
        ("fold_0/deep/b.nii.gz", "fold_0/deep/b.nii.gz"),
        ("fold 0/a.nii.gz", "fold 0/a.nii.gz"),
    ],
)
def test_capitals_and_subfolders_are_scored(folders, tmp_path, ours, theirs):
    """The second case misses half of its truth, so that leaving it out shows in the mean."""
    pred, truth = folders
    half = CUBE.copy()
    half[1:4, 1:4, 2:] = 0
    save(pred / ours, half)
    save(truth / theirs, CUBE)
    result = evaluate(pred, truth, "--report", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert {case["case"] for case in report["cases"]} == {"a.nii.gz", ours}
    # 2 · 9 / (9 + 27) = 1/2 for the half, 1 for the other.
    assert report["mean"]["dice"] == pytest.approx((1 + 0.5) / 2)
    assert report["notes"] == [] and "note" not in result.stderr


@pytest.mark.parametrize("side", ["pred", "truth", "both"])
@pytest.mark.parametrize("name", ["b.dcm", "IM0001", "sub/b.hdr", "b.nii.bz2", "b.npy", "b.nii.gz.part", "b.nii.gz~"])
def test_a_file_that_might_be_a_volume_is_refused_by_name(folders, side, name):
    for folder in folders:
        if side in (folder.name, "both"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"x")
    result = evaluate(*folders)
    assert result.exit_code == 1, result.output
    assert name in result.stderr and "not scored" in result.stderr and ".nii.gz" in result.stderr


@pytest.mark.parametrize("name", ["sub/a.nii.gz", "b.NII", "B.MHA"])
def test_a_volume_without_its_partner_is_refused_by_name(folders, name):
    for folder in folders:
        save(folder / name, CUBE)
        result = evaluate(*folders)
        assert result.exit_code == 1 and f"1 only in '{folder}' ({name})" in result.stderr, result.output
        (folder / name).unlink()


def test_files_beside_the_volumes_are_told(folders, tmp_path):
    """What nnU-Net, a system and a viewer leave behind does not stop the evaluation, and is named."""
    pred, truth = folders
    for name in ("dataset.json", "plans.JSON", "a.npz", ".DS_Store", "._a.nii.gz"):
        (pred / name).write_bytes(b"{}")
    result = evaluate(pred, truth, "--report", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    (note,) = json.loads((tmp_path / "r.json").read_text())["notes"]
    assert note.startswith(f"3 files in '{pred}' are not scored") and "a.npz, dataset.json, plans.JSON" in note
    assert f"note: {note}" in result.stderr.splitlines()


def test_one_name_in_two_spellings_is_refused(folders):
    pred, truth = folders
    for folder in folders:
        save(folder / "a.NII.GZ", CUBE)
    if len(list(pred.iterdir())) < 2:
        pytest.skip("this file system does not tell capitals apart")
    result = evaluate(pred, truth)
    assert result.exit_code == 1 and "a.NII.GZ" in result.stderr and "a.nii.gz" in result.stderr, result.output


def test_linked_folders_are_refused_by_name(folders, tmp_path):
    """Python's walk passes over links to folders without a word."""
    pred, truth = folders
    save(tmp_path / "elsewhere" / "b.nii.gz", CUBE)
    for folder in folders:
        (folder / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    result = evaluate(pred, truth)
    assert result.exit_code == 1 and "linked" in result.stderr and "not scored" in result.stderr, result.output


def test_linked_files_are_scored(folders, tmp_path):
    pred, truth = folders
    save(tmp_path / "elsewhere.nii.gz", CUBE)
    for folder in folders:
        (folder / "b.nii.gz").symlink_to(tmp_path / "elsewhere.nii.gz")
    result = evaluate(pred, truth)
    assert result.exit_code == 0 and "2 case(s)" in result.stdout, result.output
    (tmp_path / "elsewhere.nii.gz").unlink()
    result = evaluate(pred, truth)
    assert result.exit_code == 1 and "b.nii.gz" in result.stderr, "a link to nothing is an error"


def test_a_label_in_one_of_the_two_counts_as_dice_0(folders, tmp_path):
    """In the prediction only: 0. In the truth only: 0. In neither: not counted."""
    pred, truth = folders
    invented, missed = CUBE.copy(), CUBE.copy()
    invented[5, 5, 5], missed[5, 5, 5] = 2, 3
    save(pred / "a.nii.gz", invented)
    save(truth / "a.nii.gz", missed)
    (tmp_path / "names.json").write_text(json.dumps({"1": "cube", "2": "invented", "3": "missed", "4": "neither"}))
    result = evaluate(pred, truth, "--labels", tmp_path / "names.json", "--report", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert {row["name"]: row["dice"] for row in report["labels"]} == {
        "cube": 1.0,
        "invented": 0.0,
        "missed": 0.0,
        "neither": None,
    }
    assert report["mean"]["dice"] == pytest.approx(1 / 3)
    assert "neither" in report["absent_labels"] and "0" in report["absent_labels"]
    assert report["absent_labels"] in " ".join(result.stdout.split())


def test_labels_that_are_nearly_whole_are_told(folders, tmp_path):
    pred, truth = folders
    save(pred / "a.nii.gz", CUBE * np.float32(0.9999))
    result = evaluate(pred, truth, "--report", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["mean"]["dice"] == 1.0
    (note,) = report["notes"]
    assert str(pred / "a.nii.gz") in note and "rounded" in note and f"note: {note}" in result.stderr.splitlines()


def test_empty_folders_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    result = evaluate(tmp_path / "empty", tmp_path / "empty")
    assert result.exit_code == 1 and "no volumes in" in result.stderr


def test_a_copy_of_the_folder_scores_1(folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "copy")
    assert "1.000" in evaluate(folders[0], tmp_path / "copy").stdout


def test_names_that_differ_in_what_all_of_a_folder_have(tmp_path):
    """What `segment` writes, against masks by hand; the half must meet its own truth."""
    half = CUBE.copy()
    half[1:4, 1:4, 2:] = 0
    for name, ours, theirs in (("P1", CUBE, CUBE), ("P2", half, CUBE), ("P10", half, half)):
        save(tmp_path / "pred" / f"{name}_t1_labels.nii.gz", ours)
        save(tmp_path / "truth" / f"{name}_t1_mask.nii", theirs)
    result = evaluate(tmp_path / "pred", tmp_path / "truth", "--report", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["mean"]["dice"] == pytest.approx((1 + 0.5 + 1) / 3)
    (note,) = report["notes"]
    assert "taken for pairs, such as P1_t1_labels.nii.gz and P1_t1_mask.nii" in note
    assert [case["truth"] for case in report["cases"]] == ["P1_t1_mask.nii", "P10_t1_mask.nii", "P2_t1_mask.nii"]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (["P1_labels", "P2_labels"], ["P1_mask", "P2_mask", "P3_mask"]),
        (["brain_old"], ["brain_new"]),
        (["P1_left", "P2_left"], ["P1_right", "P2_right"]),
        (["P1_lesion_L", "P2_lesion_L"], ["P1_lesion", "P2_lesion"]),
        (["P1_ses-1", "P2_ses-1"], ["P1_ses-2", "P2_ses-2"]),
        (["sub-01_ses-1", "sub-01_ses-2"], ["sub-02_ses-1", "sub-02_ses-2"]),
        (["fold1/a", "fold1/b"], ["fold2/a", "fold2/b"]),
        (["1_labels", "2_labels"], ["labels_1", "labels_2"]),
    ],
)
def test_names_that_leave_a_doubt_are_refused(tmp_path, ours, theirs):
    for folder, names in (("pred", ours), ("truth", theirs)):
        for name in names:
            save(tmp_path / folder / f"{name}.nii.gz", CUBE)
    result = evaluate(tmp_path / "pred", tmp_path / "truth")
    assert result.exit_code == 1 and "every file needs one of the same name" in result.stderr


def test_two_files_of_one_name_leave_a_doubt(tmp_path):
    """None of the two may be left out without a word."""
    for path in ("pred/a_x.nii", "pred/a_x.nii.gz", "pred/b_x.nii", "truth/a_y.nii", "truth/b_y.nii"):
        save(tmp_path / path, CUBE)
    result = evaluate(tmp_path / "pred", tmp_path / "truth")
    assert result.exit_code == 1 and "every file needs one of the same name" in result.stderr
