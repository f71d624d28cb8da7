"""Options that commands share or that decide about labels, and what options offer to choose from."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer


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


Samples = Annotated[int, typer.Option(min=1, help="How many results; more than one become a 4D NIfTI.")]
Seed = Annotated[
    int, typer.Option(help="The same seed gives the same bytes, on one machine with one number of threads.")
]
Steps = Annotated[int, typer.Option(min=1, help="Steps that share the tokens to be drawn.")]
Temperature = Annotated[float, typer.Option(min=0, help="Of the draws; 0 takes the likeliest token.")]
Model = Annotated[str, typer.Option(help="Short name, folder or Hub id.")]
Backend = Annotated[str | None, typer.Option(help="Code that computes 1-bit attention; see `info`.")]
NumberFormat = Annotated[DType, typer.Option(help="Number format; auto: bfloat16 where the hardware has it.")]
Mirror = Annotated[
    bool | None,
    typer.Option(
        "--mirror/--no-mirror",
        help="Average with the mirror image, sides exchanged, in twice the time.  [default: model's]",
    ),
]
KeepLargest = Annotated[
    bool | None,
    typer.Option("--keep-largest/--no-keep-largest", help="Largest piece of each structure only.  [default: model's]"),
]
HeadOnly = Annotated[
    bool | None, typer.Option("--head-only/--no-head-only", help="No labels outside the head.  [default: model's]")
]
Device = Annotated[str | None, typer.Option(help="torch device, such as cpu or cuda:0.  [default: best]")]
