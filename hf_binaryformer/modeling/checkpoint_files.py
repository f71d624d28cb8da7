"""Checks the files of a checkpoint before and while a library loads them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from hf_binaryformer.modeling.at_rest import ChangedError, unchanged
from hf_binaryformer.modeling.file_names import stays_below

# Fields whose number is one of layers, each with tensors of its own.
LAYERS = ("num_hidden_layers", "num_layers", "encoder_num_convs", "decoder_num_convs")
MAX_LABELS = 2**16
# Numbers in a configuration that count nothing, such as those of a special token, are allowed up to this.
FREE_NUMBERS = 2**20
# A network may have more parameters than its file, for example a new head: so many times more, plus so many.
UNSTORED_SHARE, UNSTORED = 2, 2**22
# Fields of a configuration by which the libraries would fetch or import other code: kernels from the Hub, quantizers.
FOREIGN = ("attn_implementation", "experts_implementation", "quantization_config")


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


def check_own(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a checkpoint that would have the libraries fetch or import other code, or read files outside its folder.

    Args:
        folder: of the checkpoint.
        config: content of its configuration.

    Raises:
        CheckpointError: the configuration asks for kernels of the Hub or a quantizer, there is an adapter, or an index of
            weights names anything but .safetensors files in the folder.
    """
    if asked := [key for key in config if key.removeprefix("_") in FOREIGN and config[key] is not None]:
        raise CheckpointError(
            f"{folder} asks for {asked[0]} = {config[asked[0]]!r} in its configuration, which is code that the checkpoint does "
            f"not hold: remove that field"
        )
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder} has an adapter_config.json, expected whole weights: merge the adapter first")
    for path in folder.glob("*.safetensors.index*.json"):
        files = read_json(path).get("weight_map")
        names = list(files.values()) if isinstance(files, dict) else [files]
        if wrong := [n for n in names if not (stays_below(n) and re.fullmatch(r"[^/]+\.safetensors", str(n)))]:
            raise CheckpointError(
                f"{path} names '{wrong[0]}', expected .safetensors files beside it: fetch the checkpoint again"
            )


def check_components(folder: Path, index: dict[str, Any], own: dict[str, list[str]]) -> None:
    """Refuse the index of a pipeline that names code of others, which diffusers would import, or a folder outside.

    Args:
        folder: of the pipeline.
        index: content of its model_index.json.
        own: module and class of each component that is loaded.

    Raises:
        CheckpointError: the pipeline's class is no name, a component is of another class or lies elsewhere, or there is a
            Python file. (Some releases of diffusers run one, of whatever name they look for, without being asked to.)
    """
    if code := sorted([*folder.glob("*.py"), *folder.glob("*/*.py")]):
        raise CheckpointError(f"{folder} holds code ({code[0].relative_to(folder)}), expected weights alone: remove it")
    if not isinstance(index.get("_class_name"), str):
        raise CheckpointError(f"{folder} is a pipeline of {index.get('_class_name')}, expected the name of a class")
    for name, found in index.items():
        if isinstance(found, list) and found != own.get(name):
            raise CheckpointError(
                f"{folder} has {found} as its component '{name}', expected {own.get(name, 'none of that name')}: fetch the "
                f"checkpoint again"
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
