"""One training loop with its recipes, checkpoints, logs and cards, and the trainings that use it.

:mod:`.segmentation`, :mod:`.classification`, :mod:`.autoencoder` and :mod:`.sampler` are programs too:
``accelerate launch -m hf_binaryformer.training.segmentation --recipe hippocampus …``.
"""
