"""The demo on the real MNI152 template, with random weights in the place of the packaged ones."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner
from vq_cases import save_checkpoint

import hf_binaryformer as bf
from hf_binaryformer import cli
from hf_binaryformer.commands import demo, generation_jobs, jobs
from hf_binaryformer.data.label_schemes import read_label_names
from hf_binaryformer.modeling import pretrained
from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.image_processing import BinaryFormerImageProcessor
from hf_binaryformer.modeling.networks import BinaryFormerForSemanticSegmentation

# Label numbers of binaryformer-tiny-brain and of FreeSurfer, written out once more.
WHITE, GREY = {1, 4}, {2, 5, 6, 7, 8, 9, 12, 13}
FREESURFER_WHITE, FREESURFER_GREY = {2, 41, 7, 46}, {3, 42, 8, 47, 10, 49, 11, 50, 12, 51, 13, 52, 17, 53, 18, 54}


def tissue_maps() -> tuple[np.ndarray, np.ndarray]:
    datasets = pytest.importorskip("nilearn.datasets")
    white, grey = datasets.load_mni152_wm_template(resolution=1), datasets.load_mni152_gm_template(resolution=1)
    return white.get_fdata() > 0.5, grey.get_fdata() > 0.5


@pytest.fixture
def random_checkpoints(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "checkpoints" / jobs.DEFAULT_MODEL
    torch.manual_seed(0)
    config = BinaryFormerConfig(
        image_size=64,
        num_channels=1,
        hidden_size=48,
        num_heads=3,
        value_head_dim=4,
        num_hidden_layers=1,
        decoder_hidden_size=32,
        attention_type="sign",
        id2label=bf.from_pretrained("binaryformer-tiny-brain").config.id2label,
    )
    BinaryFormerForSemanticSegmentation(config).save_pretrained(folder)
    BinaryFormerImageProcessor(num_slices=1, spacing=(4, 4, 4), image_size=(64, 64)).save_pretrained(folder)
    # 20 x 24 x 16 voxels of 10 mm hold a brain.
    save_checkpoint(folder.parent / generation_jobs.DEFAULT_MODEL, spacing=(10.0, 10.0, 10.0))
    monkeypatch.setattr(pretrained, "PACKAGED", folder.parent)
    monkeypatch.setattr(demo, "STEPS", 3)


def test_demo_writes_its_files_and_its_figures(tmp_path, random_checkpoints):
    white, grey = tissue_maps()
    out = tmp_path / "a" / "demo"
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["demo", "--out", str(out)])
    assert result.exit_code == 0, result.output
    files = {"mni152.nii.gz", "segmentation.nii.gz", "segmentation.png", "report.json"}
    files |= {"inpainting.nii.gz", "inpainting.png", "inpainting_hole.nii.gz"}
    assert {path.name for path in out.iterdir()} == files

    brain, labels = nib.load(out / "mni152.nii.gz"), nib.load(out / "segmentation.nii.gz")
    assert brain.shape == labels.shape == (197, 233, 189)
    np.testing.assert_array_equal(labels.affine, brain.affine)
    assert brain.get_fdata().max() == pytest.approx(1) and brain.get_fdata().min() == 0
    report = json.loads((out / "report.json").read_text())
    assert set(report["files"]) == files
    for tissue, numbers, mask in (("white matter", WHITE, white), ("grey matter", GREY, grey)):
        found = np.isin(np.asarray(labels.dataobj), list(numbers))
        dice = 2 * (found & mask).sum() / (found.sum() + mask.sum())
        assert 0 < dice < 1
        assert report["segmentation"]["dice"][tissue] == pytest.approx(dice, abs=1e-5)
        assert f"{dice:.3f}" in result.stdout
    assert f"{report['segmentation']['seconds']:.1f} s" in result.stdout

    hole = np.asarray(nib.load(out / "inpainting_hole.nii.gz").dataobj) > 0
    samples, truth = np.asarray(nib.load(out / "inpainting.nii.gz").dataobj), np.asarray(brain.dataobj, np.float32)
    assert hole.sum() / 1000 == pytest.approx(np.pi / 6 * 4.5**3, rel=0.01)  # a ball of 45 mm, in ml
    # It crosses the midline, which is where the template's affine puts x = 0.
    x = np.argwhere(hole)[:, 0] + brain.affine[0, 3]
    assert x.min() < -15 and x.max() > 15
    scale = np.percentile(truth[truth > 0], 99.5)
    for sample, psnr in zip(np.moveaxis(samples, -1, 0), report["inpainting"]["psnr_hole"]["samples"], strict=True):
        np.testing.assert_array_equal(sample[~hole], truth[~hole])
        error = np.clip(sample[hole] / scale, 0, 1.5) - np.clip(truth[hole] / scale, 0, 1.5)
        assert psnr == pytest.approx(-10 * np.log10((error**2).mean()), abs=0.02)
    fills = {"model", "random tokens", "oracle tokens", "zero", "mean", "mirror", "mean of samples", "samples"}
    assert set(report["inpainting"]["psnr_hole"]) == fills
    assert f"{report['inpainting']['psnr_hole']['mirror']:.2f}" in result.stdout
    assert report["inpainting"]["seconds"] > 0
    with Image.open(out / "inpainting.png") as picture:
        assert min(picture.size) > 500


@pytest.mark.parametrize("scheme", ["tiny-brain", "freesurfer"])
def test_perfect_labels_get_a_perfect_dice(tmp_path, monkeypatch, scheme):
    white, grey = tissue_maps()
    rng = np.random.default_rng(0)
    if scheme == "freesurfer":
        names = read_label_names(Path("freesurfer"))
        numbers = FREESURFER_WHITE, FREESURFER_GREY
    else:
        names = {int(i): name for i, name in bf.from_pretrained("binaryformer-tiny-brain").config.id2label.items()}
        numbers = WHITE, GREY
    labels = np.where(white, rng.choice(sorted(numbers[0]), white.shape), 0)
    labels = np.where(grey, rng.choice(sorted(numbers[1]), grey.shape), labels)

    def perfect(source: Path, output: Path, **options) -> dict:
        assert options["model"] == "any"
        nib.save(nib.Nifti1Image(labels.astype(np.uint8), nib.load(source).affine), output)
        return {"labels": [{"label": number, "name": name} for number, name in names.items()]}

    monkeypatch.setattr(jobs, "segment_file", perfect)
    monkeypatch.setattr(demo, "inpainting_job", lambda *a: {})
    assert demo.run_demo(tmp_path, model="any")["segmentation"]["dice"] == {"white matter": 1.0, "grey matter": 1.0}


def test_missing_nilearn_names_the_extra(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without_nilearn(name, *args, **kwargs):
        if name.startswith("nilearn"):
            raise ModuleNotFoundError(f"No module named '{name}'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_nilearn)
    result = CliRunner().invoke(cli.app, ["demo", "--out", str(tmp_path / "demo")])
    assert result.exit_code == 1
    assert 'pip install "hf-binaryformer[demo]"' in result.stderr


def test_unusable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(cli.app, ["demo", "--out", str(tmp_path / "file" / "demo")])
    assert result.exit_code == 1 and result.stderr.startswith("error: ")
