"""Calibration of quality scores, against tables worked out by hand and by a plain loop."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from typer import BadParameter

from hf_binaryformer.data.prepared_folder import PreparedFolder
from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.image_processing import BinaryFormerImageProcessor
from hf_binaryformer.modeling.networks import BinaryFormerForSemanticSegmentation
from hf_binaryformer.pipelines.quality import expected_dice
from hf_binaryformer.pipelines.segmentation import VolumeSegmentationPipeline
from hf_binaryformer.pipelines.volumes import read_volume
from hf_binaryformer.training.quality import correlations, fitted, main, quality_table


def test_pairs_are_means_that_never_fall() -> None:
    pairs = [(0.9, 0.9), (0.5, 0.2), (0.8, 0.5), (0.6, 0.4), (0.7, 0.3), (0.95, 0.7)]
    # Two parts of three: scores 0.6 and 0.8833, Dice 0.3 and 0.7.
    assert fitted(pairs) == [[0.6, 0.3], [0.8833, 0.7]]
    # What falls is averaged, weighted by volumes.
    falling = [(score, 1 - score) for score in np.linspace(0.1, 0.9, 9)]
    assert fitted(falling) == [[0.2, 0.5], [0.5, 0.5], [0.8, 0.5]]
    assert fitted([(0.4, 0.3)]) == [[0.4, 0.3]] and fitted([(0.4, 0.3), (0.4, 0.5)]) == [[0.4, 0.4]]


def test_a_known_relation_comes_back() -> None:
    rng = np.random.default_rng(0)
    scores = rng.uniform(0.4, 1, 400)
    table = {"all": fitted(list(zip(scores, np.clip(scores**2 + rng.normal(0, 0.02, 400), 0, 1), strict=True)))}
    BinaryFormerConfig(quality=table)  # its own check
    for score in (0.5, 0.7, 0.9):
        assert expected_dice(score, "x", table) == pytest.approx(score**2, abs=0.03)


def test_groups_with_few_volumes_share_a_table() -> None:
    many, few = [(i / 20, i / 20) for i in range(12)], [(0.9, 0.1)] * 3
    table = quality_table({"thalamus": many, "amygdala": few})
    assert (
        set(table) == {"all", "thalamus"} and table["thalamus"] == fitted(many) and table["all"] == fitted(many + few)
    )
    rows = correlations({"thalamus": many, "amygdala": few})
    assert rows["thalamus"] == {"pairs": 12, "pearson": 1.0, "spearman": 1.0}
    assert rows["amygdala"] == {"pairs": 3, "pearson": None, "spearman": None}
    assert rows["all"]["pearson"] == round(float(np.corrcoef(np.transpose(many + few))[0, 1]), 4)
    with pytest.raises(ValueError, match="no structure was found"):
        quality_table({})


def test_the_script_fills_the_configuration(tmp_path: Path) -> None:
    torch.manual_seed(0)
    (tmp_path / "data").mkdir()
    data = toys.write_segmentation_data(tmp_path / "data")
    folder = PreparedFolder(data)
    sizes = {"image_size": 16, "num_channels": 3, "hidden_size": 48, "num_heads": 3, "num_hidden_layers": 1}
    config = BinaryFormerConfig(**sizes, decoder_hidden_size=64, attention_type="sign", id2label=folder.label_names)
    model = tmp_path / "model"
    BinaryFormerForSemanticSegmentation(config).save_pretrained(model)
    BinaryFormerImageProcessor(image_size=(16, 16), spacing=None).save_pretrained(model)
    before = json.loads((model / "config.json").read_text())
    main(model=model, data=data, split="validation", report=tmp_path / "r.json")

    pipeline = VolumeSegmentationPipeline.from_pretrained(model, dtype="auto")
    report = json.loads((tmp_path / "r.json").read_text())
    wanted: dict[str, list[list[float]]] = {}
    for case in folder.split("validation"):
        labels, truth = pipeline(case.image), read_volume(case.label, labels=True).array
        for row in labels.report["quality"]["groups"]:
            ours, theirs = np.isin(labels.labels, row["labels"]), np.isin(truth, row["labels"])
            if ours.any():
                dice = 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum())
                wanted.setdefault(row["name"], []).append([row["score"], dice])
    assert wanted and report["pairs"].keys() == wanted.keys()
    for name, pairs in wanted.items():
        np.testing.assert_allclose(report["pairs"][name], pairs, atol=1e-6)
    after = json.loads((model / "config.json").read_text())
    assert after.pop("quality") == report["quality"] == pipeline.model.config.quality
    before.pop("quality", None)
    assert after == before
    with pytest.raises(BadParameter, match="the test split stays unseen"):
        main(model=model, data=data, split="test", report=None)
