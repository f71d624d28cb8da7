"""python scripts/publish.py runs/hippocampus/model namespace/name

Uploads a finished checkpoint and its card to the Hub, in one commit. The program is
:mod:`hf_binaryformer.training.publishing`.
"""

import typer

from hf_binaryformer.training.publishing import main

if __name__ == "__main__":
    typer.run(main)
