"""The real classes of absorbing diffusion at a size that runs in a moment, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hf_binaryformer.modeling.vq_autoencoder import BinaryVQModel
from hf_binaryformer.modeling.vq_transformer import BinaryVQTransformer3DModel
from hf_binaryformer.pipelines.absorbing_scheduler import AbsorbingScheduler
from hf_binaryformer.pipelines.vq_inpainting import BinaryVQInpaintPipeline
from hf_binaryformer.pipelines.vq_synthesis import BinaryVQPipeline

CODEBOOKS, ENTRIES = 2, 8
# Token positions, and the voxels of 4^3 that each stands for.
GRID, SHAPE = (5, 6, 4), (20, 24, 16)


def components(*, spacing: Any = (2.0, 2.0, 2.0), **scheduler: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    vqmodel = BinaryVQModel(
        encoder_channels=[8, 8],
        decoder_channels=[16, 16, 8],
        num_codebooks=CODEBOOKS,
        codebook_size=ENTRIES,
        codebook_dim=4,
        spacing=spacing,
    )
    # As after training: codebook entries where the latents are, and a decoder that is not nearly 0 everywhere.
    with torch.no_grad():
        vqmodel.train()
        for _ in range(3):
            vqmodel(torch.rand(4, 1, 16, 16, 16))
        vqmodel.decoder.head.weight *= 8
        vqmodel.decoder.head.bias += 0.5
    transformer = BinaryVQTransformer3DModel(
        grid_size=GRID,
        num_codebooks=CODEBOOKS,
        codebook_size=ENTRIES,
        embedding_dim=12,
        num_layers=1,
        num_heads=2,
        value_head_dim=4,
        attention_type="sign",
    )
    torch.nn.init.normal_(transformer.head.weight, std=0.5)
    scheduler = AbsorbingScheduler(mask_token_id=ENTRIES, num_codebooks=CODEBOOKS, **scheduler)
    return {"vqmodel": vqmodel.eval(), "transformer": transformer.eval(), "scheduler": scheduler}


def synthesis(**options: Any) -> BinaryVQPipeline:
    return _quiet(BinaryVQPipeline(**components(**options)))


def inpainting(**options: Any) -> BinaryVQInpaintPipeline:
    return _quiet(BinaryVQInpaintPipeline(**components(**options)))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def save_checkpoint(folder: Path, **options: Any) -> Path:
    synthesis(**options).save_pretrained(folder)
    return folder


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
