"""What options of commands offer to choose from."""

from __future__ import annotations

from enum import Enum


class DType(str, Enum):
    """Number formats that a network can run in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Views(str, Enum):
    """Slices that a network sees."""

    all = "all"
    coronal = "coronal"
    axial = "axial"
    sagittal = "sagittal"


class Selection(str, Enum):
    """Orders in which tokens are drawn."""

    random = "random"
    halton = "halton"
    confidence = "confidence"
    raster = "raster"
