"""Labels of two tools brought to the same numbers before they are scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from hf_binaryformer import cli
from hf_binaryformer.data.label_schemes import common_scheme, read_label_names, read_mapping


def run(*arguments: Any) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["evaluate", *(str(a) for a in arguments)])


def save(path: Path, array: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(array.astype(np.int32), np.eye(4)), path)
    return path


def volumes(folder: Path) -> tuple[Path, Path]:
    """Hippocampi as FreeSurfer numbers them; the prediction misses half of the right one and swaps nothing."""
    truth = np.zeros((20, 12, 12))
    truth[2:6, 4:8, 4:8] = 17
    truth[14:18, 4:8, 4:8] = 53
    pred = truth.copy()
    pred[16:18, 4:8, 4:8] = 0
    return save(folder / "pred.nii.gz", pred), save(folder / "truth.nii.gz", truth)


def scores(result: Result, report: Path) -> dict[str, float | None]:
    assert result.exit_code == 0, result.output
    rows = json.loads(report.read_text())["labels"]
    return {row["name"]: row["dice"] for row in rows if row["dice"] is not None}


def test_sides_are_merged(tmp_path):
    pred, truth = volumes(tmp_path)
    options = ("--pred", pred, "--truth", truth, "--labels", "freesurfer", "--report", tmp_path / "r.json")
    apart = scores(run(*options), tmp_path / "r.json")
    # 2 · 32 / (32 + 64) = 2/3; together 2 · 96 / (96 + 128).
    assert apart == {"left hippocampus": 1.0, "right hippocampus": pytest.approx(2 / 3)}
    merged = scores(run(*options, "--merge-sides"), tmp_path / "r.json")
    assert merged == {"hippocampus": pytest.approx(192 / 224)}
    assert json.loads((tmp_path / "r.json").read_text())["merge_sides"] is True


def test_sides_that_are_exchanged_are_right_once_merged(tmp_path):
    _, truth = volumes(tmp_path)
    swapped = save(tmp_path / "swapped.nii.gz", np.asarray(nib.load(truth).dataobj)[::-1].copy())
    options = ("--pred", swapped, "--truth", truth, "--labels", "freesurfer", "--report", tmp_path / "r.json")
    assert set(scores(run(*options), tmp_path / "r.json").values()) == {0.0}
    assert scores(run(*options, "--merge-sides"), tmp_path / "r.json") == {"hippocampus": 1.0}


@pytest.mark.parametrize("kind", ["csv", "json", "titled.csv"])
def test_another_tool_s_numbers_by_name(kind, tmp_path):
    """A prediction with 12 for both hippocampi, against FreeSurfer's two numbers and its many others."""
    pred, truth = volumes(tmp_path)
    ours = np.where(np.asarray(nib.load(pred).dataobj) > 0, 12, 0)
    theirs = np.asarray(nib.load(truth).dataobj).copy()
    theirs[0, 0, 0], theirs[0, 0, 1] = 1035, 77
    save(pred, ours), save(truth, theirs)
    (tmp_path / "names.json").write_text(json.dumps({"0": "background", "12": "hippocampus"}))
    lines = "17,Hippocampus,left\n53,hippocampus,right\n*,0,\n"
    content = {
        "csv": lines,
        "titled.csv": "label,name,side\n" + lines,
        "json": '{"17": "hippocampus", "53": 12, "*": 0}',
    }
    mapping = tmp_path / f"map.{kind}"
    mapping.write_text(content[kind])
    options = ("--pred", pred, "--truth", truth, "--labels", tmp_path / "names.json", "--report", tmp_path / "r.json")
    found = scores(run(*options, "--map-truth", mapping), tmp_path / "r.json")
    assert found == {"hippocampus": pytest.approx(192 / 224)}
    result = run(*options)
    assert result.exit_code == 1 and "label ids [17, 53, 77, 1035]" in result.stderr


def test_what_freesurfer_writes(tmp_path):
    """aparc+aseg.mgz: a parcel of the cortex, a piece of the callosum, a lesion, a choroid plexus, the chiasm."""
    pred, truth = np.zeros((8, 8, 8)), np.zeros((8, 8, 8))
    pred[:2], pred[2:4], pred[4:6], pred[6] = 3, 2, 4, 41
    truth[:2], truth[2:4], truth[4:6], truth[6] = 1035, 251, 4, 41
    truth[3, :4], truth[4, :4], truth[6, 0] = 77, 31, 85
    save(tmp_path / "pred.nii.gz", pred)
    nib.save(nib.MGHImage(truth.astype(np.int32), np.eye(4)), tmp_path / "aparc+aseg.mgz")
    options = ("--pred", tmp_path / "pred.nii.gz", "--truth", tmp_path / "aparc+aseg.mgz", "--labels", "freesurfer")
    found = scores(
        run(*options, "--map-truth", "aseg", "--merge-sides", "--report", tmp_path / "r.json"), tmp_path / "r.json"
    )
    # The chiasm's 8 voxels of 192 are no white matter in the truth.
    white = 2 * (192 - 8) / (192 + 192 - 8)
    assert found == {
        "cerebral cortex": 1.0, "cerebral white matter": pytest.approx(white), "lateral ventricle": 1.0
    }  # fmt: skip
    result = run(*options, "--map-truth", "aseg")
    assert result.exit_code == 1 and "add --merge-sides" in result.stderr


def test_names_of_both_without_a_list_of_names(tmp_path):
    pred, truth = volumes(tmp_path)
    for name in ("pred", "truth"):
        (tmp_path / f"{name}.csv").write_text("17,left hippocampus\n53,right hippocampus\n0,background\n")
    ours = ("--map-pred", tmp_path / "pred.csv", "--map-truth", tmp_path / "truth.csv", "--report", tmp_path / "r.json")
    options = ("--pred", pred, "--truth", truth)
    assert scores(run(*options, *ours, "--merge-sides"), tmp_path / "r.json") == {
        "hippocampus": pytest.approx(192 / 224)
    }
    result = run(*options, *ours[2:])
    assert result.exit_code == 1 and "give --labels, or a mapping for both" in result.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("17,1\n", "labels [53] are not in the file of --map-truth"),
        ("", "is empty"),
        ("[3]", "is empty"),
        ("17\n", "does not hold labels and their new labels"),
        ("17,1\n17,2\n", "label 17 stands in two places"),
        ("17,1\nx,2\n", "does not hold labels and their new labels"),
        ("17,-1\n", "is negative"),
        ("17,1\n53,no such name\n", "'no such name' is the name of no label"),
    ],
)
def test_a_mapping_that_says_too_little_is_refused(text, message, tmp_path):
    pred, truth = volumes(tmp_path)
    (tmp_path / "map.csv").write_text(text)
    result = run("--pred", pred, "--truth", truth, "--labels", "freesurfer", "--map-truth", tmp_path / "map.csv")
    (line,) = (line for line in result.stderr.splitlines() if line.strip())
    assert result.exit_code == 1 and line.startswith("error: ") and message in line


def test_sides_without_names_are_refused(tmp_path):
    pred, truth = volumes(tmp_path)
    result = run("--pred", pred, "--truth", truth, "--merge-sides")
    assert result.exit_code == 1 and "--labels freesurfer" in result.stderr


def test_one_label_twice_in_json_is_refused(tmp_path):
    (tmp_path / "map.json").write_text('{"1": 2, "1": 3}')
    with pytest.raises(ValueError, match="label 1 stands in two places"):
        read_mapping(tmp_path / "map.json")


def test_every_label_becomes_what_the_mapping_says(tmp_path):
    """Against a loop over voxels, with numbers beyond the length of a table as well."""
    (tmp_path / "map.json").write_text(json.dumps({"1": 4, "2": 5, "9": 0, "300000000": 5, "*": 7}))
    scheme = common_scheme({4: "left x", 5: "right x", 7: "y"}, tmp_path / "map.json", None, merge_sides=True)
    assert scheme.names == {4: "x", 7: "y"}
    expected = {0: 0, 1: 4, 2: 4, 9: 0, 300000000: 4, 3: 7, 8: 7}
    for large in (False, True):
        chosen = [number for number in expected if large or number < 100]
        labels = np.random.default_rng(0).choice(chosen, (5, 6, 7)).astype(np.int32)
        np.testing.assert_array_equal(scheme.pred(labels), np.vectorize(expected.get)(labels))
    truth = np.array([[[0, 4, 5, 7]]], dtype=np.int32)
    assert scheme.truth(truth).tolist() == [[[0, 4, 4, 7]]]


def test_the_built_in_names_are_freesurfer_s(repository):
    names = read_label_names(Path("freesurfer"))
    assert (names[2], names[53], names[16], len(names)) == (
        "left cerebral white matter",
        "right hippocampus",
        "brain stem",
        33,
    )
