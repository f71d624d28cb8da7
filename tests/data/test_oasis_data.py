"""OASIS as Learn2Reg publishes it, with labels and without; helpers are those of test_public_data.py."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from test_public_data import check_manifest, flat, invoke, save

from hf_binaryformer.data.patches import image_paths, load_scaled
from hf_binaryformer.data.prepared_folder import PreparedFolder, read_labels
from hf_binaryformer.data.public_data import DATA_SETS


@pytest.fixture
def oasis(tmp_path: Path) -> Path:
    """Five brains without labels, and a YAML file with a small size."""
    rng = np.random.default_rng(2)
    for number in (1, 2, 3, 10, 457):
        image = rng.random((14, 20, 18)).astype(np.float32)
        save(image, np.diag([-1.0, 1, 1, 1]), tmp_path / "raw" / "imagesTr" / f"OASIS_{number:04d}_0000.nii.gz")
    settings = yaml.safe_load((DATA_SETS / "oasis.yaml").read_text()) | {"size": [16, 18, 18]}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def test_oasis_without_labels_feeds_the_autoencoder(oasis: Path) -> None:
    out = oasis / "new"
    result = invoke("oasis", "--source", oasis / "raw", "--out", out, "--config", oasis / "small.yaml", "--no-shards")
    assert result.exit_code == 0, result.output
    manifest = check_manifest(out)
    assert not (out / "shards").exists()
    assert all("label" not in row for row in manifest["cases"])
    assert {row["group"] for row in manifest["cases"]} >= {"patient_0001", "patient_0457"}
    paths = image_paths(out, "train", 0.1, 0)
    assert {p.name for p in paths} == {f"{r['case']}.nii.gz" for r in manifest["cases"] if r["split"] == "train"}
    source = nib.load(oasis / "raw" / "imagesTr" / paths[0].name).get_fdata()[::-1]
    stored = nib.load(paths[0]).get_fdata()
    np.testing.assert_array_equal(stored[1:15], source[:, 1:19], "stored as in the source: no scaling yet")
    vqmodel = {"spacing": None, "percentiles": [0.5, 99.5], "intensity_ceiling": 1.5}
    low = np.percentile(stored, 0.5)
    high = np.percentile(stored[stored > low], 99.5)
    assert load_scaled(paths[0], vqmodel).max() == pytest.approx((stored.max() - low) / (high - low), abs=2e-3)
    with pytest.raises(ValueError, match="has no labels"):
        read_labels(PreparedFolder(out).split("train")[0])


def test_oasis_labels_are_all_or_none(oasis: Path) -> None:
    arguments = ["oasis", "--source", oasis / "raw", "--config", oasis / "small.yaml", "--out", oasis / "new"]
    for number in (1, 2, 3, 10, 457):
        if number == 457:
            result = invoke(*arguments)
            assert result.exit_code == 2 and "no labelsTr/OASIS_0457_0000.nii.gz" in flat(result.output)
        labels = (np.arange(14 * 20 * 18).reshape(14, 20, 18) * (number + 4) % 36).astype(np.uint8)
        path = oasis / f"raw/labelsTr/OASIS_{number:04d}_0000.nii.gz"
        save(labels, np.diag([-1.0, 1, 1, 1]), path)
    assert invoke(*arguments).exit_code == 0
    folder = PreparedFolder(oasis / "new")
    assert len(folder.label_names) == 36 and folder.label_names[14] == "left hippocampus"
    (case,) = (case for case in folder.cases if case.group == "patient_0457")
    np.testing.assert_array_equal(read_labels(case).array[1:15], labels[::-1][:, 1:19])
    # One label map for all subjects cannot be true.
    for other in path.parent.glob("*.nii.gz"):
        other.write_bytes(path.read_bytes())
    result = invoke(*arguments[:-1], oasis / "other")
    assert result.exit_code == 2 and "Leak: label file" in result.output and not (oasis / "other").exists()
