"""The optimizer of every training, and its learning-rate schedule."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_binaryformer.modeling.attention import BinaryAttention


def rate_factor(step: int, train: dict[str, Any]) -> float:
    """Learning-rate factor: linear warm-up, then cosine to 0, or the paper's steps (x decay_factor every decay_every)."""
    warmup = train["warmup"]
    if step < warmup:
        return train["warmup_start"] + (1 - train["warmup_start"]) * step / warmup
    if train["schedule"] == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(train["iterations"] - warmup, 1)))
    return train["decay_factor"] ** ((step - warmup) // train["decay_every"])


def build_optimizer(model: nn.Module, train: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW; the weight networks theta and the learned scales have learning rates of their own; vectors do not decay.

    With ``freeze_query_key`` the projections to queries and keys keep their random initial values. This is a control
    for what attention learns.
    """
    frozen = train.get("freeze_query_key")  # recipes of networks without attention do not have this setting
    if frozen:
        for attention in (module for module in model.modules() if isinstance(module, BinaryAttention)):
            for parameter in attention.qkv.parameters():
                parameter.register_hook(partial(_without_rows, rows=2 * attention.query_key_dim))
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        scale = train["theta_lr_scale"] if "_theta." in name else 1.0
        if name.endswith(".log_scale"):
            scale = train["log_scale_lr_scale"]
        decays = parameter.dim() > 1 and not (frozen and ".qkv." in name)
        decay = train["weight_decay"] if decays else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    rate = train["learning_rate"]
    per_group = [{"params": p, "lr": rate * s, "weight_decay": d} for (s, d), p in groups.items()]
    return torch.optim.AdamW(per_group, betas=train["betas"], eps=train["epsilon"])


def _without_rows(gradient: Tensor, rows: int) -> Tensor:
    """The gradient with its first rows at zero."""
    kept = gradient.clone()
    kept[:rows] = 0
    return kept
