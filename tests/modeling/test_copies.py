"""Every public object can be pickled, saved whole, copied, and sent to a process that starts anew."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel
from vq_cases import components, inpainting, synthesis

import hf_binaryformer as bf
from hf_binaryformer.modeling import BinaryAttention
from hf_binaryformer.modeling.attention import attention_modules
from hf_binaryformer.modeling.vq_quantizer import ProductQuantizer

TYPES = ["softmax", "sign", "sign_stopgrad", "hamming", "hamming_grouped", "hamming_bernoulli", "uniform"]
SIZES = {"image_size": 16, "num_channels": 1, "hidden_size": 24, "num_heads": 2, "value_head_dim": 4}
SIZES |= {"num_hidden_layers": 2, "decoder_hidden_size": 32, "num_labels": 3}
PIXELS = (2, 1, 16, 16)


def config(**fields: Any) -> bf.BinaryFormerConfig:
    return bf.BinaryFormerConfig(**{**SIZES, **fields})


def transformer(**fields: Any) -> bf.BinaryVQTransformer3DModel:
    sizes = {"grid_size": (2, 3, 2), "num_codebooks": 2, "codebook_size": 5, "embedding_dim": 8}
    return bf.BinaryVQTransformer3DModel(**sizes, num_layers=2, num_heads=2, value_head_dim=4, **fields)


def binarized() -> nn.Module:
    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=2, num_classes=3)
    return bf.binarize_attention(vit)


def binarized_eva() -> nn.Module:
    vit = timm.create_model("eva02_tiny_patch14_224", pretrained=False, img_size=28, depth=2, num_classes=3)
    return bf.binarize_attention(vit)


def binarized_dinov3() -> nn.Module:
    sizes = {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 64}
    return bf.binarize_attention(DINOv3ViTModel(DINOv3ViTConfig(**sizes, image_size=32, patch_size=8)))


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


# For each kind: how it is made, and an input.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "tokens": (lambda: bf.BinaryFormerModel(config()), lambda: torch.randn(PIXELS)),
    "segmentation": (lambda: bf.BinaryFormerForSemanticSegmentation(config()), lambda: torch.randn(PIXELS)),
    "classification": (lambda: bf.BinaryFormerForImageClassification(config()), lambda: torch.randn(PIXELS)),
    "shared attention": (lambda: bf.BinaryFormerModel(config(share_attention=True)), lambda: torch.randn(PIXELS)),
    "token transformer": (transformer, lambda: torch.randint(6, (2, 2, 2, 3, 2))),
    "shared token transformer": (lambda: transformer(share_attention=True), lambda: torch.randint(6, (2, 2, 2, 3, 2))),
    "autoencoder": (lambda: components()["vqmodel"], lambda: torch.rand(1, 1, 16, 16, 16)),
    "quantiser": (lambda: ProductQuantizer(2, 8, 4), lambda: torch.randn(1, 8, 2, 2, 2)),
    "binarized timm": (binarized, lambda: torch.randn(1, 3, 32, 32)),
    "binarized rotary timm": (binarized_eva, lambda: torch.randn(1, 3, 28, 28)),
    "binarized transformers": (binarized_dinov3, lambda: torch.randn(1, 3, 32, 32)),
    **{
        f"attention {kind}": (
            lambda kind=kind: BinaryAttention(24, 2, config=config(attention_type=kind)),  # type: ignore[misc]
            lambda: torch.randn(2, 7, 24),
        )
        for kind in TYPES
    },
}


def saved_whole(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_whole,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_a_copy_computes_the_same_and_is_independent(name, way) -> None:
    make, draw = MODELS[name]
    model, x = make().eval(), draw()
    again = WAYS[way](model)
    assert type(again) is type(model) and not again.training
    torch.manual_seed(1)
    with torch.no_grad():
        expected = first(model(x))
        torch.manual_seed(1)
        assert torch.equal(first(again(x)), expected)
        for tensor in [*again.parameters(), *again.buffers()]:
            tensor.zero_()
        torch.manual_seed(1)
        assert torch.equal(first(model(x)), expected), "the copy shares no tensor with the original"
    assert len(attention_modules(again)) == len(attention_modules(model))


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_settings_that_are_not_saved_are_copied(way) -> None:
    model = bf.BinaryFormerModel(config(attention_type="hamming_bernoulli")).eval()
    model.set_attention_backend("reference")
    model.gradient_checkpointing_enable()
    model.set_attention_generator(torch.Generator().manual_seed(5))
    again = WAYS[way](model)
    x = torch.randn(PIXELS)
    assert torch.equal(model(x)[0], again(x)[0])
    assert {attention.backend for attention in attention_modules(again)} == {"reference"}
    assert again.gradient_checkpointing


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["segmentation", "token transformer", "autoencoder"])
def test_gradient_checkpointing_is_copied(name, way) -> None:
    make, draw = MODELS[name]
    model, x = make().train(), draw()
    enable = getattr(model, "gradient_checkpointing_enable", None) or model.enable_gradient_checkpointing
    enable()
    again = WAYS[way](model)
    gradients = []
    for one in (model, again):
        torch.manual_seed(1)
        first(one(x)).pow(3).sum().backward()
        gradients.append([p.grad for p in one.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert any(getattr(module, "gradient_checkpointing", False) for module in again.modules())


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_pipelines_and_their_other_components(way) -> None:
    copied = WAYS[way]
    scheduler, processor = components()["scheduler"], bf.BinaryFormerImageProcessor(image_size=(16, 16))
    assert copied(scheduler).config == scheduler.config
    assert copied(processor).to_dict() == processor.to_dict()
    assert copied(config()) == config()
    for pipeline in (synthesis(), inpainting()):
        again = copied(pipeline)
        assert type(again) is type(pipeline)
        state = again.transformer.state_dict()
        assert all(torch.equal(state[key], t) for key, t in pipeline.transformer.state_dict().items())
    pipeline = synthesis()
    options = {"num_inference_steps": 3, "output_type": "tokens"}
    expected = pipeline(generator=torch.Generator().manual_seed(2), **options).tokens
    assert torch.equal(copied(pipeline)(generator=torch.Generator().manual_seed(2), **options).tokens, expected)
    model = bf.BinaryFormerForSemanticSegmentation(config())
    processor = bf.BinaryFormerImageProcessor(num_slices=1, image_size=(16, 16), slice_position=False)
    whole = copied(bf.VolumeSegmentationPipeline(model, processor, batch_size=3))
    assert whole.batch_size == 3 and whole.label_names == model.config.id2label


def _output(model: nn.Module, x: Tensor) -> list[float]:
    with torch.no_grad():
        return first(model(x)).flatten()[:20].tolist()


@pytest.mark.slow
def test_a_process_that_starts_anew_takes_a_model() -> None:
    model, x = bf.BinaryFormerModel(config()).eval(), torch.randn(PIXELS)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_output, (model, x)) == _output(model, x)
