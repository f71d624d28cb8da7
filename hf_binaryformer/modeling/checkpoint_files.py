"""Checks the files of a checkpoint before and while a library loads them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from hf_binaryformer.modeling.at_rest import ChangedError, unchanged

# Fields whose number is one of layers, each with tensors of its own.
LAYERS = ("num_hidden_layers", "num_layers", "encoder_num_convs", "decoder_num_convs")
MAX_LABELS = 2**16
# Numbers in a configuration that count nothing, such as those of a special token, are allowed up to this.
FREE_NUMBERS = 2**20
# A network may have more parameters than its file, for example a new head: so many times more, plus so many.
UNSTORED_SHARE, UNSTORED = 2, 2**22


class CheckpointError(ValueError):
    """Weights were found but cannot be used: they are damaged, of another kind, or do not fit their configuration."""


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file.

    Raises:
        CheckpointError: it is missing, is not JSON, or holds no names and values.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; expected a folder made by save_pretrained") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): fetch the checkpoint again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected names and values: fetch it again")
    return content


@contextmanager
def using(folder: Path) -> Iterator[None]:
    """Turns whatever the libraries raise over a damaged configuration or file of weights into one message.

    Raises:
        CheckpointError: the checkpoint cannot be used, its files changed meanwhile, or the block raised it.
    """
    try:
        with unchanged(folder):
            yield
    except (CheckpointError, ImportError, MemoryError):
        raise
    except ChangedError as error:
        raise CheckpointError(str(error)) from error
    except Exception as error:
        # A value of another type fails wherever a library first uses it, and so in any way.
        raise CheckpointError(
            f"the weights in {folder} cannot be used with its config.json: {error} ({type(error).__name__}): "
            f"fetch the checkpoint again"
        ) from error


def check_sizes(folder: Path, config: dict[str, Any], build: Callable[[], Any]) -> None:
    """Refuse, before memory is taken, a configuration that describes a much larger network than the weights are of.

    Args:
        folder: of the checkpoint; the headers of its .safetensors files are read.
        config: content of its configuration.
        build: makes the network; called with torch's device "meta", on which nothing is computed.

    Raises:
        CheckpointError: a number in the configuration, or the network, is too large for the weights.
    """
    import torch

    tensors, stored = _stored_numbers(folder)
    for field, value in config.items():
        limit = tensors if field in LAYERS else MAX_LABELS if field == "num_labels" else max(stored, FREE_NUMBERS)
        if largest := max((n for n in _whole_numbers(value) if n > limit), default=0):
            raise CheckpointError(
                f"{folder} has {field} = {largest} in its configuration, expected at most {limit} for weights of "
                f"{tensors} tensors and {stored} numbers: fetch the checkpoint again"
            )
    with torch.device("meta"):
        network = build()
    described = sum(tensor.numel() for tensor in chain(network.parameters(), network.buffers()))
    if described > UNSTORED_SHARE * stored + UNSTORED:
        raise CheckpointError(
            f"the configuration in {folder} describes a network of {described} numbers, its weights hold {stored}: fetch "
            f"the checkpoint again"
        )


def _stored_numbers(folder: Path) -> tuple[int, int]:
    """How many tensors, and numbers in them, the .safetensors files of a folder hold."""
    from safetensors import safe_open

    sizes = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            sizes += [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    return len(sizes), sum(sizes)


def _whole_numbers(value: Any) -> Iterator[int]:
    """All whole numbers in a value of JSON."""
    if isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _whole_numbers(part)
    elif isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        yield int(value)
