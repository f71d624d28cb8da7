"""A quicker start of commands that load a network."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Put the garbage collector off while modules are imported and weights loaded; also a decorator.

    torch, transformers and diffusers make very many objects, nearly all of which stay; looking through them again and again for
    some to free is a good part of the start.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
