"""Probes of a training: they measure attention as the network computes it, and change nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from toys import write_sampler_recipe, write_tokens

import train_probed
from hf_binaryformer.modeling.attention import BinaryAttention
from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.vq_transformer import BinaryVQTransformer3DModel
from hf_binaryformer.pipelines.absorbing_scheduler import AbsorbingScheduler
from hf_binaryformer.training import sampler
from hf_binaryformer.training.run_log import read_log

BALANCED = {"query_key_centering": "tokens", "query_key_norm": "rms"}


@pytest.mark.parametrize("balance", [{}, BALANCED], ids=["plain", "balanced"])
@pytest.mark.parametrize("learned_scale", [False, True])
@pytest.mark.parametrize("kind", ["softmax", "uniform", "sign", "sign_stopgrad", "hamming", "hamming_grouped"])
def test_probed_scores_are_those_that_attention_uses(kind, learned_scale, balance):
    torch.manual_seed(0)
    fields = dict(attention_type=kind, learned_logit_scale=learned_scale, **balance)
    attention = BinaryAttention(
        16, 2, config=BinaryFormerConfig(value_head_dim=4, hidden_size=16, num_heads=2, **fields)
    )
    if attention.log_scale is not None:
        torch.nn.init.normal_(attention.log_scale)
    x = torch.randn(3, 7, 16)
    score, weights = train_probed.scores(attention, x)
    value = attention.project(x)[2]
    expected = attention.proj((score.softmax(-1) @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), expected)
    assert (weights.numel() > 1) == kind.startswith("hamming")
    torch.testing.assert_close(train_probed.simulated(attention, x), expected)


def test_the_entropy_of_bits_is_1_where_they_split_the_tokens():
    torch.manual_seed(0)
    config = BinaryFormerConfig(attention_type="sign", value_head_dim=4, hidden_size=16, num_heads=2)
    attention = BinaryAttention(16, 2, qkv_bias=True, config=config)
    x = torch.randn(3, 400, 16)
    with torch.no_grad():
        attention.qkv.bias.zero_()
        assert 0.98 < train_probed.bit_entropy(attention, x) <= 1
        # A quarter of the tokens on one side: 0.811 bits, in half of the channels.
        query = attention.project(x)[0]
        attention.qkv.bias[:16] = -query.transpose(1, 2).flatten(2).flatten(0, 1).quantile(0.75, 0)
        quarter = -0.25 * np.log2(0.25) - 0.75 * np.log2(0.75)
        assert train_probed.bit_entropy(attention, x) == pytest.approx((quarter + 1) / 2, abs=0.02)
        attention.qkv.bias[:32] = 100.0
        assert train_probed.bit_entropy(attention, x) == 0
        balanced = BinaryAttention(
            16,
            2,
            qkv_bias=True,
            config=BinaryFormerConfig(attention_type="sign", value_head_dim=4, hidden_size=16, num_heads=2, **BALANCED),
        )
        balanced.load_state_dict(attention.state_dict())
        assert train_probed.bit_entropy(balanced, x) > 0.98


def test_probes_look_at_float32_and_at_the_mean_of_ternary_gradients():
    """However the network is cast for training, and as often as one looks."""
    torch.manual_seed(0)
    sizes = dict(grid_size=(1, 2, 6), num_codebooks=1, codebook_size=5, embedding_dim=16, num_layers=2, num_heads=2)
    network = BinaryVQTransformer3DModel(**sizes, attention_type="sign", bit_gradient="ternary")
    straight = BinaryVQTransformer3DModel(**sizes, attention_type="sign", bit_gradient="ste")
    straight.load_state_dict(network.state_dict())
    scheduler = AbsorbingScheduler(num_train_timesteps=40, num_codebooks=1, mask_token_id=5)
    tokens = torch.randint(5, (4, 1, 1, 2, 6))
    probe, reference = (train_probed.Probe(one, scheduler, tokens) for one in (network, straight))
    network.forward = torch.autocast("cpu", torch.bfloat16)(network.forward)
    assert probe() == probe() == reference()
    found = probe.agreement()
    assert found["same_tokens"] == 1 and found["logit_difference"] < 1e-5
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.1)
    assert probe()["gradient"] != reference()["gradient"], "it looks at the weights of now"


def test_a_probed_training_is_the_training(tmp_path):
    (tmp_path / "tokens").mkdir()
    tokens, recipe = write_tokens(tmp_path / "tokens"), write_sampler_recipe(tmp_path / "toy.yaml")
    last_weights = ["sampler.ema_decay=0", "transformer.dropout=0"]
    sampler.main(str(recipe), tokens, tmp_path / "plain", overrides=last_weights)
    train_probed.main(str(recipe), tokens, tmp_path / "probed", probed=4, overrides=last_weights)
    losses, probed = (read_log(tmp_path / name / "log.jsonl") for name in ("plain", "probed"))
    assert [r["loss"] for r in losses] == [r["loss"] for r in probed]
    figures = json.loads((tmp_path / "probed" / "probe.json").read_text())
    assert figures["end"] == {key: probed[-1][key] for key in figures["end"]} and figures["start"] != figures["end"]
    assert (
        0 < figures["end"]["entropy"] < np.log(12)
        and figures["end"]["weight"] == 1
        and figures["start"]["gradient"] > 0
    )
    assert figures["same_tokens"] == 1 and figures["logit_difference"] < 1e-4
