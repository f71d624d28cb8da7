"""accelerate launch scripts/train_sampler.py --recipe brain-small --tokens data/tokens --output runs/sampler

Trains the transformer of absorbing diffusion on tokens of ``encode_tokens.py``. The program is
:mod:`hf_binaryformer.training.sampler`.
"""

import typer

from hf_binaryformer.training.sampler import main

if __name__ == "__main__":
    typer.run(main)
