"""Pipelines and their components on disk: by folder, by name, by Hub id; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vq_cases import SHAPE, save_checkpoint, seeded, synthesis

import hf_binaryformer as bf
from hf_binaryformer.modeling import pretrained
from hf_binaryformer.modeling.pretrained import CheckpointError, CheckpointNotFoundError, known_checkpoints

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny-vq")


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_module_names_are_file_format(saved):
    """Whoever moves a class makes every saved pipeline unreadable."""
    index = json.loads((saved / "model_index.json").read_text())
    assert {name: value for name, value in index.items() if not name.startswith("_")} == {
        "vqmodel": ["hf_binaryformer.modeling.vq_autoencoder", "BinaryVQModel"],
        "transformer": ["hf_binaryformer.modeling.vq_transformer", "BinaryVQTransformer3DModel"],
        "scheduler": ["hf_binaryformer.pipelines.absorbing_scheduler", "AbsorbingScheduler"],
    }
    assert not [p for p in saved.rglob("*") if p.suffix not in ("", ".json", ".safetensors")]


def test_loaded_pipeline_gives_the_same_bytes(saved):
    original = synthesis()(num_inference_steps=3, generator=seeded())
    loaded = quiet(bf.BinaryVQPipeline.from_pretrained(saved))
    again = loaded(num_inference_steps=3, generator=seeded())
    assert torch.equal(again.tokens, original.tokens) and torch.equal(again.images, original.images)
    assert not loaded.vqmodel.training and not loaded.transformer.training


def test_both_pipelines_load_from_one_checkpoint(saved):
    image, hole = torch.rand(SHAPE), torch.zeros(SHAPE)
    hole[8:12, 9:13, 6:9] = 1
    pipeline = quiet(bf.BinaryVQInpaintPipeline.from_pretrained(saved))
    result = pipeline(image, hole, num_inference_steps=2, generator=seeded())
    from vq_cases import inpainting

    assert torch.equal(result.images, inpainting()(image, hole, num_inference_steps=2, generator=seeded()).images)


def test_short_names(saved, monkeypatch):
    monkeypatch.setattr(pretrained, "PACKAGED", saved.parent)
    assert known_checkpoints() == ["tiny-vq"]
    assert type(bf.from_pretrained("tiny-vq")) is bf.BinaryVQPipeline
    assert type(bf.BinaryVQInpaintPipeline.from_pretrained("tiny-vq")) is bf.BinaryVQInpaintPipeline
    for name, component in (
        ("vqmodel", bf.BinaryVQModel),
        ("transformer", bf.BinaryVQTransformer3DModel),
        ("scheduler", bf.AbsorbingScheduler),
    ):
        found, named = component.from_pretrained("tiny-vq"), component.from_pretrained("tiny-vq", subfolder=name)
        own = bf.from_pretrained(saved / name) if name != "scheduler" else component.from_pretrained(saved / name)
        assert type(found) is type(named) is type(own) is component
        assert dict(found.config)["num_codebooks"] == 2
    with pytest.raises(CheckpointNotFoundError, match="training.autoencoder --recipe brain-small"):
        bf.BinaryVQPipeline.from_pretrained("binaryvq-tiny-brain")


def test_hub_id_fetches_the_whole_folder(saved, monkeypatch):
    """A stand-in for the Hub: diffusers' own download refuses components from outside its library."""
    asked = []

    def snapshot_download(repo_id, **options):
        asked.append((repo_id, options["revision"]))
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    pipeline = quiet(bf.BinaryVQPipeline.from_pretrained("somebody/some-vq", revision="v1"))
    assert asked == [("somebody/some-vq", "v1")]
    assert torch.equal(
        pipeline(num_inference_steps=2, generator=seeded()).tokens,
        synthesis()(num_inference_steps=2, generator=seeded()).tokens,
    )


def remove_tensor(folder: Path) -> None:
    tensors = load_file(folder / "transformer" / WEIGHTS)
    tensors.pop("head.bias")
    save_file(tensors, folder / "transformer" / WEIGHTS)


def add_tensor(folder: Path) -> None:
    tensors = load_file(folder / "vqmodel" / WEIGHTS)
    save_file({**tensors, "extra.weight": torch.ones(3)}, folder / "vqmodel" / WEIGHTS)


def change_shape(folder: Path) -> None:
    tensors = load_file(folder / "transformer" / WEIGHTS)
    save_file({**tensors, "head.bias": torch.ones(3)}, folder / "transformer" / WEIGHTS)


def truncate(folder: Path) -> None:
    path = folder / "vqmodel" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def pickle_instead(folder: Path) -> None:
    (folder / "vqmodel" / WEIGHTS).unlink()
    torch.save({}, folder / "vqmodel" / "diffusion_pytorch_model.bin")


def break_json(folder: Path) -> None:
    (folder / "transformer" / "config.json").write_text("{")


def other_class(folder: Path) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("AbsorbingScheduler", "DDIMScheduler"))


def no_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_tensor, "transformer do not fit its config.json: missing keys: head.bias"),
        (add_tensor, "vqmodel do not fit its config.json: unexpected keys: extra.weight"),
        (change_shape, "transformer cannot be used with its config.json.*: .*head.bias"),
        (truncate, "vqmodel cannot be used with its config.json"),
        (pickle_instead, r"vqmodel has no \.safetensors file \(only diffusion_pytorch_model.bin\): convert it"),
        (break_json, "config.json is not valid JSON"),
        (other_class, "holds a 'DDIMScheduler', expected a 'AbsorbingScheduler'"),
        (no_index, "has no model_index.json, expected a pipeline's folder"),
    ],
)
def test_damage_is_named(damage, message, copy):
    damage(copy)
    with pytest.raises(CheckpointError, match=message):
        bf.BinaryVQPipeline.from_pretrained(copy)


def test_folder_of_another_library(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(CheckpointError, match="holds a 'StableDiffusionPipeline', expected one of this package's own"):
        bf.from_pretrained(tmp_path)
