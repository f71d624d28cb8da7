"""Loading runs no code: pickles and Python files are planted under every name that a loader might try.

``len(PLANTED)`` names are planted, beside the weights and instead of them, before each of ``len(LOADERS)`` loaders; another
``len(STATES)`` in the checkpoints of a training.
"""

from __future__ import annotations

import ast
import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import vq_cases
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn
from toys import write_segmentation_data, write_segmentation_recipe
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation

import hf_binaryformer as bf
from hf_binaryformer.data.hashing import file_hash
from hf_binaryformer.data.pixels import load_images
from hf_binaryformer.modeling.pretrained import CheckpointError
from hf_binaryformer.pipelines.volumes import VolumeError, read_volume
from hf_binaryformer.training import segmentation
from hf_binaryformer.training.checkpoints import FOLDER, MANIFEST, Checkpoints, Progress
from hf_binaryformer.training.sampler import load_autoencoder, load_tokens
from jobs import save_network

ROOT = Path(__file__).parents[2]
# Weights and state, as transformers, diffusers, Accelerate, PEFT, timm, torch, numpy and people name them.
TRANSFORMERS = ("pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "tf_model.h5", "flax_model.msgpack")
TRANSFORMERS = (*TRANSFORMERS, "model.ckpt.index", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")
DIFFUSERS = ("diffusion_pytorch_model.bin", "diffusion_pytorch_model-00001-of-00001.bin", "diffusion_pytorch_model.pt")
DIFFUSERS = (*DIFFUSERS, "diffusion_pytorch_model.ckpt", "diffusion_flax_model.msgpack", "pytorch_lora_weights.bin")
ACCELERATE = ("optimizer.bin", "scheduler.bin", "sampler.bin", "dl_state_dict.bin", "scaler.pt", "random_states_0.pkl")
ACCELERATE = (
    *ACCELERATE,
    "custom_checkpoint_0.pkl",
    "pytorch_model_fsdp.bin",
    ".metadata",
    "mp_rank_00_model_states.pt",
)
OTHERS = (
    "adapter_model.bin",
    "open_clip_pytorch_model.bin",
    "learned_embeds.bin",
    "model.pt",
    "model.pth",
    "model.bin",
)
OTHERS = (*OTHERS, "model.ckpt", "model.pkl", "model.joblib", "weights.pt", "best.pt", "last.ckpt", "checkpoint.pth")
OTHERS = (*OTHERS, "config.pkl", "processor.pkl", "data.pkl", "tokens.pt", "tokens.npy", "weights.npz", "arrays.npy")
# Code of a checkpoint, as `trust_remote_code` and the modules named in a pipeline's index would find it. diffusers looks
# for a file "None.py" where no pipeline of one's own was asked for.
CODE = ("None.py", "__init__.py", "pipeline.py", "modeling.py", "modeling_binaryformer.py", "image_processing.py")
CODE = (*CODE, "configuration_binaryformer.py", "hf_binaryformer.modeling.vq_autoencoder.py", "planted.py", "setup.py")
CODE = (*CODE, "hf_binaryformer.modeling.vq_transformer.py", "hf_binaryformer.pipelines.absorbing_scheduler.py")
DATA = (*TRANSFORMERS, *DIFFUSERS, *ACCELERATE, *OTHERS)
PLANTED = (*DATA, *CODE)
# What a training's checkpoint consists of, and what Accelerate reads there in place of it.
STATES = ("optimizer.bin", "random_states_0.pkl", "state_0.pt", "state_1.pt", "model.safetensors", "pytorch_model.bin")
STATES = (*STATES, "scheduler.bin", "sampler.bin", "scaler.pt", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl")
INDICES = {"pytorch_model.bin.index.json": "pytorch_model-00001-of-00001.bin"}
INDICES |= {"diffusion_pytorch_model.bin.index.json": "diffusion_pytorch_model-00001-of-00001.bin"}
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
        lambda folder: segmentation.load_weights(str(folder), bf.BinaryFormerConfig.from_pretrained(folder)),
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


class Charge:
    """Unpickled, it leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


class Markers:
    """A folder for the files that planted code leaves, and what writes that code."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder

    def plant(self, path: Path) -> Path:
        """A file that leaves a marker of its own name when it is unpickled, imported or loaded by numpy."""
        marker = self.folder / f"{path.parent.name} {path.name}"
        if path.suffix == ".py":
            path.write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass X: pass\n")
        elif path.suffix in (".npy", ".npz"):
            with path.open("wb") as file:
                (np.save if path.suffix == ".npy" else np.savez)(file, np.array([Charge(marker)], dtype=object))
        else:
            # torch.load takes a bare pickle too, as the oldest of its formats.
            path.write_bytes(pickle.dumps(Charge(marker), protocol=2))
        return path

    def plant_all(self, folder: Path, names: tuple[str, ...]) -> None:
        """Plant under all names in a folder and its subfolders, and write indices of weights that name some of them."""
        for place in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
            for name in names:
                self.plant(place / name)
            for index, file in INDICES.items():
                (place / index).write_text(json.dumps({"metadata": {}, "weight_map": {"a": file}}))

    @property
    def left(self) -> list[str]:
        """What was run."""
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def markers(tmp_path: Path) -> Iterator[Markers]:
    markers = Markers(tmp_path / "markers")
    yield markers
    assert not markers.left


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


@pytest.mark.parametrize("loader", LOADERS.keys() - WEIGHTLESS)
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


def checkpoints(output: Path) -> Checkpoints:
    model = nn.Linear(2, 2)
    accelerator = Accelerator(cpu=True, project_dir=output)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    accelerator.prepare(model, optimizer)
    return Checkpoints(accelerator, output, 2, (Progress(), schedule))


def sign(checkpoint: Path) -> None:
    """List the files of a checkpoint as the one who planted some of them would."""
    found = {path.name: file_hash(path) for path in checkpoint.iterdir() if path.name != MANIFEST}
    (checkpoint / MANIFEST).write_text(json.dumps(found))


@pytest.mark.parametrize("name", STATES)
def test_no_state_of_a_training_runs_code(name, tmp_path, markers):
    run = checkpoints(tmp_path / "run")
    run.save(1)
    place = next((tmp_path / "run" / FOLDER).iterdir())
    run.restore()
    markers.plant(place / name)
    if name == "pytorch_model.bin":
        (place / "model.safetensors").unlink()
    sign(place)
    # These are not read, or read and passed over as Accelerate does it; a step's random numbers come from its seed.
    if name in ("random_states_0.pkl", "scheduler.bin", "sampler.bin", "scaler.pt"):
        run.restore()
    else:
        with pytest.raises((typer.BadParameter, SafetensorError)) as caught:
            run.restore()
        assert "\n" not in str(caught.value)


def test_a_resumed_training_runs_no_code(tmp_path, markers):
    data = tmp_path / "data"
    data.mkdir()
    write_segmentation_data(data)
    recipe = write_segmentation_recipe(tmp_path / "toy.yaml")
    options: dict[str, Any] = {"recipe": str(recipe), "data": data, "output": tmp_path / "run", "evaluate": "none"}
    segmentation.main(**options, stop_after=3)
    place = next((tmp_path / "run" / FOLDER).iterdir())
    whole = shutil.copytree(place, tmp_path / "whole")
    for name in ("random_states_0.pkl", "optimizer.bin", "custom_checkpoint_0.pkl"):
        shutil.rmtree(place)
        shutil.copytree(whole, place)
        markers.plant(place / name)
        sign(place)
        if name == "random_states_0.pkl":
            segmentation.main(**options, resume=True, stop_after=4)
            shutil.rmtree(next((tmp_path / "run" / FOLDER).glob("*4")))
        else:
            with pytest.raises(typer.BadParameter, match="which could run any code"):
                segmentation.main(**options, resume=True)


@pytest.mark.parametrize(
    "suffix", [".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".dcm", ".ima", ".npy", ".npz", ".pkl", ".pt"]
)
def test_no_volume_is_unpickled(suffix, tmp_path, markers):
    path = markers.plant(tmp_path / f"a{suffix}")
    with pytest.raises(VolumeError) as caught:
        read_volume(path)
    assert "\n" not in str(caught.value)


def test_no_training_data_is_unpickled(tmp_path, markers, saved):
    names = (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "data_batch_1",
        "batches.meta",
        "train.npz",
        "train.pt",
    )
    for name in (*names, "train.safetensors"):
        markers.plant(tmp_path / name)
    with pytest.raises(ValueError, match="no IDX file"):
        load_images(tmp_path, "train")
    for name in names[:2]:
        (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match="holds neither"):
        load_images(tmp_path, "train")
    with pytest.raises(Exception, match="(?i)header"):
        load_tokens(tmp_path, "train", bf.BinaryVQTransformer3DModel.from_pretrained(saved / "pipeline"))
    vit = markers.plant(tmp_path / "vit.safetensors")
    for checkpoint in (vit, markers.plant(tmp_path / "vit.pth")):
        with pytest.raises(Exception, match="(?i)header|expected a .safetensors file"):
            bf.BinaryFormerForSemanticSegmentation.from_timm(
                "vit_tiny_patch16_224", checkpoint=checkpoint, num_labels=2
            )


FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "tarfile", "zipfile", "code"}


def faults(text: str) -> list[str]:
    """Calls and imports in a program by which a file could run code, or write where it wants."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in FORBIDDEN]
        elif isinstance(node, ast.ImportFrom) and node.module in FORBIDDEN:
            found += [alias.name for alias in node.names if alias.name != "UnpicklingError"]
        elif isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {key.arg: ast.unparse(key.value) for key in node.keywords}
            if name in ("eval", "exec", "os.system", "shutil.unpack_archive", "yaml.load", "yaml.unsafe_load"):
                found.append(name)
            if name == "torch.load" and given.get("weights_only") != "True":
                found.append(name)
            found += [
                key for key in ("allow_pickle", "trust_remote_code", "shell") if given.get(key, "False") != "False"
            ]
    return found


def test_the_code_asks_for_nothing_that_runs_code():
    files = [path for folder in ("hf_binaryformer", "scripts") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    assert {str(path): found for path in files if (found := faults(path.read_text()))} == {}
    assert (
        faults("import pickle\nfrom tarfile import open\neval(x)\ntorch.load(p)\nnp.load(p, allow_pickle=True)") != []
    )
    assert len(faults("torch.load(p, weights_only=False); f(trust_remote_code=True); run(x, shell=True)")) == 3
