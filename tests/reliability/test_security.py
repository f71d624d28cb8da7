"""Loading runs no code: pickles and Python files are planted under every name that a loader might try.

``len(PLANTED)`` names are planted, beside the weights and instead of them, before each of ``len(LOADERS)`` loaders. Those of
trainings are in test_security_training.py.
"""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import vq_cases
from planting import CODE, DATA, Markers
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation

import hf_binaryformer as bf
from hf_binaryformer.modeling.pretrained import CheckpointError
from hf_binaryformer.training import warm_start
from hf_binaryformer.training.sampler import load_autoencoder
from jobs import save_network

ROOT = Path(__file__).parents[2]
LOADERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "from_pretrained of a network": ("network", bf.from_pretrained),
    "from_pretrained of a classifier": ("classifier", bf.from_pretrained),
    "from_pretrained of a pipeline": ("pipeline", bf.from_pretrained),
    "VolumeSegmentationPipeline": ("network", bf.VolumeSegmentationPipeline.from_pretrained),
    "BinaryFormerForSemanticSegmentation": ("network", bf.BinaryFormerForSemanticSegmentation.from_pretrained),
    "BinaryFormerForImageClassification": ("classifier", bf.BinaryFormerForImageClassification.from_pretrained),
    "BinaryFormerModel": ("encoder", bf.BinaryFormerModel.from_pretrained),
    "BinaryFormerConfig": ("network", bf.BinaryFormerConfig.from_pretrained),
    "BinaryFormerImageProcessor": ("network", bf.BinaryFormerImageProcessor.from_pretrained),
    "AutoConfig": ("network", AutoConfig.from_pretrained),
    "AutoModel": ("encoder", AutoModel.from_pretrained),
    "AutoModelForSemanticSegmentation": ("network", AutoModelForSemanticSegmentation.from_pretrained),
    "BinaryVQPipeline": ("pipeline", bf.BinaryVQPipeline.from_pretrained),
    "BinaryVQInpaintPipeline": ("pipeline", bf.BinaryVQInpaintPipeline.from_pretrained),
    "BinaryVQModel": ("pipeline/vqmodel", bf.BinaryVQModel.from_pretrained),
    "BinaryVQModel of a pipeline": ("pipeline", bf.BinaryVQModel.from_pretrained),
    "BinaryVQTransformer3DModel": ("pipeline/transformer", bf.BinaryVQTransformer3DModel.from_pretrained),
    "BinaryVQTransformer3DModel of a pipeline": ("pipeline", bf.BinaryVQTransformer3DModel.from_pretrained),
    "AbsorbingScheduler": ("pipeline/scheduler", bf.AbsorbingScheduler.from_pretrained),
    "model.from_pretrained of a recipe": (
        "network",
        lambda folder: warm_start.load_weights(str(folder), bf.BinaryFormerConfig.from_pretrained(folder)),
    ),
    "--vqmodel of a training": (
        "pipeline/vqmodel",
        lambda folder: load_autoencoder(
            str(folder), bf.BinaryVQTransformer3DModel.from_pretrained(folder.parent / "transformer")
        ),
    ),
}
# These read no weights.
WEIGHTLESS = {"BinaryFormerConfig", "BinaryFormerImageProcessor", "AutoConfig", "AbsorbingScheduler"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("saved")
    save_network(folder / "network")
    vq_cases.save_checkpoint(folder / "pipeline")
    sizes: dict[str, Any] = {"image_size": 16, "hidden_size": 24, "num_heads": 2, "num_hidden_layers": 1}
    config = bf.BinaryFormerConfig(**sizes, value_head_dim=4)
    bf.BinaryFormerForImageClassification(config).save_pretrained(folder / "classifier")
    bf.BinaryFormerModel(config).save_pretrained(folder / "encoder")
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def refused_in_a_line(load: Callable[[Path], Any], folder: Path) -> str:
    with pytest.raises((CheckpointError, OSError, typer.BadParameter)) as caught:
        load(folder)
    assert str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_planted_code_would_be_noticed(tmp_path, monkeypatch):
    markers = Markers(tmp_path / "markers")
    for name in ("a.bin", "b.pkl", "c.npy", "d.npz", "planted_module.py"):
        markers.plant(tmp_path / name)
    with pytest.raises(RuntimeError, match="corrupt"):
        torch.load(tmp_path / "a.bin", weights_only=False)
    with (tmp_path / "b.pkl").open("rb") as file:
        pickle.load(file)
    np.load(tmp_path / "c.npy", allow_pickle=True)
    np.load(tmp_path / "d.npz", allow_pickle=True)["arr_0"]
    monkeypatch.syspath_prepend(tmp_path)
    __import__("planted_module")
    assert len(markers.left) == 5


@pytest.mark.parametrize("loader", LOADERS)
def test_pickles_beside_the_weights_are_not_loaded(loader, copy, markers):
    part, load = LOADERS[loader]
    markers.plant_all(copy / part, DATA)
    load(copy / part)


@pytest.mark.parametrize("loader", LOADERS)
def test_code_beside_the_weights_is_not_run(loader, copy, markers, monkeypatch):
    part, load = LOADERS[loader]
    markers.plant_all(copy / part, CODE)
    # Where a user stands in the checkpoint's folder, Python finds modules there.
    monkeypatch.chdir(copy / part)
    if "Pipeline" in loader.replace("VolumeSegmentationPipeline", "") or loader == "from_pretrained of a pipeline":
        assert "holds code" in refused_in_a_line(load, copy / part)
    else:
        load(copy / part)


@pytest.mark.parametrize("place", ["", "vqmodel", "scheduler"])
@pytest.mark.parametrize("name", CODE)
def test_code_beside_any_part_of_a_pipeline_is_named(name, place, copy, markers):
    markers.plant(copy / "pipeline" / place / name)
    assert name in refused_in_a_line(bf.from_pretrained, copy / "pipeline")


@pytest.mark.parametrize("loader", LOADERS)
def test_pickles_instead_of_the_weights_are_refused(loader, copy, markers):
    part, load = LOADERS[loader]
    for path in (copy / part).rglob("*.safetensors"):
        path.unlink()
    markers.plant_all(copy / part, DATA)
    if loader in WEIGHTLESS:
        load(copy / part)
    else:
        assert ".safetensors" in refused_in_a_line(load, copy / part)


@pytest.mark.parametrize("loader", sorted(LOADERS.keys() - WEIGHTLESS))
def test_pickles_in_the_name_of_safetensors_are_refused(loader, copy, markers):
    part, load = LOADERS[loader]
    for path in (copy / part).rglob("*.safetensors"):
        markers.plant(path)
    refused_in_a_line(load, copy / part)


def change(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "fields",
    [
        {
            "auto_map": {
                "AutoConfig": "planted.X",
                "AutoModel": "planted.X",
                "AutoModelForSemanticSegmentation": "planted.X",
            }
        },
        {"auto_map": {"AutoImageProcessor": "planted.X"}, "trust_remote_code": True},
        {"custom_pipelines": {"x": {"impl": "planted.X", "pt": ["AutoModel"]}}, "trust_remote_code": True},
    ],
)
def test_code_that_a_configuration_names_is_not_run(fields, copy, markers, monkeypatch):
    markers.plant_all(copy, ("planted.py",))
    for place in ("network", "encoder"):
        change(copy / place / "config.json", fields)
    change(copy / "network" / "preprocessor_config.json", fields)
    monkeypatch.chdir(copy / "network")
    for part, load in (*(LOADERS[name] for name in LOADERS if LOADERS[name][0] in ("network", "encoder")),):
        load(copy / part)
    AutoImageProcessor.from_pretrained(copy / "network")


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_implementation": "somebody/kernel"},
        {"_attn_implementation": "somebody/kernel"},
        {"attn_implementation": "flash_attention_2"},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"quantization_config": {"quant_method": "planted"}},
    ],
)
@pytest.mark.parametrize("part", ["network", "pipeline/vqmodel"])
def test_kernels_and_quantizers_are_refused(part, fields, copy):
    change(copy / part / "config.json", fields)
    assert next(iter(fields)) in refused_in_a_line(bf.from_pretrained, copy / part)


def test_adapters_are_refused(copy):
    (copy / "network" / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    assert "merge the adapter" in refused_in_a_line(bf.from_pretrained, copy / "network")


VQMODEL = ["hf_binaryformer.modeling.vq_autoencoder", "BinaryVQModel"]


@pytest.mark.parametrize(
    "fields",
    [
        {"_class_name": ["planted", "X"]},
        {"_class_name": ["pipeline", "BinaryVQPipeline"]},
        {"vqmodel": ["planted", "X"]},
        {"vqmodel": ["planted", "BinaryVQModel"]},
        {"scheduler": ["planted_elsewhere", "AbsorbingScheduler"]},
        {"transformer": ["builtins", "eval"]},
        {"transformer": ["diffusers", "UNet2DModel"]},
        {"transformer": VQMODEL},
        {"transformer": []},
        {"safety_checker": ["planted_elsewhere", "X"]},
        {"../network": VQMODEL},
    ],
    ids=str,
)
@pytest.mark.parametrize("load", [bf.from_pretrained, bf.BinaryVQPipeline.from_pretrained])
def test_components_of_others_are_refused(fields, load, copy, markers, monkeypatch, tmp_path):
    change(copy / "pipeline" / "model_index.json", fields)
    (tmp_path / "path").mkdir()
    markers.plant(tmp_path / "path" / "planted_elsewhere.py")
    monkeypatch.syspath_prepend(tmp_path / "path")
    refused_in_a_line(load, copy / "pipeline")
    # Also where the file is there that diffusers would run.
    markers.plant_all(copy / "pipeline", ("planted.py",))
    refused_in_a_line(load, copy / "pipeline")
    assert "planted_elsewhere" not in sys.modules


def test_a_component_that_the_caller_gives_may_be_of_any_class(copy):
    vqmodel = bf.BinaryVQModel.from_pretrained(copy / "pipeline")
    change(copy / "pipeline" / "model_index.json", {"vqmodel": ["diffusers", "AutoencoderKL"]})
    assert bf.BinaryVQPipeline.from_pretrained(copy / "pipeline", vqmodel=vqmodel).vqmodel is vqmodel
