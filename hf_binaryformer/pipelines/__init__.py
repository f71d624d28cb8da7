"""Whole jobs on medical volumes: files to arrays and back, segmentation, scores, pictures."""
