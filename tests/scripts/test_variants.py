"""Forms of attention that only the experiments have, against straight-through gradients and the package's own forms."""

from __future__ import annotations

import csv
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import typer
from torch import Tensor

import gradient_variance
import train_variant
import variants
from hf_binaryformer.modeling.attention import BinaryAttention
from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.vq_transformer import BinaryVQTransformer3DModel
from hf_binaryformer.training import loop


def attention(kind: str, **fields: Any) -> BinaryAttention:
    torch.manual_seed(0)
    config = BinaryFormerConfig(attention_type=kind, value_head_dim=4, hidden_size=16, num_heads=2, **fields)
    return BinaryAttention(16, 2, config=config)


def gradients(module: BinaryAttention, x: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and gradients of the projections and of the learned scale."""
    output = module(x)
    return output.detach(), *torch.autograd.grad(output, (module.qkv.weight, module.log_scale), cotangent)


@pytest.mark.parametrize("rule", ["row-maximum", "ternary-values", "clipped-mean"])
def test_other_ternary_gradients_have_the_straight_through_one_as_mean(rule):
    """Exactly, for the unbiased two; "clipped-mean" cuts the largest entries and so falls short, but not far."""
    x, cotangent = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    plain = attention("sign", bit_gradient="ste", learned_logit_scale=True)
    module = attention(variants.FORMS[rule], bit_gradient="ternary", learned_logit_scale=True)
    for one in (plain, module):
        one.log_scale.data = torch.tensor([0.5, -0.3])
    output, wanted, wanted_of_scale = gradients(plain, x, cotangent)
    runs = [gradients(module, x, cotangent) for _ in range(400)]
    torch.testing.assert_close(runs[0][0], output)
    torch.testing.assert_close(runs[0][2], wanted_of_scale)
    drawn = torch.stack([gradient for _, gradient, _ in runs])
    rest = (drawn.mean(0) - wanted).abs() / (drawn.std(0) / len(runs) ** 0.5 + 1e-6)
    random = slice(None) if rule == "ternary-values" else slice(32)
    assert (drawn.std(0)[random] > 0).float().mean() > 0.9
    if rule == "clipped-mean":
        assert 0.85 < F.cosine_similarity(drawn.mean(0)[:32].flatten(), wanted[:32].flatten(), dim=0) <= 1
    else:
        assert rest.max() < 5
    assert (rule == "ternary-values") == bool(drawn.std(0)[32:].any()), "only one of them draws for the values"


def test_channel_groups_with_equal_weights_are_the_papers_form():
    x = torch.randn(2, 9, 16)
    plain = attention("hamming")
    wanted = plain(x)
    module = attention(variants.FORMS["channel-groups"])
    module.load_state_dict({k: v for k, v in plain.state_dict().items() if "fc2" not in k}, strict=False)
    for theta, own in ((module.query_theta, plain.query_theta), (module.key_theta, plain.key_theta)):
        for mine, theirs in ((theta.fc2.weight, own.fc2.weight), (theta.fc2.bias, own.fc2.bias)):
            mine.data = theirs.detach().repeat_interleave(variants.CHANNEL_GROUPS, dim=0)
    torch.testing.assert_close(module(x), wanted)
    module.query_theta.fc2.bias.data[0] += 0.5
    assert not torch.allclose(module(x), wanted)


def test_a_running_mean_is_the_batch_mean_in_training_and_its_average_in_evaluation():
    fields = {"bit_gradient": "ste", "query_key_norm": "rms"}
    module = attention(variants.FORMS["running-mean"], **fields)
    plain = attention("sign", query_key_centering="tokens", **fields)
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if "mean" not in k})
    one = torch.randn(1, 9, 16) + 3
    # With one sample, the mean over samples and tokens is that over the tokens.
    torch.testing.assert_close(module(one), plain(one))
    two = torch.cat([one, -one])
    assert not torch.allclose(module(two), plain(two))
    for _ in range(300):
        module(one)
    module.eval()
    torch.testing.assert_close(module(one), plain(one), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(module(torch.cat([one, two]))[:1], module(one))


def test_from_ste_changes_the_gradient_little_by_little():
    seen = []
    module = attention("hamming", bit_gradient="none")
    model = torch.nn.ModuleList([module, BinaryAttention(16, 2, config=module.config)])  # which share one configuration

    def losses(network: Any, batch: Any, step: int) -> dict[str, Tensor]:
        assert module.config.bit_gradient == model[1].config.bit_gradient
        seen.append(module.config.bit_gradient == "ste")
        return {}

    changed = variants.from_ste(loop.Task(model, None, None, losses), {"iterations": 2000})
    for step in range(2000):
        changed(None, None, step)
    first = list(seen)
    assert [sum(first[i : i + 500]) / 500 for i in range(0, 2000, 500)] == pytest.approx([0.75, 0.25, 0, 0], abs=0.06)
    assert first[0] and module.config.bit_gradient == "none"
    for step in range(2000):
        changed(None, None, step)
    assert seen[2000:] == first, "a resumed training draws the same"


def test_the_lesson_is_the_cross_entropy_to_the_teacher(tmp_path):
    torch.manual_seed(0)
    sizes = dict(grid_size=(1, 2, 3), num_codebooks=2, codebook_size=5, embedding_dim=8, num_layers=1, num_heads=2)
    teacher, student = (BinaryVQTransformer3DModel(**sizes, attention_type="softmax") for _ in range(2))
    tokens = torch.randint(5, (4, 2, 1, 2, 3))
    masked = torch.rand(4, 2, 1, 2, 3) < 0.5
    noisy = tokens.masked_fill(masked, student.mask_token_id)
    task = SimpleNamespace(
        model=student, losses=lambda network, batch, step: {"loss": network(batch[1]).logits.sum() * 0 + 3}
    )
    losses = variants.taught(teacher, task, {})
    for _ in range(2):  # a validation between steps leaves nothing behind
        got = losses(student, (tokens, noisy, masked, None, None), 0)
        student(noisy)
    rows = [t(noisy).logits.permute(0, 1, 3, 4, 5, 2)[masked] for t in (student, teacher)]
    wanted = F.cross_entropy(rows[0], rows[1].softmax(-1))
    torch.testing.assert_close(got["lesson"], wanted)
    torch.testing.assert_close(got["loss"], (3 + wanted) / 2)


def test_an_unknown_variant_is_refused(tmp_path):
    with pytest.raises(typer.BadParameter, match="no variant 'x'"):
        train_variant.main("x", "brain-small", tmp_path, tmp_path / "run")


def test_noise_of_unbiased_and_of_clipped_ternary_numbers(tmp_path):
    """Blocks bound the noise where one scale a row does not; clipping trades it for bias."""
    gradient_variance.main([256], [1.0], 24, tmp_path)
    with (tmp_path / "runs.csv").open() as file:
        rows = {row["scale"]: {k: float(v) for k, v in row.items() if k != "scale"} for row in csv.DictReader(file)}
    block, row, clipped = (rows[name] for name in gradient_variance.RULES)
    assert clipped["query noise"] < block["query noise"] < row["query noise"]
    assert max(block["query bias"], block["weights bias"]) < 0.25 < clipped["query bias"]
    assert (tmp_path / "noise.png").stat().st_size > 1000 and "| 256 |" in (tmp_path / "README.md").read_text()
