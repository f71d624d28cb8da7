"""A revision is one of a repository on the Hub. What is found on this computer has none, and does not answer for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from vq_cases import components, save_checkpoint

import hf_binaryformer as bf
from hf_binaryformer.modeling import pretrained
from hf_binaryformer.modeling.pretrained import CheckpointError, resolve_checkpoint

TINY_BRAIN, TINY_VQ = "binaryformer-tiny-brain", "binaryvq-tiny-brain"
PUBLISHED = "binaryformer-tiny-hippocampus"

LOADERS: dict[str, tuple[Callable[..., Any], str]] = {
    "from_pretrained": (bf.from_pretrained, TINY_BRAIN),
    "from_pretrained of a pipeline": (bf.from_pretrained, TINY_VQ),
    "network": (bf.BinaryFormerForSemanticSegmentation.from_pretrained, TINY_BRAIN),
    "processor": (bf.BinaryFormerImageProcessor.from_pretrained, TINY_BRAIN),
    "segmentation pipeline": (bf.VolumeSegmentationPipeline.from_pretrained, TINY_BRAIN),
    "synthesis pipeline": (bf.BinaryVQPipeline.from_pretrained, TINY_VQ),
    "inpainting pipeline": (bf.BinaryVQInpaintPipeline.from_pretrained, TINY_VQ),
    "autoencoder": (bf.BinaryVQModel.from_pretrained, TINY_VQ),
    "token transformer": (bf.BinaryVQTransformer3DModel.from_pretrained, TINY_VQ),
    "scheduler": (bf.AbsorbingScheduler.from_pretrained, TINY_VQ),
}


@pytest.mark.parametrize("revision", ["no-such-tag", "main"])
@pytest.mark.parametrize("name", LOADERS)
def test_a_packaged_checkpoint_has_none(name, revision) -> None:
    load, checkpoint = LOADERS[name]
    with pytest.raises(CheckpointError) as error:
        load(checkpoint, revision=revision)
    for word in (checkpoint, revision, "no revisions", f"{pretrained.DEFAULT_NAMESPACE}/{checkpoint}", "Hub"):
        assert word in str(error.value), error.value


def test_a_published_checkpoint_of_the_checkout_has_none(monkeypatch) -> None:
    monkeypatch.setenv("HF_BINARYFORMER_NAMESPACE", "somebody")
    with pytest.raises(CheckpointError, match=f"no revisions.*somebody/{PUBLISHED}"):
        bf.from_pretrained(PUBLISHED, revision="v1")


@pytest.mark.parametrize("kind", ["network", "pipeline"])
def test_a_folder_has_none(kind, tmp_path) -> None:
    if kind == "network":
        bf.BinaryFormerForSemanticSegmentation(
            bf.BinaryFormerConfig(
                image_size=16, hidden_size=24, num_heads=2, num_hidden_layers=1, decoder_hidden_size=32
            )
        ).save_pretrained(tmp_path)
    else:
        save_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"is a folder, which has no revisions.*Hub") as error:
        bf.from_pretrained(tmp_path, revision="v1")
    assert "'v1'" in str(error.value)
    assert bf.from_pretrained(tmp_path, revision=None) is not None


def test_other_options_of_the_hub_do_not_matter_here() -> None:
    assert (
        resolve_checkpoint(TINY_BRAIN, revision=None, local_files_only=True, token=None)
        == pretrained.PACKAGED / TINY_BRAIN
    )


def test_a_name_of_the_hub_passes_its_revision_on(monkeypatch, tmp_path) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.append((repository, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    components()["transformer"].save_pretrained(tmp_path)
    model = bf.BinaryVQTransformer3DModel.from_pretrained("somebody/model", revision="v1")
    assert isinstance(model, torch.nn.Module)
    assert [(repository, options["revision"]) for repository, options in asked] == [("somebody/model", "v1")]
