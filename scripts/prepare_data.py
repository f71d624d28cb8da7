"""python scripts/prepare_data.py amos --source amos22 --out data/amos

Writes a data folder to train on: ``binaryformer prepare`` without an installation of the command. The program is
:mod:`hf_binaryformer.commands.prepare`.
"""

from hf_binaryformer.commands.prepare import app

if __name__ == "__main__":
    app()
