"""The checkpoints that the package ships: small, 1 bit wide, documented, and still as good as their card says."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import hf_binaryformer as bf
from hf_binaryformer.data.label_schemes import common_scheme
from hf_binaryformer.modeling.attention_configuration import attention_form
from hf_binaryformer.modeling.pretrained import PACKAGED, known_checkpoints
from hf_binaryformer.pipelines.grids import foreground_box
from hf_binaryformer.pipelines.metrics import mask_dice
from hf_binaryformer.pipelines.sides import mirrored_labels
from hf_binaryformer.pipelines.volumes import read_volume, volume_from_image
from hf_binaryformer.training.cards import checkpoint_card
from hf_binaryformer.training.recipes import load_recipe
from hf_binaryformer.training.segmentation import build_model

ROOT = Path(__file__).parent.parent
CARDS = ROOT / "model_cards"
TINY_BRAIN, TINY_VQ = "binaryformer-tiny-brain", "binaryvq-tiny-brain"
BRAIN = "binaryformer-brain"
AMOS = {2: "right kidney", 6: "liver", 8: "aorta", 14: "bladder"}


def test_tiny_brain_is_shipped():
    assert TINY_BRAIN in known_checkpoints()


@pytest.mark.parametrize("name", known_checkpoints())
def test_small_and_one_bit_wide(name):
    loaded, files = bf.from_pretrained(name), [p for p in (PACKAGED / name).rglob("*") if p.is_file()]
    is_pipeline = hasattr(loaded, "transformer")
    assert sum(p.stat().st_size for p in files) < (8_000_000 if is_pipeline else 5_000_000)
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".md"}
    config = loaded.transformer.config if is_pipeline else loaded.config
    assert attention_form(config.attention_type).has_bits
    tensors = [t for p in files if p.suffix == ".safetensors" for t in load_file(p).values()]
    assert tensors and all(np.isfinite(t.float().numpy()).all() for t in tensors)


@pytest.mark.parametrize("name", known_checkpoints())
def test_card_is_rendered_from_the_records(name):
    card = str(checkpoint_card(name, CARDS))
    assert (CARDS / f"{name}.md").read_text() == card, "run: python scripts/write_card.py " + name
    assert (PACKAGED / name / "README.md").read_text() == card
    assert "not for clinical use" in card and "| --- |" in card


@pytest.mark.parametrize(
    ("name", "licence", "labels"),
    [
        ("binaryformer-tiny-hippocampus", "cc-by-sa-4.0", {1: "anterior", 2: "posterior"}),
        ("binaryformer-tiny-abdomen", "cc-by-4.0", AMOS),
        ("binaryformer-vit-s8-amos", "cc-by-4.0", AMOS),
    ],
)
def test_weights_for_the_hub_alone_have_the_licence_of_their_data(name, licence, labels):
    folder = ROOT / "published" / name
    card = checkpoint_card(name, CARDS)
    assert (CARDS / f"{name}.md").read_text() == (folder / "README.md").read_text() == str(card)
    assert card.data.license == licence and name not in known_checkpoints()
    assert {p.name for p in folder.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    model = bf.from_pretrained(name)  # found in the checkout
    assert attention_form(model.config.attention_type).has_bits and model.config.learned_logit_scale
    assert labels.items() <= model.config.id2label.items()


def test_a_real_ct_is_segmented_as_the_record_says(data_root, tmp_path):
    """TotalSegmentator's example; its own labels are the truth."""
    evidence, maps = CARDS / "evidence" / "binaryformer-tiny-abdomen", data_root / "abdomen_label_maps"
    pipeline = bf.VolumeSegmentationPipeline.from_pretrained(ROOT / "published" / "binaryformer-tiny-abdomen")
    labels = pipeline(maps / "totalseg_example_ct.nii.gz").labels
    scheme = common_scheme(pipeline.label_names, None, evidence / "totalsegmentator.csv")
    truth = scheme.truth(read_volume(maps / "totalseg_example.nii.gz", labels=True).array)
    record = {row["label"]: row["dice"] for row in json.loads((evidence / "ct.json").read_text())["labels"]}
    for organ in (1, 2, 3, 6):
        assert mask_dice(labels == organ, truth == organ) == pytest.approx(record[organ], abs=0.01)


def test_hippocampi_of_the_test_split_are_segmented_as_the_record_says(data_root):
    name = "binaryformer-tiny-hippocampus"
    record = json.loads((CARDS / "evidence" / name / "results.json").read_text())["cases"]
    pipeline = bf.VolumeSegmentationPipeline.from_pretrained(ROOT / "published" / name)
    for case in ("hippocampus_014", "hippocampus_093"):
        labels = pipeline(data_root / "hippocampus" / "imagesTr" / f"{case}.nii.gz").labels
        truth = np.asarray(
            nib.as_closest_canonical(nib.load(data_root / f"hippocampus/labelsTr/{case}.nii.gz")).dataobj
        )
        dice = [mask_dice(labels == label, truth == label) for label in (1, 2)]
        assert dice == pytest.approx(record[case], abs=2e-3)


@pytest.mark.parametrize("page", ["README.md", f"model_cards/{TINY_BRAIN}.md"])
def test_the_first_snippet_runs(page, tmp_path, monkeypatch, capsys):
    code = (ROOT / page).read_text().split("```python\n")[1].split("```")[0]
    template = pytest.importorskip("nilearn.datasets").load_mni152_template(resolution=1)
    nib.save(template.slicer[:, 120:123], tmp_path / "scan.nii.gz")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {})
    said = capsys.readouterr().out
    assert "cerebral cortex" in said and ("[1, 6, 1601, 64]" in said) == (page == "README.md")


def test_segments_slices_of_a_real_brain():
    datasets = pytest.importorskip("nilearn.datasets")
    template, white = (
        np.asarray(load(resolution=1).dataobj)
        for load in (datasets.load_mni152_template, datasets.load_mni152_wm_template)
    )
    model, processor = bf.from_pretrained(TINY_BRAIN), bf.BinaryFormerImageProcessor.from_pretrained(TINY_BRAIN)
    scaled = processor.scale_volume(template)
    box = foreground_box(scaled, (1.0, 1.0, 1.0))
    volume = torch.from_numpy(scaled[box]).movedim(1, 0)[:, :160, :160]
    index = torch.tensor([60, 95, 130])
    with torch.inference_mode():
        labels = model(processor.slices_at(volume, index)).logits.argmax(1).numpy()
    truth = np.moveaxis(white[box] > 0.5, 1, 0)[index, :160, :160]
    assert mask_dice(np.isin(labels, [1, 4]), truth) > 0.8
    assert {1, 2, 3, 5, 6, 8, 11} <= set(np.unique(labels))


@pytest.mark.slow
def test_left_stays_left_in_a_real_brain_and_in_its_mirror_image():
    """The mirror image is that of a person whose left and right are exchanged: labels must follow what lies where."""
    template = pytest.importorskip("nilearn.datasets").load_mni152_template(resolution=1)
    array = np.asarray(template.dataobj, dtype=np.float32)
    pipeline = bf.VolumeSegmentationPipeline.from_pretrained(BRAIN)
    names = pipeline.label_names
    # First axis: from left to right.
    seen, mirrored = (
        pipeline(volume_from_image(nib.Nifti1Image(one, template.affine))).labels for one in (array, array[::-1].copy())
    )
    for labels in (seen, mirrored):
        for label, name in names.items():
            where = np.flatnonzero((labels == label).any(axis=(1, 2)))
            if name.startswith("left") and where.size:
                other = next(number for number, n in names.items() if n == name.replace("left", "right"))
                assert where.mean() < np.flatnonzero((labels == other).any(axis=(1, 2))).mean(), name
    exchanged = mirrored_labels(names)
    back = np.vectorize(exchanged.get, otypes=[seen.dtype])(mirrored[::-1])
    inside = (seen > 0) | (back > 0)
    assert (seen == back)[inside].mean() > 0.85 and (seen == mirrored[::-1])[inside].mean() < 0.3


def test_the_vit_s8_of_the_abdomen_begins_as_the_tiny_one():
    small = bf.from_pretrained("binaryformer-tiny-abdomen")
    grown, _ = build_model(load_recipe("vit-s8-amos-synthetic", ["model.growth_noise=0.0"]), small.config.id2label)
    x = torch.rand(1, 3, 192, 192)
    with torch.no_grad():
        wanted, found = small(x).logits, grown.eval()(x).logits
    assert (found.argmax(1) == wanted.argmax(1)).float().mean() > 0.98
    assert (found - wanted).std() < 0.05 * wanted.std()


@pytest.mark.slow
def test_demo_repeats_the_card(tmp_path):
    from hf_binaryformer.commands.demo import run_demo
    from hf_binaryformer.commands.jobs import DEFAULT_MODEL

    record = json.loads((CARDS / "evidence" / DEFAULT_MODEL / "mni152.json").read_text())
    report = run_demo(tmp_path)
    psnr = report["inpainting"]["psnr_hole"]
    filled = json.loads((CARDS / "evidence" / TINY_VQ / "mni152.json").read_text())["against"]["original"]
    assert psnr["mean"] == pytest.approx(filled["mean fill"]["psnr_hole"]["mean"], abs=0.02)
    assert psnr["model"] == pytest.approx(filled["model"]["psnr_hole"]["mean"], abs=0.3)
    assert psnr["model"] > 1 + max(psnr[fill] for fill in ("random tokens", "zero", "mean", "mirror"))
    dice = report["segmentation"]["dice"]
    for tissue, value in record["segmentation"]["dice"].items():
        assert dice[tissue] == pytest.approx(value, abs=0.002)
    assert dice["white matter"] >= 0.80 and dice["grey matter"] >= 0.75
