"""Which scans a run has: files, folders, patterns, BIDS and DICOM folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scan_cases import NAMES, all_files, run, save, table

from hf_binaryformer.commands.scans import find_scans


def names(*sources: Any, out: str = "/nowhere/out", **options: Any) -> list[str]:
    return [scan.name for scan in find_scans([Path(s) for s in sources], Path(out), **options)[0]]


def test_files_folders_and_patterns(scans, tmp_path, monkeypatch):
    assert names(scans) == ["a", "b", "c", "deep/a"]
    assert names(scans / "c.nii.gz", scans / "a.nii.gz") == ["c", "a"]
    assert names(scans / "*.nii.gz") == ["a", "b", "c"]
    assert names(scans / "**" / "a.nii.gz") == ["a", "deep/a"]
    assert names(scans / "a.nii.gz", scans, scans / "c.nii.gz") == ["a", "b", "c", "deep/a"], "no scan twice"
    monkeypatch.chdir(scans)
    assert names(".") == ["a", "b", "c", "deep/a"]
    save(tmp_path / "odd [1]" / "x.nii.gz")
    assert names(tmp_path / "odd [1]") == ["x"]


def test_results_and_hidden_files_are_no_scans(done):
    scans, out = done
    save(scans / ".hidden.nii.gz")
    out.rename(scans / "results")
    assert names(scans, out=str(scans / "results")) == ["a", "b"]
    # Of an earlier run with another folder, only what has a report is known to be no scan.
    save(scans / "x_labels.nii.gz")
    found, notes = find_scans([scans], Path("/nowhere/out"))
    assert [scan.name for scan in found] == ["a", "b", "x_labels"]
    assert "2 files" in notes[0] and "results/a_labels.nii.gz" in notes[0]


@pytest.mark.parametrize(
    ("sources", "out", "message"),
    [
        (["none.nii.gz"], "out", "does not exist"),
        (["*.nii"], "out", "no file fits"),
        (["empty"], "out", "no scans in"),
        (["scans/a.nii.gz", "scans/b.nii.gz"], "scans", "lies in the output folder"),
        (["twice"], "out", "would have the same result"),
        (["scans"], "out.nii.gz", "expected a folder for several scans"),
        (["scans", "--overlay", "x.png"], "out", "go with one scan and -o FILE"),
        (["scans/a.nii.gz", "--skip-existing"], "out.nii.gz", "goes with a folder of results"),
        (["scans"], "file", "is a file, expected a folder"),
    ],
)
def test_what_cannot_be_done_is_told_before_the_work(sources, out, message, tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("scans/a.nii.gz", "scans/b.nii.gz", "twice/a.nii", "twice/a.nii.gz"):
        save(tmp_path / name)
    before = all_files(tmp_path)
    if sources == ["scans"] and out == "out.nii.gz":
        sources = ["scans/a.nii.gz", "scans/b.nii.gz"]
    result = run(*sources, "-o", out, "--model", model)
    assert result.exit_code == 1 and "Traceback" not in result.output
    (line,) = (line for line in result.stderr.splitlines() if line.strip())
    assert line.startswith("error: ") and message in line
    assert all_files(tmp_path) == before


def test_bids_folders_become_derivatives(tmp_path, model):
    bids = tmp_path / "bids"
    wanted = ["sub-01/anat/sub-01_T1w.nii.gz", "sub-02/ses-b/anat/sub-02_ses-b_acq-hr_T1w.nii.gz"]
    for name in (
        *wanted,
        "sub-01/anat/sub-01_T2w.nii.gz",
        "sub-01/func/sub-01_task-rest_bold.nii.gz",
        "sourcedata/x.nii.gz",
    ):
        save(bids / name, len(name))
    (bids / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.8.0"}')
    out = bids / "derivatives" / "binaryformer"
    assert names(bids, bids_suffix="T2w") == ["sub-01_T2w"] and names(bids / "sub-02") == ["sub-02_ses-b_acq-hr_T1w"]
    result = run(bids, "-o", out, "--model", model)
    assert result.exit_code == 0, result.output
    stems = ["sub-01/anat/sub-01_dseg", "sub-02/ses-b/anat/sub-02_ses-b_acq-hr_dseg"]
    figures = ["sub-01/figures/sub-01_dseg.jpg", "sub-02/figures/sub-02_ses-b_acq-hr_dseg.jpg"]
    expected = {f"{stem}{end}" for stem in stems for end in (".nii.gz", ".json")} | set(figures)
    assert all_files(out) == expected | {"volumes.csv", "report.html", "dataset_description.json", "dseg.tsv"}
    description = json.loads((out / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative" and {"Name", "BIDSVersion", "GeneratedBy"} <= set(description)
    lines = (out / "dseg.tsv").read_text().splitlines()
    assert lines == ["index\tname", *(f"{label}\t{name}" for label, name in NAMES.items())]
    assert list(table(out)) == ["sub-01_T1w", "sub-02_ses-b_acq-hr_T1w"]
    # The next run finds both, and the table stays whole when it is given one subject.
    result = run(bids / "sub-02", "-o", out, "--model", model, "--skip-existing")
    assert "1 skipped" in result.stdout and list(table(out)) == ["sub-01_T1w", "sub-02_ses-b_acq-hr_T1w"]


def test_a_folder_of_dicom_slices_is_one_scan(tmp_path):
    """Told by DICOM's mark in a file; a folder with NIfTI files is a folder of scans."""
    mark = b"\0" * 128 + b"DICM"
    for name in ("p1/IM1", "p1/IM2", "p2/series/IM1.dcm", "mixed/IM1"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(mark)
    save(tmp_path / "in" / "mixed" / "a.nii.gz")
    found, notes = find_scans([tmp_path / "in"], tmp_path / "out")
    assert {scan.name: scan.source.name for scan in found} == {
        "mixed/a": "a.nii.gz", "p1": "p1", "p2/series": "series"
    }  # fmt: skip
    assert notes == [f"1 file in '{tmp_path / 'in'}' not segmented (mixed/IM1)"]
    assert names(tmp_path / "in" / "p1") == ["p1"]
