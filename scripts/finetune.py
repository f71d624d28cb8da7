"""accelerate launch scripts/finetune.py --recipe hippocampus --data data/hippocampus --output runs/hippocampus

Trains a segmentation network on a folder of ``prepare_data.py`` and scores it on whole volumes. The program is
:mod:`hf_binaryformer.training.segmentation`.
"""

import typer

from hf_binaryformer.training.segmentation import main

if __name__ == "__main__":
    typer.run(main)
