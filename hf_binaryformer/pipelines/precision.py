"""Number formats that a network can be run in."""

from __future__ import annotations

import torch

DTYPES = ("float32", "bfloat16", "float16")


def number_format(dtype: torch.dtype | str | None) -> torch.dtype:
    """The torch type for a name or type in :data:`DTYPES`; None means float32.

    Raises:
        ValueError: it is not one of them.
    """
    name = str(dtype or torch.float32).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype is {dtype}, expected one of {', '.join(DTYPES)}")
    return getattr(torch, name)
