"""python scripts/calibrate_quality.py --model runs/brain/model --data data/brain --report quality.json

Writes into a checkpoint what its quality scores meant on validation volumes. The program is
:mod:`hf_binaryformer.training.quality`.
"""

import typer

from hf_binaryformer.training.quality import main

if __name__ == "__main__":
    typer.run(main)
