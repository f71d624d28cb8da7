"""`binaryformer segment IN... -o FOLDER`: many scans in one run, some broken, some done already."""

from __future__ import annotations

import base64
import gc
import io
import json
import re
import weakref
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from scan_cases import NAMES, all_files, checkpoint, results, run, save, table

from hf_binaryformer.commands import many_scans
from hf_binaryformer.pipelines import segmentation, segmentation_report
from hf_binaryformer.pipelines.precision import fast_format


def test_one_broken_scan_does_not_stop_the_rest(scans, tmp_path, model):
    out = tmp_path / "out"
    (scans / "notes.docx").write_text("x")
    result = run(scans, "-o", out, "--model", model)
    assert result.exit_code == 1, result.output
    assert all_files(out) == results("a", "c", "deep/a") | {"volumes.csv", "report.html"}
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert line.startswith("error: b: ") and "truncated or damaged" in line and "Traceback" not in result.output
    assert "3 segmented, 0 skipped, 1 failed" in result.stdout
    assert f"note: 1 file in '{scans}' not segmented (notes.docx)" in result.stderr
    assert all_files(scans) == {"a.nii.gz", "b.nii.gz", "c.nii.gz", "deep/a.nii.gz", "notes.docx"}


def test_csv_has_what_the_label_volumes_hold(scans, tmp_path, model):
    (scans / "b.nii.gz").unlink()
    out = tmp_path / "out"
    assert run(scans, "-o", out, "--model", model).exit_code == 0
    rows = table(out)
    assert list(rows) == ["a", "c", "deep/a"]
    for name, row in rows.items():
        labels = np.asarray(nib.load(out / f"{name}_labels.nii.gz").dataobj)
        assert len(np.unique(labels)) > 2
        for label, structure in list(NAMES.items())[1:]:
            # 2 mm voxels have 8 mm³.
            assert float(row[f"{structure} ml"]) == pytest.approx((labels == label).sum() * 0.008, abs=6e-4)
        report = json.loads((out / f"{name}_labels.json").read_text())
        groups = {g["name"]: g["score"] for g in report["quality"]["groups"]}
        assert set(groups) == {"core", "shell <b>"}
        for group, score in groups.items():
            assert row[f"quality {group}"] == ("" if score is None else f"{score:.4f}")
        assert row["quality"] == f"{report['quality']['score']:.4f}"
        assert row["input"] == str(scans / f"{name}.nii.gz") and row["intracranial ml"] == ""
        assert row["warnings"] == " | ".join(report["notes"])


def test_labels_are_those_of_one_scan_at_a_time(scans, tmp_path, model):
    (scans / "b.nii.gz").unlink()
    out = tmp_path / "out"
    assert run(scans, "-o", out, "--model", model).exit_code == 0
    for name in ("a", "deep/a"):
        assert run(scans / f"{name}.nii.gz", "-o", tmp_path / "one.nii.gz", "--model", model).exit_code == 0
        alone, among = nib.load(tmp_path / "one.nii.gz"), nib.load(out / f"{name}_labels.nii.gz")
        np.testing.assert_array_equal(np.asarray(alone.dataobj), np.asarray(among.dataobj))
        np.testing.assert_array_equal(alone.affine, among.affine)


def test_finished_scans_are_skipped(done, model, worked):
    scans, out = done
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    result = run(scans, "-o", out, "--model", model, "--skip-existing")
    assert result.exit_code == 0 and worked == [] and "0 segmented, 2 skipped, 0 failed" in result.stdout
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    save(scans / "c.nii.gz", 5)
    assert run(scans, "-o", out, "--model", model, "--skip-existing").exit_code == 0
    assert worked == ["c.nii.gz"] and list(table(out)) == ["a", "b", "c"]
    worked.clear()
    assert run(scans, "-o", out, "--model", model).exit_code == 0
    assert worked == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda scans, out: truncate(out / "a_labels.nii.gz"),
        lambda scans, out: (out / "a_labels.nii.gz").unlink(),
        lambda scans, out: (out / "a_labels.jpg").unlink(),
        lambda scans, out: truncate(out / "a_labels.json"),
        lambda scans, out: (out / "a_labels.json").write_text("[]"),
        lambda scans, out: save(scans / "a.nii.gz", 9),
    ],
    ids=["labels cut", "no labels", "no picture", "report cut", "another report", "another scan"],
)
def test_half_a_result_is_not_taken_for_done(done, model, worked, spoil):
    scans, out = done
    spoil(scans, out)
    result = run(scans, "-o", out, "--model", model, "--skip-existing")
    assert result.exit_code == 0, result.output
    assert worked == ["a.nii.gz"] and all_files(out) == results("a", "b") | {"volumes.csv", "report.html"}
    worked.clear()
    assert run(scans, "-o", out, "--model", model, "--skip-existing").exit_code == 0 and worked == []


@pytest.mark.parametrize(
    "options",
    [
        ["--views", "all"],
        ["--mirror"],
        ["--keep-largest"],
        ["--head-only"],
        ["--dtype", "NOT AUTOMATIC"],
        ["--model", "OTHER"],
    ],
    ids=lambda options: options[0],
)
def test_results_of_other_settings_are_not_taken_for_done(done, tmp_path, model, worked, options):
    scans, out = done
    other = checkpoint(tmp_path / "tiny-random", seed=1)  # of the same name
    not_automatic = "bfloat16" if fast_format("cpu") == torch.float32 else "float32"
    options = [{"OTHER": str(other), "NOT AUTOMATIC": not_automatic}.get(o, o) for o in options]
    assert run(scans, "-o", out, "--model", model, "--skip-existing", *options).exit_code == 0
    assert worked == ["a.nii.gz", "b.nii.gz"]
    # What the model does anyway may be asked for by name.
    worked.clear()
    asked = [*options, *([] if "--views" in options else ["--views", "coronal"])]
    assert run(scans, "-o", out, "--model", model, "--skip-existing", *asked).exit_code == 0 and worked == []


def test_the_table_has_one_kind_of_results_only(done, model):
    scans, out = done
    (scans / "b.nii.gz").unlink()
    assert run(scans, "-o", out, "--model", model, "--keep-largest").exit_code == 0
    assert list(table(out)) == ["a"]


def test_labels_corrected_by_hand_are_kept(done, model, worked):
    scans, out = done
    image = nib.load(out / "a_labels.nii.gz")
    corrected = np.asarray(image.dataobj).copy()
    corrected[0] = 1
    nib.save(nib.Nifti1Image(corrected, image.affine), out / "a_labels.nii.gz")
    content = (out / "a_labels.nii.gz").read_bytes()
    result = run(scans, "-o", out, "--model", model, "--skip-existing")
    assert result.exit_code == 1 and "was changed after it was written" in result.stderr and worked == []
    assert (out / "a_labels.nii.gz").read_bytes() == content and list(table(out)) == ["b"]


def test_results_of_another_scan_are_not_overwritten(tmp_path, model):
    out = tmp_path / "out"
    assert run(save(tmp_path / "s1" / "T1.nii.gz", 1), "-o", out, "--model", model).exit_code == 1 - 1, (
        "one scan, a folder"
    )
    content = (out / "T1_labels.nii.gz").read_bytes()
    result = run(save(tmp_path / "s2" / "T1.nii.gz", 2), "-o", out, "--model", model)
    assert result.exit_code == 1 and "is the report of another scan" in result.stderr
    assert (out / "T1_labels.nii.gz").read_bytes() == content
    # Moved elsewhere, a scan is still the same.
    (tmp_path / "s1").rename(tmp_path / "s3")
    result = run(tmp_path / "s3" / "T1.nii.gz", "-o", out, "--model", model, "--skip-existing")
    assert result.exit_code == 0 and "1 skipped" in result.stdout
    # Together, they have names of their own.
    assert run(tmp_path / "s3", tmp_path / "s2", "-o", tmp_path / "both", "--model", model).exit_code == 0
    assert results("s3/T1", "s2/T1") < all_files(tmp_path / "both")


@pytest.mark.parametrize("last", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_leaves_a_right_table(scans, tmp_path, model, monkeypatch, last):
    """Ctrl-C in the second scan; or no space for it, after which no other is tried."""
    (scans / "b.nii.gz").unlink()
    out, save_labels, calls = tmp_path / "out", segmentation_report.write_labels, []

    def stop(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise last(28, "No space left on device")
        return save_labels(*arguments, **options)

    monkeypatch.setattr(segmentation_report, "write_labels", stop)
    result = run(scans, "-o", out, "--model", model)
    assert result.exit_code != 0 and (last is KeyboardInterrupt or "no space left" in result.stderr)
    assert all_files(out) == results("a") | {"volumes.csv", "report.html"}
    assert list(table(out)) == ["a"]


def test_a_killed_run_has_written_the_table_after_each_scan(scans, tmp_path, model, monkeypatch):
    (scans / "b.nii.gz").unlink()
    seen = []
    monkeypatch.setattr(many_scans, "write_page", lambda *arguments: None)
    many_scans.segment_scans(
        [scans],
        tmp_path / "out",
        model=str(model),
        finished=lambda name, _: seen.append((name, list(table(tmp_path / "out")))),
    )
    assert seen == [("a", ["a"]), ("c", ["a", "c"]), ("deep/a", ["a", "c", "deep/a"])]


def test_a_mistake_of_ours_in_one_scan_does_not_cost_the_night(done, model, monkeypatch):
    scans, out = done
    quality = segmentation.quality_report
    calls = []

    def sometimes(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise KeyError("a bug")
        return quality(*arguments)

    monkeypatch.setattr(segmentation, "quality_report", sometimes)
    result = run(scans, "-o", out, "--model", model)
    assert result.exit_code == 1 and "error: a: KeyError: 'a bug'" in result.stderr and "1 segmented" in result.stdout


class Page(HTMLParser):
    """Tags, addresses and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data):
        self.texts.append(data.strip())


def test_the_page_is_one_file_with_a_picture_of_each_scan(scans, tmp_path, model, monkeypatch):
    quality, scores = segmentation.quality_report, iter([0.9, 0.2, 0.9])
    # Scores of an untrained network depend on the processor. These are in no order, and two are equal.
    monkeypatch.setattr(segmentation, "quality_report", lambda *a: quality(*a) | {"score": next(scores)})
    (scans / "<script>x.nii.gz").write_bytes(b"broken")
    out = tmp_path / "out"
    assert run(scans, "-o", out, "--model", model).exit_code == 1
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("article") == page.tags.count("img") == 3
    assert (
        not {"script", "link", "iframe", "object", "b>"} & set(page.tags)
        and "url(" not in text
        and "@import" not in text
    )
    assert len(page.addresses) == 3
    for address in page.addresses:
        kind, _, content = address.partition(",")
        assert kind == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
            assert picture.format == "JPEG" and 100 < picture.width < 1000
    assert any(t.startswith("<script>x: ") for t in page.texts) and any(t.startswith("b: ") for t in page.texts)
    assert "shell <b>" in page.texts
    # The worst comes first, and the order by name is there too.
    rows = table(out)
    order = [t for t in page.texts if t in rows]
    assert order == ["c", "a", "deep/a"]
    places = [int(n) for n in re.findall(r"--by-name:(\d+)", text)]
    assert [sorted(rows)[n] for n in places] == order
    assert all(f"{float(row['shell <b> ml']):,.1f} ml" in page.texts for row in rows.values())


def test_nothing_is_kept_of_a_scan(scans, tmp_path, model, monkeypatch):
    """Voxels of one scan are gone before the next is read; the network is loaded once."""
    (scans / "b.nii.gz").unlink()
    alive, loaded, most = [], [], []
    call, load = (
        segmentation.VolumeSegmentationPipeline.__call__,
        segmentation.VolumeSegmentationPipeline.from_pretrained,
    )

    def watched(self, volume, **options):
        gc.collect()
        most.append(sum(one() is not None for one in alive))
        result = call(self, volume, **options)
        alive.extend([weakref.ref(volume), weakref.ref(result)])
        return result

    monkeypatch.setattr(segmentation.VolumeSegmentationPipeline, "__call__", watched)
    monkeypatch.setattr(
        segmentation.VolumeSegmentationPipeline, "from_pretrained", lambda *a, **k: loaded.append(1) or load(*a, **k)
    )
    assert run(scans, "-o", tmp_path / "out", "--model", model).exit_code == 0
    assert most == [0, 0, 0] and loaded == [1]


def test_progress_goes_from_scan_to_scan(scans, tmp_path, model):
    told = []
    many_scans.segment_scans(
        [scans], tmp_path / "out", model=str(model), progress=lambda done, total: told.append((done, total))
    )
    assert {total for _, total in told} == {4}
    steps = [done for done, _ in told]
    assert steps == sorted(steps) and steps[-1] == 4 and {1, 2, 3} < set(steps) and any(0 < s < 1 for s in steps)


def test_a_planted_report_leads_nowhere(done, model, tmp_path):
    """A report in the output folder may be anyone's: its fields name no file that the page would show."""
    scans, out = done
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    report = json.loads((out / "a_labels.json").read_text())
    report |= {"picture": "../secret.jpg", "scan": "../../x", "notes": 3}
    (out / "a_labels.json").write_text(json.dumps(report))
    assert run(scans / "b.nii.gz", "-o", out, "--model", model).exit_code == 0
    assert list(table(out)) == ["b"]
    assert base64.b64encode(b"secret").decode() not in (out / "report.html").read_text()
