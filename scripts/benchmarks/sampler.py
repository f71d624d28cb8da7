"""Sampling a volume's tokens with the paper-size transformer, float attention against Hamming, for ``attention.py``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hf_binaryformer.modeling.vq_transformer import BinaryVQTransformer3DModel
from hf_binaryformer.pipelines.absorbing_scheduler import AbsorbingScheduler
from measure import DTYPES, Subject
from subjects import SEED

# Name, attention_type, bit_gradient; the first is what the others are compared with.
VARIANTS = (("softmax (sdpa)", "softmax", None), ("hamming", "hamming", None), ("sign", "sign", "ternary"))
# The paper's run (Sec. 3.2). Every step is the same work, so the time of a few steps gives the time of all.
PAPER_STEPS = 200


@dataclass(frozen=True, kw_only=True)
class Sampler(Subject):
    """The first ``timed_steps`` of 200 steps from a fully masked grid, batch 1; bf16 is autocast."""

    attention_type: Any
    bit_gradient: Any
    backend: str
    blocks: int
    timed_steps: int

    def prepare(self) -> Callable[[], object]:
        """Transformer and scheduler of the paper's size, random weights."""
        torch.manual_seed(SEED)
        transformer = (
            BinaryVQTransformer3DModel(
                attention_type=self.attention_type,
                bit_gradient=self.bit_gradient,
                value_head_dim=self.value_dim,
                num_layers=self.blocks,
            )
            .eval()
            .to(self.device)
        )
        transformer.set_attention_backend(self.backend)
        config = transformer.config
        scheduler = AbsorbingScheduler(mask_token_id=config.codebook_size, num_codebooks=config.num_codebooks)
        start = torch.full((1, config.num_codebooks, *config.grid_size), config.codebook_size, device=self.device)

        @torch.inference_mode()
        def sample() -> object:
            scheduler.set_timesteps(PAPER_STEPS)
            scheduler.prepare(start == config.codebook_size, torch.Generator(self.device).manual_seed(SEED))
            tokens = start
            with torch.autocast(self.device, DTYPES["bfloat16"], enabled=self.dtype == "bfloat16"):
                for timestep in scheduler.timesteps[: self.timed_steps].tolist():
                    tokens = scheduler.step(transformer(tokens).logits, timestep, tokens).prev_sample
            return tokens

        return sample


def sampler_subjects(backend: str, blocks: int, timed_steps: int) -> list[Subject]:
    """Every variant in both types, at the 10 x 14 x 12 = 1 680 positions of the default configuration."""
    defaults = BinaryVQTransformer3DModel(num_layers=1).config
    head_dim = defaults.num_codebooks * defaults.embedding_dim // defaults.num_heads
    return [
        Sampler(
            name=f"sampler, {timed_steps} of {PAPER_STEPS} steps, {name}",
            family="sampler",
            tokens=math.prod(defaults.grid_size),
            head_dim=head_dim,
            value_dim=head_dim if attention_type == "softmax" else defaults.value_head_dim,
            dtype=dtype,
            is_baseline=attention_type == "softmax",
            is_float=attention_type == "softmax",
            attention_type=attention_type,
            bit_gradient=bit_gradient,
            backend=backend,
            blocks=blocks,
            timed_steps=timed_steps,
        )
        for dtype in DTYPES
        for name, attention_type, bit_gradient in VARIANTS
    ]
