"""accelerate launch scripts/train_vqae.py --recipe brain-small --data data/brain --output runs/vqae

Trains the vector-quantised autoencoder. The program is :mod:`hf_binaryformer.training.autoencoder`.
"""

import typer

from hf_binaryformer.training.autoencoder import main

if __name__ == "__main__":
    typer.run(main)
