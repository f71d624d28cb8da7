"""Larger networks that begin with what a smaller one computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import typer

import hf_binaryformer as bf
from hf_binaryformer.training.growing import grow_weights

SMALL = {
    "image_size": 32, "patch_size": 4, "num_channels": 2, "hidden_size": 24, "num_heads": 3, "value_head_dim": 4,
    "num_hidden_layers": 2, "mlp_ratio": 2.0, "decoder_hidden_size": 32, "decoder_image_skip": True, "decoder_num_convs": 1,
    "num_labels": 5, "attention_type": "sign", "bit_gradient": "ternary", "query_key_centering": "tokens",
    "query_key_norm": "rms", "learned_logit_scale": True, "class_token": False,
}  # fmt: skip


def network(**fields: object) -> bf.BinaryFormerForSemanticSegmentation:
    model = bf.BinaryFormerForSemanticSegmentation(bf.BinaryFormerConfig(**(SMALL | fields))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def small(tmp_path: Path) -> tuple[str, bf.BinaryFormerForSemanticSegmentation]:
    torch.manual_seed(0)
    model = network()
    model.save_pretrained(tmp_path)
    return str(tmp_path), model


@pytest.mark.parametrize(
    "larger",
    [
        {},
        {"hidden_size": 48},
        {"hidden_size": 72, "num_hidden_layers": 5, "value_head_dim": 8},
        {"num_hidden_layers": 3},
        {"mlp_ratio": 3.0},  # 72 hidden channels are no multiple of 48: some have one copy more
        {"decoder_hidden_size": 96},
        {
            "hidden_size": 48,
            "num_hidden_layers": 4,
            "mlp_ratio": 4.0,
            "decoder_hidden_size": 64,
            "decoder_expansion": 2.0,
        },
    ],
    ids=lambda larger: "-".join(larger) or "same",
)
def test_the_larger_network_computes_the_same(larger, small):
    name, model = small
    grown = grow_weights(name, bf.BinaryFormerConfig(**(SMALL | larger)), noise=0.0).eval()
    x = torch.randn(2, 2, 32, 32)
    with torch.no_grad():
        wanted, found = model(x).logits, grown(x).logits
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * wanted.std().item())
    assert sum(p.numel() for p in grown.parameters()) > sum(p.numel() for p in model.parameters()) or not larger


def test_widths_that_are_no_multiples_come_close(small):
    """Group normalisation then sees other means. Unrelated logits would differ by more than their deviation."""
    name, model = small
    grown = grow_weights(name, bf.BinaryFormerConfig(**(SMALL | {"decoder_hidden_size": 48})), noise=0.0).eval()
    x = torch.randn(2, 2, 32, 32)
    with torch.no_grad():
        wanted, found = model(x).logits, grown(x).logits
    assert 0 < (found - wanted).std() < 0.3 * wanted.std()


def test_noise_parts_the_copies(small):
    name, _ = small
    config = bf.BinaryFormerConfig(**(SMALL | {"hidden_size": 48}))
    equal, apart = (
        grow_weights(name, config, noise).binaryformer.encoder.patch_embed.proj.weight for noise in (0.0, 0.1)
    )
    assert torch.equal(equal[:24], equal[24:])
    assert (apart[:24] - apart[24:]).std().item() == pytest.approx(0.1 * 2**0.5 * equal.std().item(), rel=0.1)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 12},
        {"num_hidden_layers": 1},
        {"decoder_hidden_size": 16, "patch_size": 4},
        {"value_head_dim": 2},
        {"num_heads": 6},
        {"query_key_norm": "none"},
        {"num_labels": 6},
        {"decoder_num_convs": 2},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_smaller_and_other_networks_are_refused(fields, small):
    with pytest.raises(typer.BadParameter, match="grow_from"):
        grow_weights(small[0], bf.BinaryFormerConfig(**(SMALL | fields)), noise=0.0)
