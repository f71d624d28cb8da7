"""The registry of attention forms: an entry says all that the rest of the package asks of a form."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import hf_binaryformer as bf
from hf_binaryformer.modeling import AttentionConfig, BinaryAttention, attention_configuration
from hf_binaryformer.modeling.attention_configuration import (
    AttentionForm,
    attention_form,
    attention_forms,
    register_attention_form,
)
from hf_binaryformer.modeling.decoder import ShuffleBlock, UnshuffleBlock

DIM, HEADS = 16, 2
# Another value of every field that one form reads and others do not.
OTHER: dict[str, Any] = {
    "bit_gradient": "none",
    "sigma_beta": 1.7,
    "sigma_cap": 0.2,
    "weight_bias_init": 1.9,
    "weight_activation": "bounded",
    "weight_max": 1.3,
    "weight_input_norm": True,
    "grouped_layout": "concatenated",
    "bernoulli_transpose_heads": False,
    "initializer_range": 0.5,
}
# What every form reads, and the softmax form's fields for weights of any form.
COMMON = {
    "attention_type",
    "query_key_centering",
    "query_key_norm",
    "query_key_head_dim",
    "value_head_dim",
    "logit_scale",
    "learned_logit_scale",
    "share_attention",
}


def results(**fields: Any) -> list[Tensor]:
    """Output and gradient of a module whose weights depend on the seed alone."""
    torch.manual_seed(3)
    module = BinaryAttention(DIM, HEADS, qkv_bias=True, config=AttentionConfig(value_head_dim=4, **fields))
    module.generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, DIM, requires_grad=True)
    out = module(x)
    out.square().sum().backward()
    return [out.detach(), x.grad]


@pytest.mark.parametrize("field", OTHER)
@pytest.mark.parametrize("form", attention_forms(), ids=lambda form: form.name)
def test_a_form_reads_what_its_entry_says(form: AttentionForm, field: str) -> None:
    kind = {"attention_type": form.name}
    if field == "weight_max":
        kind["weight_activation"] = "bounded"
    before = results(**kind)
    after = results(**kind, **{field: OTHER[field]})
    same = all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    # "none" is what forms without a default have anyway.
    reads = field in form.reads and not (field == "bit_gradient" and form.default_bit_gradient == "none")
    assert same != reads


def test_every_field_is_asked_of_some_form() -> None:
    names = {field.name for field in dataclasses.fields(AttentionConfig)}
    assert names == COMMON | {*OTHER}
    assert {name for form in attention_forms() for name in form.reads} == {*OTHER}


@pytest.fixture
def first_token(monkeypatch) -> None:
    """A form of somebody else: every token takes the first one's value, and a learned number times that."""
    monkeypatch.setattr(attention_configuration, "_forms", dict(attention_configuration._forms))

    def attend(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention.number * value[:, :, :1].expand_as(value)

    class Number(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.tensor(2.0))

        def __rmul__(self, other: Tensor) -> Tensor:
            return self.value * other

        __mul__ = __rmul__

    register_attention_form(
        AttentionForm("first", "v_0", attend, has_queries=False, parts=lambda *_: {"number": Number()})
    )


def test_a_form_of_others_works_in_every_network(first_token, tmp_path) -> None:
    config = bf.BinaryFormerConfig(
        attention_type="first", image_size=16, hidden_size=24, num_heads=2, num_hidden_layers=2, num_labels=3,
        decoder_hidden_size=32, value_head_dim=None,
    )  # fmt: skip
    model = bf.BinaryFormerForSemanticSegmentation(config).eval()
    image = torch.randn(1, 3, 16, 16)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["attention_type"] == "first"
    again = bf.BinaryFormerForSemanticSegmentation.from_pretrained(tmp_path)
    torch.testing.assert_close(again(image).logits, model(image).logits)
    assert any(key.endswith("attn.number.value") for key in model.state_dict())

    denoiser = bf.BinaryVQTransformer3DModel(grid_size=(2, 2, 2), num_layers=1, attention_type="first")
    assert denoiser(torch.full((1, 8, 2, 2, 2), 64)).logits.shape == (1, 8, 64, 2, 2, 2)
    vit = bf.binarize_attention(timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=1), config)
    assert vit(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)


def test_an_unknown_form_is_refused_with_those_that_exist() -> None:
    for make in (bf.BinaryFormerConfig, AttentionConfig, lambda **f: bf.BinaryVQTransformer3DModel((1, 1, 1), **f)):
        with pytest.raises(Exception, match="attention_type is 'abacus', expected one of softmax, sign") as caught:
            make(attention_type="abacus")
        assert "hamming_bernoulli" in str(caught.value)
    assert attention_form("uniform").has_queries is False


def test_attention_stands_in_flat_json(tmp_path) -> None:
    # Files are flat, and old ones without a field load with its default.
    model = bf.BinaryVQTransformer3DModel(grid_size=(1, 2, 2), num_layers=1, attention_type="sign", logit_scale=4.0)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {field.name for field in dataclasses.fields(AttentionConfig)} <= config.keys()
    del config["learned_logit_scale"], config["grouped_layout"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = bf.BinaryVQTransformer3DModel.from_pretrained(tmp_path)
    assert (again.config.attention_type, again.config.logit_scale, again.config.grouped_layout) == (
        "sign",
        4.0,
        "per_head",
    )
    with pytest.raises(TypeError, match="unexpected keyword"):
        bf.BinaryVQTransformer3DModel(grid_size=(1, 2, 2), colour="red")


class Wrapper(nn.Module):
    """As adapters do: the layer's own output, and something on top."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 1


def networks() -> list[tuple[nn.Module, Tensor, str]]:
    torch.manual_seed(0)
    config = AttentionConfig(attention_type="hamming", value_head_dim=4)
    theta = BinaryAttention(DIM, HEADS, config=config).query_theta
    pixels = torch.randn(1, 4, 6, 6).double().contiguous(memory_format=torch.channels_last)
    return [(theta, torch.randn(2, HEADS, 5, 8), "fc1"), (theta, torch.randn(2, HEADS, 5, 8), "fc2"),
            (UnshuffleBlock(4, 1.5), torch.randn(1, 4, 6, 6), "fc1"),
            (ShuffleBlock(4).double(), pixels, "fc1"), (ShuffleBlock(4).double(), pixels, "fc2")]  # fmt: skip


@pytest.mark.parametrize("number", range(5))
def test_hooks_and_wrappers_of_layers_act(number: int) -> None:
    """A network that computes with a layer's weights must not pass over what somebody put around the layer."""
    network, x, name = networks()[number]
    plain, seen = network(x), []
    handle = getattr(network, name).register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(network(x), plain)
    assert seen == [1]
    handle.remove()
    layer = getattr(network, name)
    setattr(network, name, Wrapper(layer))
    wrapped = network(x)
    assert not torch.allclose(wrapped, plain)
    # The wrapper's 1 is a bias of 1.
    setattr(network, name, layer)
    layer.bias.data += 1
    torch.testing.assert_close(network(x), wrapped)


def test_the_configuration_alone_knows_the_forms_and_keeps_those_of_others() -> None:
    code = """if True:
        from hf_binaryformer.modeling.attention_configuration import AttentionConfig
        assert AttentionConfig().form.name == "hamming"
        """
    first = """if True:
        from hf_binaryformer.modeling.attention_configuration import AttentionForm, attention_form, attention_forms
        from hf_binaryformer.modeling.attention_configuration import register_attention_form
        mine = register_attention_form(AttentionForm("softmax", "mine", print))
        assert attention_form("hamming") and attention_form("softmax") is mine and len(attention_forms()) > 6
        """
    for one in (code, first):
        subprocess.run([sys.executable, "-c", one], check=True, capture_output=True)
