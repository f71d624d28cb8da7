"""Tasks of ``transformers.pipeline``: labels of a picture, and of a volume as the command line gives them."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline
from typer.testing import CliRunner

import hf_binaryformer as bf
from hf_binaryformer.cli import app

LABELS = {0: "background", 1: "shell", 2: "core"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(3)
    config = bf.BinaryFormerConfig(
        image_size=32,
        hidden_size=24,
        num_heads=2,
        num_hidden_layers=2,
        value_head_dim=4,
        decoder_hidden_size=64,
        attention_type="sign",
        initializer_range=0.2,
        id2label=LABELS,
        label2id={name: label for label, name in LABELS.items()},
    )
    bf.BinaryFormerForSemanticSegmentation(config).save_pretrained(folder)
    bf.BinaryFormerImageProcessor(image_size=(32, 32), spacing=(2.0, 2.0, 2.0)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def scan(tmp_path) -> str:
    i, j, k = np.indices((30, 9, 34)) - np.array([15, 4, 17])[:, None, None, None]
    inside = i**2 / 150 + j**2 / 25 + k**2 / 180 < 1
    array = inside * (100 + np.random.default_rng(0).normal(0, 20, inside.shape))
    # Left-anterior-superior, so that orientation matters.
    nib.save(nib.Nifti1Image(array.astype(np.float32), np.diag([-2.0, 2.0, 2.5, 1.0])), tmp_path / "scan.nii.gz")
    return str(tmp_path / "scan.nii.gz")


def test_a_picture(checkpoint, tmp_path, capfd):
    grey = np.random.default_rng(1).integers(0, 255, (48, 40)).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "slice.png")
    found = pipeline("image-segmentation", model=checkpoint)(str(tmp_path / "slice.png"))
    assert "not supported" not in capfd.readouterr().err
    processor = bf.BinaryFormerImageProcessor.from_pretrained(checkpoint)
    with torch.no_grad():
        outputs = bf.from_pretrained(checkpoint)(processor(grey)["pixel_values"])
    (labels,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(48, 40)])
    assert len(found) > 1 and sum(np.asarray(one["mask"], dtype=bool) for one in found).min() == 1
    for one in found:
        assert one["mask"].size == (40, 48)
        assert np.array_equal(
            np.asarray(one["mask"]) == 255, labels.numpy() == {n: i for i, n in LABELS.items()}[one["label"]]
        )


def test_a_volume_has_the_labels_of_the_command(checkpoint, scan, tmp_path):
    run = pipeline("mri-segmentation", model=checkpoint)
    result = run(scan)
    out = tmp_path / "labels.nii.gz"
    done = CliRunner().invoke(app, ["segment", scan, "-o", str(out), "--model", checkpoint, "--dtype", "float32"])
    assert done.exit_code == 0, done.output
    result.save(tmp_path / "again.nii.gz")
    wanted, again = nib.load(out), nib.load(tmp_path / "again.nii.gz")
    assert len(np.unique(wanted.dataobj)) > 1
    assert np.array_equal(np.asarray(wanted.dataobj), np.asarray(again.dataobj))
    assert np.array_equal(wanted.affine, again.affine) and result.label_names == LABELS


def test_several_volumes_and_options(checkpoint, scan):
    run = pipeline("mri-segmentation", model=checkpoint, views="axial", window_batch_size=1)
    first, second = run([scan, scan])
    assert np.array_equal(first.labels, second.labels) and first.report["views"] == ["axial"]
    kept = run(scan, views="coronal", return_probabilities=True)
    assert kept.report["views"] == ["coronal"] and kept.probabilities.shape == (3, *first.labels.shape)
    assert run(scan).report["views"] == ["axial"]
    with pytest.raises(TypeError, match="no option 'threshold', expected one of return_probabilities"):
        run(scan, threshold=0.5)


def test_saved_and_loaded(checkpoint, scan, tmp_path):
    run = pipeline("mri-segmentation", model=checkpoint)
    run.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    again = pipeline("mri-segmentation", model=str(tmp_path / "saved"))
    assert np.array_equal(again(scan).labels, run(scan).labels)
