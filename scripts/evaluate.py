"""python scripts/evaluate.py segmentation --model binaryformer-tiny-brain --data data/brain --report results.json

Scores a checkpoint at segmenting a split of a prepared folder, or (``inpainting``) at filling holes, beside simpler ways.
The program is :mod:`hf_binaryformer.commands.evaluate`.
"""

from hf_binaryformer.commands.evaluate import app

if __name__ == "__main__":
    app()
