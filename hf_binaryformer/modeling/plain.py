"""When a network may compute with a layer's weights and leave out the layer's own forward."""

from __future__ import annotations

from torch import nn


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``layer`` would do nothing but what every ``kind`` does with its weights.

    Not so with hooks (activation recorders, profilers, offloading), and with layers of another class that stand in for it
    (LoRA wrappers, quantised layers, parametrizations).
    """
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) is kind and not any(hooks) and "forward" not in vars(layer)
