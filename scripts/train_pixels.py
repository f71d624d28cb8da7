"""accelerate launch scripts/train_pixels.py --recipe mnist-pixels --data data/fashion-mnist --output runs/pixels

Trains a classifier whose tokens are the single pixels of small images. The program is
:mod:`hf_binaryformer.training.classification`.
"""

import typer

from hf_binaryformer.training.classification import main

if __name__ == "__main__":
    typer.run(main)
