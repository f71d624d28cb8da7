"""python scripts/experiments/mask_ratio.py --run runs/sampler --tokens data/tokens

Measures the mean cross-entropy of a masked token in bits, for several shares of masked tokens. The values are written
as ``bits`` into ``mask_ratio.json`` in the run's folder. The shares are equally spaced, so the mean of the values is
nearly the evidence lower bound (paper A.2). It is written as ``bits_per_position``, for all codebooks of a grid
position together.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer

from hf_binaryformer.modeling.vq_transformer import BinaryVQTransformer3DModel
from hf_binaryformer.pipelines.absorbing_scheduler import AbsorbingScheduler
from hf_binaryformer.training.sampler import load_tokens

BATCH = 8
# The middles of ten equal parts of 0 to 1.
RATIOS = [(2 * part + 1) / 20 for part in range(10)]


@torch.inference_mode()
def bits_per_masked_token(
    transformer: BinaryVQTransformer3DModel, scheduler: AbsorbingScheduler, tokens: torch.Tensor, ratio: float
) -> float:
    """Mean over tokens (n, K, d, h, w) masked at t = ratio x T, with the same masks at every call."""
    generator = torch.Generator().manual_seed(0)
    step = max(1, round(ratio * scheduler.config.num_train_timesteps))
    nats, count = 0.0, 0
    for truth in tokens.long().split(BATCH):
        noisy, masked = scheduler.add_noise(truth, torch.full((len(truth),), step), generator)
        logits = transformer(noisy).logits.permute(0, 1, 3, 4, 5, 2)[masked]
        nats += F.cross_entropy(logits.float(), truth[masked], reduction="sum").item()
        count += int(masked.sum())
    return nats / math.log(2) / max(count, 1)


def main(
    run: Annotated[Path, typer.Option(help="Folder written by train_sampler.py.")],
    tokens: Annotated[Path, typer.Option(help="Folder written by encode_tokens.py.")],
    split: Annotated[str, typer.Option(help="Whose tokens.")] = "test",
) -> None:
    """Measure and write."""
    torch.manual_seed(0)  # for "hamming_bernoulli", which draws random numbers
    transformer = BinaryVQTransformer3DModel.from_pretrained(run / "transformer").eval()
    scheduler = AbsorbingScheduler.from_pretrained(run / "scheduler")
    held_out = load_tokens(tokens, split, transformer)
    bits = {f"{ratio:g}": bits_per_masked_token(transformer, scheduler, held_out, ratio) for ratio in RATIOS}
    bound = transformer.config.num_codebooks * statistics.mean(bits.values())
    (run / "mask_ratio.json").write_text(json.dumps({"bits_per_position": bound, "bits": bits}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
