"""python loading.py namespace/name out.safetensors

Loads a checkpoint by its name alone, as a user would, and writes its tensors and what its networks compute.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import hf_binaryformer as bf


@torch.no_grad()
def fingerprint(loaded: Any) -> dict[str, Tensor]:
    """All tensors of a model, or of a pipeline's models, and an output of each."""
    tensors = {}
    for name, network in getattr(loaded, "components", {"model": loaded}).items():
        if not isinstance(network, nn.Module):
            continue
        config, generator = network.config, torch.Generator().manual_seed(0)
        if isinstance(network, bf.BinaryVQModel):
            output = network.tiled_decode(
                network.encode(torch.rand(1, 1, 24, 24, 24, generator=generator)).tokens
            ).sample
        elif isinstance(network, bf.BinaryVQTransformer3DModel):
            shape = (1, config.num_codebooks, *config.grid_size)
            output = network(torch.randint(config.codebook_size, shape, generator=generator)).logits
        else:
            output = network(torch.randn(1, config.num_channels, *config.image_size, generator=generator)).logits
        tensors |= {f"{name}.{key}": tensor.clone() for key, tensor in network.state_dict().items()}
        tensors[f"{name} output"] = output.contiguous()
    return tensors


if __name__ == "__main__":
    save_file(fingerprint(bf.from_pretrained(sys.argv[1])), sys.argv[2])
