"""Tells whether a network may compute with a layer's weights and skip the layer's own forward."""

from __future__ import annotations

from torch import nn


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``layer`` would do only what every ``kind`` does with its weights.

    This is False for layers with hooks (activation recorders, profilers, offloading). It is also False for layers of
    another class that replace one (LoRA wrappers, quantised layers, parametrizations).
    """
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) is kind and not any(hooks) and "forward" not in vars(layer)
