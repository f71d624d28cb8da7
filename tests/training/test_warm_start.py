"""Trainings that start from a checkpoint with other labels or another image size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import typer

import hf_binaryformer as bf
from hf_binaryformer.training.warm_start import load_weights

SIZES = {"hidden_size": 48, "num_heads": 3, "value_head_dim": 4, "num_hidden_layers": 1, "decoder_hidden_size": 64}
POSITIONS = "binaryformer.encoder.pos_embed"


def network(names: list[str], **fields: object) -> bf.BinaryFormerForSemanticSegmentation:
    torch.manual_seed(len(names))
    settings = {**SIZES, "image_size": [32, 48], "attention_type": "sign", "class_token": False, **fields}
    return bf.BinaryFormerForSemanticSegmentation(bf.BinaryFormerConfig(**settings, id2label=dict(enumerate(names))))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    model = network(["background", "hippocampus", "Brain Stem"])
    torch.nn.init.normal_(model.binaryformer.encoder.pos_embed)
    model.save_pretrained(tmp_path / "first")
    return tmp_path / "first", model.state_dict()


def test_the_head_keeps_what_it_knows_by_name(saved):
    folder, old = saved
    names = ["background", "brain stem", "left hippocampus", "right hippocampus", "left putamen"]
    new = load_weights(str(folder), network(names).config).state_dict()
    for key in ("decoder.head.weight", "decoder.head.bias"):
        for row, known in enumerate((0, 2, 1, 1)):
            assert torch.equal(new[key][row], old[key][known]), (key, row)
    assert not any(torch.equal(new["decoder.head.weight"][4], row) for row in old["decoder.head.weight"])
    assert all(torch.equal(new[key], tensor) for key, tensor in old.items() if "head" not in key)


def test_as_many_labels_in_another_order_keep_their_names(saved):
    folder, old = saved
    new = load_weights(str(folder), network(["background", "brain stem", "hippocampus"]).config).state_dict()
    assert torch.equal(new["decoder.head.weight"], old["decoder.head.weight"][[0, 2, 1]])


@pytest.mark.parametrize("class_token", [False, True])
def test_positions_of_another_image_size_are_resampled(class_token, tmp_path):
    """A table that grows along the height alone still does, from the same lowest to the same highest value."""
    model = network(["background", "a"], class_token=class_token, pooling="mean")
    table = model.binaryformer.encoder.pos_embed
    ramp = torch.linspace(-1, 1, 4)[:, None].expand(4, 6).flatten()
    with torch.no_grad():
        table.zero_()
        table[0, -24:] += ramp[:, None]
        table[0, : -24 or None] -= 5.0
    model.save_pretrained(tmp_path / "first")
    config = network(["background", "a"], class_token=class_token, pooling="mean", image_size=[64, 32]).config
    new = load_weights(str(tmp_path / "first"), config).state_dict()[POSITIONS]
    assert new.shape == (1, 32 + class_token, 48)
    grid = new[0, -32:].reshape(8, 4, 48)
    assert (grid.diff(dim=0) > 0).all() and grid.std(dim=(1, 2)).max() < 1e-5
    assert grid[0].mean() == pytest.approx(-1, abs=0.1) and grid[-1].mean() == pytest.approx(1, abs=0.1)
    if class_token:
        assert (new[0, 0] == -5).all()


def test_another_network_altogether_is_refused(saved):
    with pytest.raises(typer.BadParameter, match="no tensor fits this recipe's network"):
        load_weights(str(saved[0]), bf.BinaryFormerConfig(hidden_size=36, num_heads=3, mlp_ratio=3.0))
