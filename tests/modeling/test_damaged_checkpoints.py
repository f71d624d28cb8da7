"""A damaged checkpoint gives a CheckpointError, before memory is taken for what its configuration asks.

Each case is one that `scripts/reliability/fuzz.py` found.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import hf_binaryformer as bf
from hf_binaryformer.modeling.pretrained import PACKAGED, CheckpointError
from hf_binaryformer.pipelines.loading import own_classes

NETWORK, VQ = PACKAGED / "binaryformer-tiny-brain", PACKAGED / "binaryvq-tiny-brain"


def with_config(tmp_path: Path, source: Path, content: object) -> Path:
    """A copy of a checkpoint with another content of its configuration: text, or changes of its fields."""
    folder = tmp_path / "copy"
    shutil.copytree(source, folder)
    path = next(folder.glob("*config.json")) if source != NETWORK else folder / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(json.loads(path.read_text()) | content))
    return folder


def load(folder: Path) -> object:
    """By the class that the copy was made from, whatever its configuration says."""
    source = NETWORK if (folder / "model.safetensors").exists() else None
    classes = {kind.__name__: kind for flag in (True, False) for kind in own_classes(False, flag)}
    name = (
        "BinaryFormerForSemanticSegmentation"
        if source
        else json.loads(next(folder.glob("*config.json")).read_text())["_class_name"]
    )
    return classes[name].from_pretrained(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[1, 2]", "null", "3", '"x"', "", "{"])
def test_text_that_is_no_configuration(tmp_path, text):
    folder = with_config(tmp_path, NETWORK, text)
    for read in (bf.from_pretrained, load):
        with pytest.raises(CheckpointError, match=r"config\.json"):
            read(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": "x"},
        {"hidden_size": None},
        {"hidden_size": 0},
        {"hidden_size": -192},
        {"hidden_size": 2**20},
        {"num_heads": 0},
        {"num_hidden_layers": 2**31 - 1},
        {"num_hidden_layers": 2**10},
        {"image_size": [2**20, 2**20]},
        {"image_size": []},
        {"decoder_hidden_size": 2**63},
        {"mlp_ratio": 1e30},
        {"num_labels": 2**31 - 1},
        {"id2label": {"": None}},
        {"id2label": 3},
        {"dtype": "x"},
        {"patch_size": 0},
    ],
)
def test_fields_of_a_network(tmp_path, fields):
    with pytest.raises(CheckpointError):
        load(with_config(tmp_path, NETWORK, fields))


@pytest.mark.parametrize("architectures", [3, {"a": 1}, [], None, [None], [[]], "x", 0.5])
def test_a_class_that_there_is_not(tmp_path, architectures):
    with pytest.raises(CheckpointError, match="expected one of this package's own classes"):
        bf.from_pretrained(with_config(tmp_path, NETWORK, {"architectures": architectures}))


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("transformer", {"embedding_dim": 2**20}),
        ("transformer", {"grid_size": [2**10, 2**10, 2**10]}),
        ("transformer", {"grid_size": None}),
        ("transformer", {"num_layers": 2**31}),
        ("transformer", {"codebook_size": 2**20}),
        ("transformer", {"num_heads": 0}),
        ("vqmodel", {"encoder_channels": 3}),
        ("vqmodel", {"encoder_channels": [2**20, 2**20, 2**20]}),
        ("vqmodel", {"encoder_num_convs": 2**31}),
        ("vqmodel", {"codebook_dim": {}}),
        ("vqmodel", {"expansion": 1e20}),
        ("scheduler", {"num_train_timesteps": "x"}),
        ("scheduler", {"temperature": []}),
    ],
)
def test_fields_of_the_generator(tmp_path, part, fields):
    with pytest.raises(CheckpointError):
        load(with_config(tmp_path, VQ / part, fields))


def test_what_a_user_asks_for_may_be_larger_than_the_weights(tmp_path):
    labels = {"num_labels": 300, "ignore_mismatched_sizes": True}
    assert bf.from_pretrained("binaryformer-tiny-brain", **labels).config.num_labels == 300
