"""The page's work without a browser: what comes out, what is refused, what is left."""

from __future__ import annotations

import base64
import csv
import gzip
import json
import os
import re
import shutil
import threading
import time
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scan_cases import NAMES, SHAPE, run, save
from typer.testing import CliRunner

from hf_binaryformer import cli
from hf_binaryformer.app.handlers import CANCELLED, Handlers
from hf_binaryformer.app.holes import hole_mask
from hf_binaryformer.app.limits import MB, Limits, clean_name
from hf_binaryformer.app.scans import sweep
from hf_binaryformer.pipelines.volumes import read_volume

FILLING = (1, 3, 0.2, 0, 0)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def quiet(done: int, total: int) -> None:
    assert 0 < done <= total


def segment(handlers: Handlers, session: str = "one", progress=quiet) -> dict:
    handlers.announce(session, "segment")
    return handlers.segment(session, progress, "model", False)


def inpaint(handlers: Handlers, session: str = "one", progress=quiet, filling=FILLING) -> dict:
    handlers.announce(session, "inpaint")
    return handlers.inpaint(session, progress, *filling)


def fetched(handlers: Handlers, page: dict) -> dict[str, Path]:
    """Files behind the links of a page, by their names."""
    links = re.findall(r'href="results/([\w-]+)/([^"]+)"', page["files"])
    return {name: handlers.workspaces.find(token) for token, name in links}


def test_labels_are_those_of_the_command(handlers, networks, scan, tmp_path):
    own = tmp_path / "head_one.nii.gz"
    shutil.copy(scan, own)
    shown = handlers.upload("one", str(scan))
    assert shown["status"] == "" and "head_one.nii.gz: 14 x 12 x 10 voxels of 2 x 2 x 2 mm" in shown["facts"]
    assert not scan.parent.exists(), "the upload itself is gone"
    found = fetched(handlers, segment(handlers))
    expected = tmp_path / "labels.nii.gz"
    result = run(own, "-o", expected, "--model", networks.model, "--overlay", tmp_path / "labels.png")
    assert result.exit_code == 0, result.output
    assert found["head_one_labels.nii.gz"].read_bytes() == expected.read_bytes()
    assert found["head_one_labels.png"].read_bytes() == (tmp_path / "labels.png").read_bytes()
    (row,) = csv.DictReader(found["head_one_labels.csv"].read_text(encoding="utf-8").splitlines())
    labels = np.asarray(nib.load(expected).dataobj)
    assert row["input"] == "head_one.nii.gz"
    assert float(row["left core ml"]) == pytest.approx((labels == 1).sum() * 0.008, abs=6e-4)


def test_what_the_page_shows_of_labels(handlers, scan):
    handlers.upload("one", str(scan))
    page = segment(handlers)
    (panel,) = page["scene"]["panels"]
    image, overlay = panel["volumes"]
    assert panel["render"] and image["cal_min"] < image["cal_max"]
    assert overlay["labels"]["I"] == [0, 1, 2, 3] and overlay["labels"]["labels"] == ["", *list(NAMES.values())[1:]]
    assert overlay["labels"]["A"] == [0, 255, 255, 255]
    json.dumps(page["scene"], allow_nan=False)
    assert "shell &lt;b&gt;" in page["result"] and "<b>" not in page["result"]
    assert "quality 0." in page["result"] and "not for clinical use" in page["result"]
    widths = [float(w) for w in re.findall(r"width:([\d.]+)%", page["result"])]
    assert max(widths) == 100 and len(widths) == page["result"].count('class="bf-swatch"')


def test_filled_volume_is_that_of_the_command(handlers, networks, scan, tmp_path):
    own = tmp_path / "head_one.nii.gz"
    shutil.copy(scan, own)
    handlers.upload("one", str(scan))
    middle = [13.0, 11.0, 9.0]
    assert handlers.draw_hole("one", middle, "ellipsoid", 12, 12, 12)["status"] == ""
    page = inpaint(handlers, filling=(2, 3, 0.2, 0, 5))
    found = fetched(handlers, page)
    expected, std = tmp_path / "filled.nii.gz", tmp_path / "std.nii.gz"
    command = ["inpaint", own, "--mask", found["hole.nii.gz"], "-o", expected, "--std-map", std, "--samples", 2]
    command += ["--steps", 3, "--temperature", 0.2, "--seed", 5, "--model", networks.inpaint_model]
    result = CliRunner().invoke(cli.app, [str(part) for part in command])
    assert result.exit_code == 0, result.output
    assert found["head_one_filled.nii.gz"].read_bytes() == expected.read_bytes()
    assert found["head_one_std.nii.gz"].read_bytes() == std.read_bytes()
    titles = [panel["title"] for panel in page["scene"]["panels"]]
    assert [title.partition(",")[0] for title in titles] == ["before", "after", "standard deviation over the samples"]
    hole = np.asarray(nib.load(found["hole.nii.gz"]).dataobj)
    assert f"{hole.sum() * 0.008:,.1f} ml filled" in page["result"] and "Synthetic" in page["result"]


def test_masks_may_be_uploaded(handlers, scan, tmp_path):
    handlers.upload("one", str(scan))
    mask = np.zeros(SHAPE, np.uint8)
    mask[5:8, 5:8, 4:7] = 1
    for name, array, affine, message in (
        ("good.nii.gz", mask, np.diag([2, 2, 2, 1]), ""),
        ("zero.nii.gz", 0 * mask, np.diag([2, 2, 2, 1]), "0 everywhere"),
        ("apart.nii.gz", mask, np.diag([3, 3, 3, 1]), "expected the same grid"),
    ):
        path = tmp_path / "masks" / name
        path.parent.mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(array, affine), path)
        assert message in handlers.upload_hole("one", str(path))["status"] and not path.exists()
    assert inpaint(handlers)["status"] == ""


def test_holes_may_be_drawn(handlers, root, scan):
    """What the viewer sends: a .nii.gz on the scan's grid, in base64; the browser test draws one."""
    assert "scan" in handlers.drawn_hole("one", None)["status"]
    handlers.upload("one", str(scan))
    assert "nothing is drawn yet" in handlers.drawn_hole("one", None)["status"]
    mask = np.zeros(SHAPE, np.uint8)
    empty, mask[5:8, 5:8, 4:7] = mask.copy(), 1
    for array, message in ((empty, "0 everywhere"), (mask, "")):
        content = gzip.compress(nib.Nifti1Image(array, np.diag([2, 2, 2, 1])).to_bytes())
        page = handlers.drawn_hole("one", base64.b64encode(content).decode())
        assert message in page["status"] and ("scene" in page) == (array is mask)
    assert not files(root / "uploads")
    assert "expected" in handlers.drawn_hole("one", base64.b64encode(b"no volume").decode())["status"]
    filled = inpaint(handlers)
    np.testing.assert_array_equal(np.asarray(nib.load(fetched(handlers, filled)["drawing.nii.gz"]).dataobj), mask)


def test_holes_have_the_size_and_place_that_was_asked_for(scan):
    volume = read_volume(scan)
    box = hole_mask(volume, (14, 12, 10), (8, 4, 2), "box")
    assert np.argwhere(box).min(0).tolist() == [5, 5, 5] and np.argwhere(box).max(0).tolist() == [9, 7, 5]
    ball = hole_mask(volume, (14, 12, 10), (8, 8, 8), "ellipsoid")
    distance = np.linalg.norm(np.argwhere(np.ones(SHAPE)) * 2 - (14, 12, 10), axis=1).reshape(SHAPE)
    np.testing.assert_array_equal(ball, distance <= 4)
    with pytest.raises(ValueError, match="holds no voxel of the scan"):
        hole_mask(volume, (200, 0, 0), (8, 8, 8), "box")
    with pytest.raises(ValueError, match="form is 'star'"):
        hole_mask(volume, (14, 12, 10), (8, 8, 8), "star")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("photo.jpg", b"x", "expected .nii, .nii.gz, .zip"),
        ("empty.nii.gz", b"", "is empty"),
        ("text.nii.gz", b"hello", "text.nii.gz is truncated or damaged"),
        ("no.zip", b"hello", "no complete zip"),
        ("big.nii", bytes(2 * MB + 1), "expected at most 2 MB"),
    ],
)
def test_wrong_files_are_told_plainly_and_nothing_stays(handlers, root, tmp_path, name, content, message):
    handlers.limits = Limits(upload_mb=2)
    path = tmp_path / "uploads" / "x" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    page = handlers.upload("one", str(path))
    assert message in page["status"] and 'role="alert"' in page["status"] and "scene" not in page
    assert str(root) not in page["status"]
    assert files(root) == set() and not path.exists()
    assert "choose a scan first" in segment(handlers)["status"]


def test_too_many_voxels_are_refused_before_they_are_unpacked(handlers, root, tmp_path, monkeypatch):
    path = save(tmp_path / "uploads" / "a" / "large.nii.gz")
    handlers.limits = Limits(voxels=100)
    monkeypatch.setattr("hf_binaryformer.app.scans.read_volume", lambda *a, **k: pytest.fail("it was read"))
    assert "shape (14, 12, 10), expected at most" in handlers.upload("one", str(path))["status"]
    assert files(root) == set()


def test_a_new_scan_takes_the_place_of_the_old_one(handlers, root, scan, tmp_path):
    handlers.upload("one", str(scan))
    page = segment(handlers)
    links = fetched(handlers, page)
    handlers.upload("one", str(save(tmp_path / "uploads" / "b" / "other.nii.gz", 1)))
    assert {name.rpartition("/")[2] for name in files(root)} == {"other.nii.gz"}
    assert not any(path.exists() for path in links.values())
    assert set(fetched(handlers, page).values()) == {None}


def test_visitors_do_not_see_each_other(handlers, root, scan, tmp_path):
    handlers.upload("one", str(scan))
    handlers.upload("two", str(save(tmp_path / "uploads" / "b" / "head one.nii.gz", 7)))
    one, two = segment(handlers, "one"), segment(handlers, "two")
    files_of = [fetched(handlers, page) for page in (one, two)]
    assert files_of[0]["head_one_labels.nii.gz"].read_bytes() != files_of[1]["head_one_labels.nii.gz"].read_bytes()
    assert not {path.parents[1] for path in files_of[0].values()} & {path.parents[1] for path in files_of[1].values()}
    handlers.leave("one")
    assert set(fetched(handlers, one).values()) == {None}
    assert all(path.is_file() for path in fetched(handlers, two).values())
    handlers.leave("two")
    assert list(root.iterdir()) == []


def test_two_at_once_get_their_own_labels(handlers, scan, tmp_path):
    for seed, name in enumerate("ab"):
        handlers.upload(name, str(save(tmp_path / "uploads" / name / "scan.nii.gz", seed)))
    alone = {name: fetched(handlers, segment(handlers, name))["scan_labels.nii.gz"].read_bytes() for name in "ab"}
    together: dict[str, bytes] = {}

    def work(name: str) -> None:
        together[name] = fetched(handlers, segment(handlers, name))["scan_labels.nii.gz"].read_bytes()

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert together == alone and alone["a"] != alone["b"]


@pytest.mark.parametrize("end", ["cancel", "leave", "another scan"])
def test_a_job_stops_and_leaves_nothing(handlers, root, scan, tmp_path, end):
    handlers.upload("one", str(scan))
    other = save(tmp_path / "uploads" / "b" / "other.nii.gz", 1)
    steps = []

    def stop(done: int, total: int) -> None:
        steps.append(done)
        {
            "cancel": lambda: handlers.cancel("one"),
            "leave": lambda: handlers.leave("one"),
            "another scan": lambda: handlers.upload("one", str(other)),
        }[end]()

    page = segment(handlers, progress=stop)
    assert len(steps) == 1 and CANCELLED in page["status"] and set(page) == {"status"}
    kept = {"cancel": {"head_one.nii.gz"}, "leave": set(), "another scan": {"other.nii.gz"}}[end]
    assert {name.rpartition("/")[2] for name in files(root)} == kept
    assert not list(root.glob("*/segment-*"))
    if end != "leave":
        assert segment(handlers)["status"] == "", "the next job runs"


def test_the_end_waits_for_a_running_job(handlers, root, scan):
    handlers.upload("one", str(scan))
    running, pages = threading.Event(), []

    def slow(done: int, total: int) -> None:
        running.set()
        time.sleep(1)

    thread = threading.Thread(target=lambda: pages.append(segment(handlers, progress=slow)))
    thread.start()
    assert running.wait(120)
    handlers.workspaces.close_all(120)
    thread.join(5)
    assert not thread.is_alive() and CANCELLED in pages[0]["status"] and list(root.iterdir()) == []


def test_a_job_that_waits_can_be_cancelled(handlers, root, scan):
    handlers.upload("one", str(scan))
    handlers.announce("one", "segment")
    handlers.cancel("one")
    page = handlers.segment("one", lambda *a: pytest.fail("it ran"), "model", False)
    assert CANCELLED in page["status"] and not list(root.glob("*/segment-*"))


def test_inpainting_can_be_cancelled(handlers, root, scan):
    handlers.upload("one", str(scan))
    handlers.draw_hole("one", [13.0, 11.0, 9.0], "box", 12, 12, 12)
    page = inpaint(handlers, progress=lambda *a: handlers.cancel("one"))
    assert CANCELLED in page["status"] and not list(root.glob("*/inpaint-*"))


def test_what_is_missing_is_told(handlers, scan):
    assert "choose a scan first" in handlers.draw_hole("one", [0, 0, 0], "box", 9, 9, 9)["status"]
    handlers.upload("one", str(scan))
    assert "there is no hole yet" in inpaint(handlers)["status"]
    assert "shows no scan yet" in handlers.draw_hole("one", None, "box", 9, 9, 9)["status"]
    assert handlers.upload("one", None) == {}


def test_errors_that_nobody_foresaw_keep_their_details_from_visitors(handlers, scan, monkeypatch, capsys):
    handlers.upload("one", str(scan))
    monkeypatch.setattr("hf_binaryformer.commands.jobs.segment_file", lambda *a, **k: {}["secret"])
    page = segment(handlers)
    assert "this failed (KeyError)" in page["status"] and "secret" not in page["status"]
    assert "KeyError: 'secret'" in capsys.readouterr().err


def test_a_series_comes_as_a_zip(handlers, root, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    path = tmp_path / "uploads" / "z" / "series 7.zip"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(pydicom.data.get_testdata_file("MR_small.dcm"), "deep/IM1")
    page = handlers.upload("one", str(path))
    assert "series_7: 64 x 64 x 1 voxels" in page["facts"], page
    (image,) = page["scene"]["panels"][0]["volumes"]
    shown = handlers.workspaces.find(image["url"].split("/")[1])
    assert nib.load(shown).shape == (64, 64, 1)
    assert not list(root.rglob("*.zip"))
    handlers.leave("one")
    assert list(root.iterdir()) == []


def test_the_example_is_a_scan(handlers):
    pytest.importorskip("nilearn")
    page = handlers.example("one")
    assert "mni152.nii.gz: 197 x 233 x 189 voxels of 1 x 1 x 1 mm" in page["facts"]


def test_broken_off_uploads_are_swept(tmp_path):
    (tmp_path / "abc").mkdir()
    old, new = tmp_path / "abc" / "old", tmp_path / "new"
    for path in (old, new):
        path.write_bytes(b"x")
    sweep(tmp_path, seconds=3600)
    assert old.exists() and new.exists()
    os.utime(old, (0, 0))
    sweep(tmp_path, seconds=3600)
    assert not old.parent.exists() and new.exists()


def test_names_are_made_harmless():
    assert clean_name("../../etc/päss wd.nii.gz") == "p_ss_wd.nii.gz"
    assert clean_name('<img src="x">.nii') == "img_src_x_.nii"
    assert clean_name(".hidden.zip") == "hidden.zip" and clean_name("..") == "scan"
    assert len(clean_name("a" * 500 + ".nii.gz")) == 80 and clean_name("a" * 500 + ".nii.gz").endswith("a.nii.gz")
