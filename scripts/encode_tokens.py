"""python scripts/encode_tokens.py --recipe brain-small --vqmodel runs/vqae/vqmodel --data data/brain --output data/tokens

Turns the volumes of a folder into tokens for ``train_sampler.py``. The program is
:mod:`hf_binaryformer.training.encode_tokens`.
"""

import typer

from hf_binaryformer.training.encode_tokens import main

if __name__ == "__main__":
    typer.run(main)
