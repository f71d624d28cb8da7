"""The paper's recipe on a folder in AMOS's layout, from the download to scores; the scans are toys, the steps are real."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import hf_binaryformer as bf
from hf_binaryformer.commands import prepare
from hf_binaryformer.data.public_data import DATA_SETS
from hf_binaryformer.training import segmentation

PATIENTS = (507, 510, 521, 522, 540, 555, 583, 600)


@pytest.fixture
def download(tmp_path: Path) -> Path:
    """Eight MR scans and one CT scan; each has three organs as bright blocks, stored LPS as AMOS's are."""
    rng = np.random.default_rng(0)
    affine = np.diag([-4.0, -4.0, 6.0, 1.0])
    for number in (12, *PATIENTS):
        labels = np.zeros((40, 32, 4), np.uint8)
        for label, (i, j) in {6: (6, 8), 1: (24, 18), 15: (20, 4)}.items():
            # No two people are alike, or the check for leaks would stop it.
            di, dj = rng.integers(-4, 5, 2)
            labels[i + di : i + di + rng.integers(7, 12), j + dj : j + dj + rng.integers(6, 10), 1:3] = label
        image = rng.normal(100, 10, labels.shape) + 60 * labels
        for folder, array in (("imagesTr", image.astype(np.int16)), ("labelsTr", labels)):
            path = tmp_path / "amos22" / folder / f"amos_{number:04d}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, affine), path)
    return tmp_path / "amos22"


@pytest.fixture
def dino(tmp_path: Path) -> Path:
    """A file in the layout of timm's DINO weights, with random numbers."""
    vit = timm.create_model("vit_small_patch8_224.dino", pretrained=False, num_classes=0)
    generator = torch.Generator().manual_seed(0)
    state = {key: 0.02 * torch.randn(t.shape, generator=generator) for key, t in vit.state_dict().items()}
    save_file(state, tmp_path / "dino.safetensors")
    return tmp_path / "dino.safetensors"


def test_amos_from_the_download_to_scores(download: Path, dino: Path, tmp_path: Path) -> None:
    data, output = tmp_path / "data", tmp_path / "run"
    # Smaller slices, windows and batches; everything else is the project's.
    words = yaml.safe_load((DATA_SETS / "amos.yaml").read_text()) | {"size": [64, 64, None]}
    (tmp_path / "amos.yaml").write_text(yaml.safe_dump(words))
    arguments = ["amos", "--source", download, "--out", data, "--config", tmp_path / "amos.yaml", "--no-shards"]
    result = CliRunner().invoke(prepare.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    manifest = json.loads((data / "manifest.json").read_text())
    assert len(manifest["cases"]) == len(PATIENTS), "MR scans alone"

    smaller = ["train.iterations=2", "train.batch_size=2", "train.mixed_precision=no", "train.workers=0"]
    smaller += ["train.validate_every=null", "processor.image_size=[64, 64]", f"model.timm_checkpoint={dino}"]
    segmentation.main("amos", data, output, resume=False, evaluate="test", stop_after=None, overrides=smaller)

    model = bf.from_pretrained(output / "model")
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_heads, config.value_head_dim) == (384, 12, 6, 16)
    assert config.num_labels == 16 and config.id2label[6] == "liver" and config.id2label[15] == "prostate or uterus"
    # Two steps at a hundredth of the rate leave what was pretrained where it was, and nothing else is like it.
    source, trained = load_file(dino), model.binaryformer.encoder.state_dict()
    one_channel = source["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(trained["patch_embed.proj.weight"], one_channel, rtol=0, atol=1e-4)
    for key in ("blocks.0.mlp.fc1.weight", "blocks.3.mlp.fc2.weight"):
        torch.testing.assert_close(trained[key], source[key], rtol=0, atol=1e-4)
        assert not torch.equal(trained[key], source[key]), "it was trained"
    assert (trained["blocks.4.mlp.fc1.weight"] - source["blocks.4.mlp.fc1.weight"]).abs().max() > 0.01
    scores = json.loads((output / "results.json").read_text())
    tested = [row["case"] for row in manifest["cases"] if row["split"] == "test"]
    assert len(tested) == 2 and {case for case in tested if case in json.dumps(scores["cases"])} == {*tested}
    assert {"network", "prior atlas"} <= set(scores["rows"])
    assert set(scores["rows"]["network"]["labels"]) >= {"liver", "spleen"}

    pipeline = bf.VolumeSegmentationPipeline.from_pretrained(output / "model")
    assert pipeline.processor.target_spacing((1.5, 1.5, 5.0)) == (1.5, 1.5, 5.0), "the scan's own, as in training"
    found = pipeline(download / "imagesTr" / "amos_0507.nii.gz")
    assert found.labels.shape == (40, 32, 4)
