"""python scripts/experiments/make_twins.py --out data/mirror --kind mirror --pairs 64 --values 16

Writes tokens in the layout of ``encode_tokens.py``, (n, 1, 1, 2, pairs) uint8. The first row is random. The second row
is the first one unchanged ("copy"), reversed ("mirror"), or in one order drawn for the whole set ("shuffle"). Nothing
else is predictable.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file


class Kind(StrEnum):
    copy = "copy"
    mirror = "mirror"
    shuffle = "shuffle"


def twins(count: int, kind: Kind, pairs: int, values: int, seed: int) -> torch.Tensor:
    """(count, 1, 1, 2, pairs) uint8, values below ``values``; the order of "shuffle" depends on ``pairs`` alone."""
    first = torch.randint(values, (count, pairs), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    orders = {
        Kind.copy: torch.arange(pairs),
        Kind.mirror: torch.arange(pairs).flip(0),
        Kind.shuffle: torch.randperm(pairs, generator=torch.Generator().manual_seed(pairs)),
    }
    return torch.stack([first, first[:, orders[kind]]], 1)[:, None, None]


def main(
    out: Annotated[Path, typer.Option(help="Folder for the token files.")],
    kind: Annotated[Kind, typer.Option(help="Where the twin stands.")] = Kind.mirror,
    pairs: Annotated[int, typer.Option(min=1, help="Tokens of a row; the sequence is twice as long.")] = 64,
    values: Annotated[int, typer.Option(min=2, max=255)] = 16,
    train: Annotated[int, typer.Option(min=1, help="Sequences to train on.")] = 20000,
    validation: Annotated[int, typer.Option(min=1)] = 64,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Write both splits."""
    out.mkdir(parents=True, exist_ok=True)
    for number, (split, count) in enumerate((("train", train), ("validation", validation))):
        save_file({"tokens": twins(count, kind, pairs, values, 2 * seed + number)}, out / f"{split}.safetensors")


if __name__ == "__main__":
    typer.run(main)
