"""python scripts/average_weights.py runs/first/model runs/second/model -o runs/mean

One checkpoint with the mean weights of several trainings that started from the same weights. The program is
:mod:`hf_binaryformer.training.averaging`.
"""

import typer

from hf_binaryformer.training.averaging import main

if __name__ == "__main__":
    typer.run(main)
