"""`evaluate.py inpainting` on small heads with a tiny random checkpoint: its rows, figures, references and files."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner
from vq_cases import save_checkpoint

from hf_binaryformer.commands import evaluate, evaluate_inpainting

SHAPE = (32, 40, 26)
AFFINE = np.diag([1.2, 1.1, 1.0, 1.0])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny-vq")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four noisy heads, two for training."""
    root = tmp_path_factory.mktemp("heads")
    (root / "images").mkdir()
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij"))
    rows = []
    for number, split in enumerate(("train", "train", "test", "test")):
        noise = np.random.default_rng(number).integers(300, 900, SHAPE)
        image = nib.Nifti1Image(np.where((grid**2).sum(0) < 0.8, noise, 0).astype(np.int16), AFFINE)
        path = f"images/head{number}.nii.gz"
        nib.save(image, root / path)
        rows.append({"case": f"head{number}", "group": str(number), "split": split, "image": path, "label": path})
    (root / "manifest.json").write_text(json.dumps({"label_names": {"0": "background"}, "cases": rows}))
    return root


def run(*arguments) -> str:
    result = CliRunner().invoke(evaluate.app, ["inpainting", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_rows_figures_and_files(checkpoint, folder, tmp_path):
    shown = run(
        *("--data", folder, "--model", checkpoint, "--split", "test", "--hole-size", 12, "--seeds", 2, "--steps", 3),
        *("--atlas", folder, "--report", tmp_path / "r.json", "--table", tmp_path / "t.md"),
    )
    report = json.loads((tmp_path / "r.json").read_text())
    simple = ["zero fill", "mean fill", "mirror fill", "atlas fill"]
    rows = ["model", "model, mean of the seeds", "random tokens", *simple, "oracle tokens"]
    original, reconstruction = report["against"]["original"], report["against"]["reconstruction"]
    assert list(original) == rows and list(reconstruction) == rows[:-1]
    assert report["volumes"] == 2 and [case["case"] for case in report["cases"]] == ["head2.nii.gz", "head3.nii.gz"]
    assert {row: original[row]["psnr_hole"]["n"] for row in ("model", "random tokens", "mean fill")} == {
        "model": 4,
        "random tokens": 4,
        "mean fill": 2,
    }
    # The mean over volumes and seeds is that of the cases' numbers.
    each = [score["mae_hole"] for case in report["cases"] for score in case["scores"]["original"]["model"]]
    assert len(each) == 4 and original["model"]["mae_hole"]["mean"] == pytest.approx(np.mean(each))
    assert original["model"]["mae_hole"]["sd"] == pytest.approx(statistics.stdev(each))
    # Uniform noise of 300 to 900: nothing beats the mean, and its error is the deviation of the noise.
    scale = 900 - 3
    assert original["mean fill"]["psnr_hole"]["mean"] == pytest.approx(-20 * np.log10(600 / 12**0.5 / scale), abs=0.3)
    assert original["mean fill"]["psnr_hole"]["mean"] > original["mirror fill"]["psnr_hole"]["mean"]
    assert original["mean fill"]["psnr_object"]["mean"] > original["mean fill"]["psnr_hole"]["mean"]
    assert report["seconds_per_sample"] > 0 and report["hole"] == "ball of 12 mm"
    table = (tmp_path / "t.md").read_text()
    assert table.strip() == shown.strip()
    assert f"| mean fill | {original['mean fill']['psnr_hole']['mean']:.2f} ± " in table


def test_mask_file_and_one_volume(checkpoint, folder, tmp_path):
    source = folder / "images" / "head3.nii.gz"
    hole = np.zeros(SHAPE, np.uint8)
    hole[10:14, 15:20, 10:14] = 1
    nib.save(nib.Nifti1Image(hole, AFFINE), tmp_path / "m.nii.gz")
    options = ("--model", checkpoint, "--mask", tmp_path / "m.nii.gz", "--seeds", 1, "--steps", 2)
    run("--data", source, *options, "--report", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["cases"][0]["hole_voxels"] == hole.sum() and report["volumes"] == 1
    again = tmp_path / "again.json"
    run("--data", source, *options, "--report", again)
    assert json.loads(again.read_text())["against"] == report["against"]


def test_atlas_is_the_mean_of_the_training_volumes(checkpoint, folder):
    import hf_binaryformer as bf

    pipeline = bf.BinaryVQInpaintPipeline.from_pretrained(checkpoint)
    atlas = evaluate_inpainting.atlas_volume(pipeline, folder)
    placed = []
    for number in (0, 1):
        array = np.asarray(nib.load(folder / "images" / f"head{number}.nii.gz").dataobj, dtype=np.float32)
        case = pipeline.prepare(array, np.zeros(SHAPE, dtype=bool), AFFINE)
        placed.append(case.to_network(array))
    np.testing.assert_allclose(atlas, np.mean(placed, 0), atol=1e-5)
    assert atlas.max() > 0.5


def test_split_without_volumes(checkpoint, folder):
    options = ["--data", str(folder), "--model", str(checkpoint), "--split", "validation"]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(evaluate.app, ["inpainting", *options])
    assert result.exit_code == 2 and "no volumes in the split 'validation'" in result.output
