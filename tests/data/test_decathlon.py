"""Decathlon folders as people have them: no file is passed over, and labels that are nearly whole are kept."""

from __future__ import annotations

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from hf_binaryformer.commands import prepare
from hf_binaryformer.data import decathlon
from hf_binaryformer.data.decathlon import HIPPOCAMPUS_NAMES, build_decathlon, check_decathlon
from hf_binaryformer.data.folder_writer import NewCase
from hf_binaryformer.data.patches import image_paths
from hf_binaryformer.pipelines.volumes import VolumeError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """One case."""
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
        array = np.random.default_rng(0).integers(0, 3, (4, 5, 6)).astype(np.uint8)
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / folder / "hippocampus_001.nii.gz")
    return tmp_path


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
@pytest.mark.parametrize(
    "name", ["hippocampus_002.nii", "HIPPOCAMPUS_002.NII.GZ", "hippocampus_002.mha", "sub/hippocampus_002.nii.gz"]
)
def test_a_file_of_another_name_is_a_problem(source: Path, folder: str, name: str) -> None:
    (source / folder / name).parent.mkdir(exist_ok=True)
    (source / folder / name).touch()
    (source / folder / ".DS_Store").touch()
    with pytest.raises(ValueError, match=r"1 problem in") as refusal:
        check_decathlon(source, HIPPOCAMPUS_NAMES)
    assert f"{folder}/{name}: expected a name that ends in .nii.gz" in str(refusal.value)


def test_nearly_whole_labels_are_kept(source: Path) -> None:
    path = source / "labelsTr" / "hippocampus_001.nii.gz"
    truth = np.asanyarray(nib.load(path).dataobj)
    nib.save(nib.Nifti1Image((truth * 0.9999).astype(np.float32), np.eye(4)), path)
    with pytest.warns(UserWarning, match=r"labelsTr/hippocampus_001\.nii\.gz has labels up to 0.0002 off"):
        (image,) = check_decathlon(source, HIPPOCAMPUS_NAMES)
    (source / "images").mkdir()
    (source / "labels").mkdir()
    row = build_decathlon(source, NewCase("hippocampus_001", "g", "train", (image, path)))
    np.testing.assert_array_equal(np.asanyarray(nib.load(source / row["label"]).dataobj), truth)


def test_interpolated_labels_are_a_problem_with_a_remedy(source: Path) -> None:
    path = source / "labelsTr" / "hippocampus_001.nii.gz"
    nib.save(nib.Nifti1Image(np.full((4, 5, 6), 0.4, np.float32), np.eye(4)), path)
    with pytest.raises(ValueError, match="up to 0.4 off.*nearest neighbour"):
        check_decathlon(source, HIPPOCAMPUS_NAMES)


@pytest.mark.parametrize("harm", ["cut", "removed", "replaced"])
def test_a_file_that_changes_after_the_check_is_told(source: Path, tmp_path: Path, monkeypatch, harm: str) -> None:
    """Click turned the EOFError of a file that ends too soon into the word "Aborted"."""
    path, read = source / "imagesTr" / "hippocampus_001.nii.gz", decathlon.read_file

    def harm_and_read(name: Path) -> nib.Nifti1Image:
        if harm == "cut":
            path.write_bytes(path.read_bytes()[:60])
        elif harm == "removed":
            path.unlink(missing_ok=True)
        image = read(name)
        if harm == "replaced":
            (source / "new").write_bytes(path.read_bytes())
            (source / "new").replace(path)
        return image

    monkeypatch.setattr(decathlon, "read_file", harm_and_read)
    words = ["hippocampus", "--source", str(source), "--out", str(tmp_path / "out"), "--group-rule", "none"]
    result = CliRunner().invoke(prepare.app, words)
    said = "changed while it was read.*wait" if harm == "replaced" else "truncated or damaged.*fetch or export it again"
    assert result.exit_code == 2 and re.search(said, " ".join(result.output.split())), result.output
    assert {child.name for child in tmp_path.iterdir()} == {"imagesTr", "labelsTr"}


def test_an_affine_that_cannot_be_read_is_told(source: Path) -> None:
    path = source / "imagesTr" / "hippocampus_001.nii.gz"
    path.write_bytes(path.read_bytes()[:60])
    for _ in range(2):
        with pytest.raises(VolumeError, match="fetch or export it again"):
            decathlon.read_affine(path)
        path.unlink(missing_ok=True)


def test_a_folder_without_manifest_gives_all_its_volumes(tmp_path: Path) -> None:
    """The autoencoder reads any folder: capitals and the other formats count, hidden files and text do not."""
    names = ["a.nii.gz", "B.NII.GZ", "c.nii", "d.mha", "sub/e.nrrd", "sub/F.MHA"]
    for name in (*names, "notes.txt", "._a.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = image_paths(tmp_path, "train", 0.0, 0)
    assert {path.relative_to(tmp_path).as_posix() for path in found} == set(names)
