"""python scripts/make_collection.py "Title" namespace/one namespace/two

Shows several models of the Hub on one page. The program is :mod:`hf_binaryformer.training.hub_collection`.
"""

import typer

from hf_binaryformer.training.hub_collection import main

if __name__ == "__main__":
    typer.run(main)
