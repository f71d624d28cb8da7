"""python scripts/evaluate.py inpainting --model binaryvq-tiny-brain --data mni152 --report inpainting.json

Scores a checkpoint at filling holes and compares it with simpler fills. The program is
:mod:`hf_binaryformer.commands.evaluate_inpainting`.
"""

from hf_binaryformer.commands.evaluate_inpainting import app

if __name__ == "__main__":
    app()
