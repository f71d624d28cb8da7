"""Forms of attention that the package does not have, computed in floating point with all N x N numbers, and other losses.

| variant | difference |
| --- | --- |
| row-maximum | ternary numbers of a whole row (column) have one scale, its largest entry, instead of one for each 64 |
| clipped-mean | that scale is three times the mean of the row's sizes; larger entries are cut (biased, less variance) |
| ternary-values | like row-maximum; the gradient of the values also uses ternary numbers instead of the probabilities |
| running-mean | queries and keys lose a mean over the batch's tokens, in evaluation a running one, as in batch norm |
| channel-groups | "hamming" with a weight for each of four groups of a head's channels |
| from-ste | straight-through in a random share of steps that falls from all to none at half time, else as configured |
| teacher:FOLDER | the loss is the mean of the training's own and the cross-entropy to a trained transformer's predictions |

The first five are registered as attention forms (:data:`FORMS`), so that their checkpoints load where this module is
imported.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_binaryformer.modeling.attention import attention_modules
from hf_binaryformer.modeling.attention_configuration import AttentionForm, attention_form, register_attention_form
from hf_binaryformer.modeling.attention_forms import attend_sign
from hf_binaryformer.modeling.token_weight import TokenWeight
from hf_binaryformer.training.loop import Task

MEANS = 3.0
CHANNEL_GROUPS = 4
RUNNING_SHARE = 0.05


def signs(x: Tensor) -> Tensor:
    """sgn(x), +1 at 0."""
    return torch.where(x >= 0, 1.0, -1.0)


def draw_ternary(g: Tensor, dim: int, rule: str) -> Tensor:
    """Random ternary numbers in place of g, with one scale along ``dim`` given by the rule."""
    size = g.abs()
    scale = MEANS * size.mean(dim, keepdim=True) if rule == "clipped-mean" else size.amax(dim, keepdim=True)
    drawn = torch.rand_like(size) * scale < size
    return torch.where(drawn, scale.copysign(g), 0.0)


class SimulatedSigns(torch.autograd.Function):
    """Attention of sign bits with the ternary gradient, all in float32: ``rule`` is a variant's name."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: Tensor, rule: str) -> Tensor:
        """(B, H, N, d), (B, H, N, d), (B, H, N, d_v) and a scale (H, 1, 1) -> (B, H, N, d_v)."""
        left, right = signs(query), signs(key)
        probability = (scale * (left @ right.mT)).softmax(-1)
        ctx.save_for_backward(query, key, value.float(), probability, scale)
        ctx.rule = rule
        return (probability @ value.float()).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Like hf_binaryformer/kernels/hamming.py, with other ternary numbers."""
        query, key, value, probability, scale = ctx.saved_tensors
        d_out = gradients[0].float()
        d_probability = d_out @ value.mT
        d_scores = probability * (d_probability - (probability * d_probability).sum(-1, keepdim=True))
        rows, columns = (draw_ternary(d_scores, dim, ctx.rule) for dim in (-1, -2))
        d_query = scale * (rows @ signs(key)) * (query.abs() <= 1)
        d_key = scale * (columns.mT @ signs(query)) * (key.abs() <= 1)
        d_scale = (d_scores * (signs(query) @ signs(key).mT)).sum((0, 2, 3))[:, None, None]
        weights = draw_ternary(probability, -2, ctx.rule) if ctx.rule == "ternary-values" else probability
        d_value = weights.mT @ d_out
        return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(gradients[0].dtype), d_scale, None


def attend_signs(rule: str, attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Like the package's "sign", with the ternary numbers of a rule."""
    heads = query.new_full((1, attention.num_heads, 1, 1), attention.scale, dtype=torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        return SimulatedSigns.apply(query, key, value, attention.scale_heads(heads)[0], rule)


class GroupWeight(TokenWeight):
    """A weight for each token, head and group of its channels."""

    def __init__(self, config: Any, head_dim: int, num_heads: int, **factory: Any) -> None:
        super().__init__(config, head_dim, num_heads, **factory)
        self.fc2 = nn.Conv1d(head_dim * num_heads // 2, num_heads * CHANNEL_GROUPS, 1, **factory)
        self.reset_parameters()


def group_weights(config: Any, head_dim: int, num_heads: int, factory: dict[str, Any]) -> dict[str, nn.Module]:
    """The networks theta of queries and of keys."""
    return {name: GroupWeight(config, head_dim, num_heads, **factory) for name in ("query_theta", "key_theta")}


def attend_channel_groups(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Like the package's "hamming", with weights (B, H G, N) on groups of channels; no gradient through the signs."""
    sides = []
    for x, theta in ((query, attention.query_theta), (key, attention.key_theta)):
        weight = theta(x).unflatten(1, (attention.num_heads, CHANNEL_GROUPS)).mT  # (B, H, N, G)
        per_channel = weight.repeat_interleave(attention.head_dim // CHANNEL_GROUPS, dim=-1)
        sides.append(signs(x).to(value.dtype) * per_channel)
    return F.scaled_dot_product_attention(sides[0], sides[1], value, scale=attention.scale)


class RunningMean(nn.Module):
    """Subtracts from each channel its mean over samples and tokens; in evaluation, the running mean of the training."""

    mean: Tensor

    def __init__(self, head_dim: int, num_heads: int, **factory: Any) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_heads, 1, head_dim, **factory))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, N, d) -> (B, H, N, d)."""
        if not self.training:
            return x - self.mean
        mean = x.float().mean((0, 2))[:, None]
        self.mean.lerp_(mean.detach(), RUNNING_SHARE)
        return (x.float() - mean).to(x.dtype)


def running_means(config: Any, head_dim: int, num_heads: int, factory: dict[str, Any]) -> dict[str, nn.Module]:
    """The means of queries and of keys."""
    return {name: RunningMean(head_dim, num_heads, **factory) for name in ("query_mean", "key_mean")}


def attend_running_mean(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Like the package's "sign"."""
    return attend_sign(attention, attention.query_mean(query), attention.key_mean(key), value)


def register() -> dict[str, str]:
    """Add the forms to the package's; returns the ``attention_type`` of each variant."""
    sign, hamming = attention_form("sign"), attention_form("hamming")
    forms = {}
    for rule in ("row-maximum", "clipped-mean", "ternary-values"):
        forms[rule] = AttentionForm(
            f"sign_{rule.replace('-', '_')}",
            f"{sign.scores}, ternary gradient by {rule}",
            partial(attend_signs, rule),
            reads=("bit_gradient",),
            takes_bit_gradient=True,
            default_bit_gradient="ternary",
        )
    forms["running-mean"] = AttentionForm(
        "sign_running_mean",
        f"{sign.scores}, signs of what differs from a running mean",
        attend_running_mean,
        reads=sign.reads,
        has_bits=True,
        takes_bit_gradient=True,
        default_bit_gradient=sign.default_bit_gradient,
        parts=running_means,
    )
    forms["channel-groups"] = AttentionForm(
        "hamming_channel_groups",
        f"{hamming.scores}, one for each group of channels",
        attend_channel_groups,
        reads=hamming.reads[1:],
        parts=group_weights,
    )
    return {variant: register_attention_form(form).name for variant, form in forms.items()}


FORMS = register()
Losses = Callable[[nn.Module, Any, int], dict[str, Tensor]]


def from_ste(task: Task, train: dict[str, Any]) -> Losses:
    """The script's losses, with a gradient of the bits that is drawn for each step; a resumed run draws the same."""
    modules = attention_modules(task.model)
    configured = [module.config.bit_gradient for module in modules]

    def losses(network: nn.Module, batch: Any, step: int) -> dict[str, Tensor]:
        straight = random.Random(step).random() >= 2 * step / train["iterations"]
        for module, own in zip(modules, configured, strict=True):
            module.config.bit_gradient = "ste" if straight else own
        return task.losses(network, batch, step)

    return losses


def taught(teacher: nn.Module, task: Task, train: dict[str, Any]) -> Losses:
    """Half the script's loss, half the cross-entropy of masked tokens to the teacher's predictions, in nats."""
    seen: list[Tensor] = []
    task.model.head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    config = task.model.config

    def losses(network: nn.Module, batch: Any, step: int) -> dict[str, Tensor]:
        losses = task.losses(network, batch, step)
        _, noisy, masked, *_ = batch
        with torch.no_grad():
            target = teacher.to(noisy.device)(noisy).logits.float().softmax(2)  # (B, K, V, d, h, w)
        logits = seen.pop().float().unflatten(2, (config.num_codebooks, config.codebook_size)).permute(0, 2, 3, 1)
        seen.clear()  # outputs of validations
        per_token = -(target * logits.log_softmax(2).unflatten(3, noisy.shape[2:])).sum(2)
        lesson = (per_token * masked).sum() / masked.sum().clamp_min(1)
        return losses | {"loss": (losses["loss"] + lesson) / 2, "lesson": lesson}

    return losses
