"""Exported graphs: standard operators alone, and the network's logits, in torch and in onnxruntime."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

import hf_binaryformer as bf
from hf_binaryformer.modeling.attention_configuration import attention_forms
from hf_binaryformer.modeling.exporting import OPSET, export_onnx, export_program

TINY = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "num_heads": 2, "num_hidden_layers": 2, "num_labels": 3}
TINY |= {"value_head_dim": 4, "decoder_hidden_size": 32, "initializer_range": 0.2}
BALANCED = {"query_key_centering": "tokens", "query_key_norm": "rms", "learned_logit_scale": True}
# Rounding differs from the operator's; relative to logits of about 10.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def network(**fields) -> bf.BinaryFormerForSemanticSegmentation:
    torch.manual_seed(2)
    return bf.BinaryFormerForSemanticSegmentation(bf.BinaryFormerConfig(**TINY, **fields))


@pytest.mark.parametrize("balance", [{}, BALANCED], ids=["plain", "balanced"])
@pytest.mark.parametrize("form", [one.name for one in attention_forms() if one.name != "hamming_bernoulli"])
def test_a_program_of_standard_operators(form, balance):
    model = network(attention_type=form, **balance).train()
    program = export_program(model, height=24)
    assert model.training
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called and not [name for name in called if "binaryformer" in name]
    image = torch.randn(3, 3, 24, 16)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(image), model.eval()(image).logits, **TOLERANCE)


# The paper's form, and that of the recipes and of the packaged network.
@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    [
        {"attention_type": "hamming"},
        {"attention_type": "sign", "bit_gradient": "ternary", **BALANCED},
        {"attention_type": "sign", "bit_gradient": "ternary", "learned_logit_scale": True, "decoder_image_skip": True},
    ],
    ids=["hamming", "recipes", "tiny-brain"],
)
def test_the_onnx_file_in_onnxruntime(form, tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model = network(**form).eval()
    path = export_onnx(model, tmp_path / "network.onnx")
    assert [one.name for one in tmp_path.iterdir()] == ["network.onnx"]
    graph = onnx.load(path)
    assert [(one.domain, one.version) for one in graph.opset_import] == [("", OPSET)]
    assert {node.domain for node in graph.graph.node} == {""}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        image = torch.randn(batch, 3, 16, 16)
        (found,) = session.run(["logits"], {"pixel_values": image.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(found, model(image).logits.numpy(), **TOLERANCE)


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="draws random numbers"):
        export_program(network(attention_type="hamming_bernoulli"))
    with pytest.raises(ValueError, match="multiples of the patch size 4"):
        export_program(network(), width=18)
    with pytest.raises(ValueError, match=r"ends in \.onnx"):
        export_onnx(network(), tmp_path / "network.pt")
    with pytest.raises(ValueError, match="call model.cpu"):
        export_program(network().to("meta"))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"hf-binaryformer\[onnx\]"):
        export_onnx(network(), tmp_path / "network.onnx")
