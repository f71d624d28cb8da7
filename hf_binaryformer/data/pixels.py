"""Reads small labelled images from their authors' published files; their pixels are the tokens of paper Appendix B."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

# Bytes of a CIFAR-10 record: the label, then 32 x 32 red, green and blue.
CIFAR_SIDE = 32
CIFAR_RECORD = 1 + 3 * CIFAR_SIDE**2
CIFAR_FILES = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}
IDX_UINT8 = 8
# The largest array of an IDX file, in bytes; the published ones have 47 million.
MAX_IDX_BYTES = 2**30


def read_idx(path: Path) -> np.ndarray:
    """Read an array from an IDX file of MNIST or Fashion-MNIST, plain or as .gz.

    Raises:
        ValueError: the file is not an IDX file, does not hold bytes, is truncated, or holds more than its header says or
            than 2³⁰ bytes.
    """
    with path.open("rb") as file:
        opener: Any = gzip.open if file.read(2) == b"\x1f\x8b" else open
    try:
        with opener(path, "rb") as file:
            start = file.read(4)
            if len(start) < 4 or start[:2] != b"\0\0" or start[2] != IDX_UINT8:
                raise ValueError(f"{path} is no IDX file of bytes")
            sizes = file.read(4 * start[3])
            shape = np.frombuffer(sizes, ">u4", len(sizes) // 4).tolist()
            claimed = math.prod(shape)
            if claimed > MAX_IDX_BYTES or len(shape) < start[3]:
                raise ValueError(f"{path} has an array of shape {shape}, expected at most {MAX_IDX_BYTES} bytes")
            # No more than a byte beyond what the header says is unpacked, whatever the file holds.
            values = np.frombuffer(file.read(claimed + 1), np.uint8)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}): is it complete?") from error
    if values.size != claimed:
        held = f"{values.size} values" if values.size < claimed else "more values"
        raise ValueError(f"{path} holds {held}, its header says {claimed}: is it complete?")
    return values.reshape(shape)


def read_cifar(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) of a file of CIFAR-10's binary version.

    Raises:
        ValueError: not a whole number of records, or a label above 9.
    """
    content = np.frombuffer(path.read_bytes(), np.uint8)
    if not content.size or content.size % CIFAR_RECORD:
        raise ValueError(f"{path} has {content.size} bytes, expected a multiple of {CIFAR_RECORD}: is it complete?")
    records = content.reshape(-1, CIFAR_RECORD)
    if records[:, 0].max() > 9:
        raise ValueError(f"{path} has label {records[:, 0].max()}, expected 0 to 9: is it CIFAR-10's binary version?")
    return records[:, 1:].reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE), records[:, 0]


def load_images(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, channels, h, w) uint8 and labels (n,) int64 of the published "train" or "test" part.

    Args:
        folder: with ``train-images-idx3-ubyte[.gz]`` and so on (MNIST, Fashion-MNIST), or ``data_batch_1.bin`` to
            ``test_batch.bin`` (CIFAR-10, binary version).
        part: "train" or "test".

    Raises:
        FileNotFoundError: the folder holds neither set of files, or only some files of a set.
        ValueError: the numbers of images and labels differ, or a file is invalid.
    """
    prefix = {"train": "train", "test": "t10k"}[part]
    images = sorted(folder.glob(f"{prefix}-images-idx3-ubyte*"))
    labels = sorted(folder.glob(f"{prefix}-labels-idx1-ubyte*"))
    if images and labels:
        found = read_idx(images[0])[:, None], read_idx(labels[0]).astype(np.int64)
        if len(found[0]) != len(found[1]):
            raise ValueError(f"{images[0]} holds {len(found[0])} images, {labels[0]} {len(found[1])} labels")
        return found
    batches = [folder / name for name in CIFAR_FILES[part]]
    missing = [path.name for path in batches if not path.is_file()]
    if 0 < len(missing) < len(batches):
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)} of CIFAR-10")
    if not missing:
        parts = [read_cifar(path) for path in batches]
        return np.concatenate([i for i, _ in parts]), np.concatenate([c for _, c in parts]).astype(np.int64)
    raise FileNotFoundError(
        f"{folder} holds neither {prefix}-images-idx3-ubyte (MNIST, Fashion-MNIST) nor the .bin files of CIFAR-10"
    )


def load_splits(folder: Path, data: dict[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Splits "train", "validation" and "test": validation is the last ``validation_images`` of the published training part."""
    images, labels = load_images(folder, "train")
    held_out = len(images) - data["validation_images"]
    if held_out < 1:
        raise ValueError(f"validation_images is {data['validation_images']}, but {folder} has {len(images)} in all")
    return {
        "train": (images[:held_out], labels[:held_out]),
        "validation": (images[held_out:], labels[held_out:]),
        "test": load_images(folder, "test"),
    }


def scale(images: np.ndarray, data: dict[str, Any]) -> Tensor:
    """Bytes to float32 of about mean 0 and deviation 1."""
    return (torch.from_numpy(images.astype(np.float32)) / 255 - data["mean"]) / data["std"]


class PixelSamples(Dataset):
    """Training images; a sample depends only on (seed, number), and every pass takes all images in a new order.

    Args:
        images: (n, channels, h, w) uint8.
        labels: (n,).
        data: the recipe's ``data`` section.
        seed: random seed of the run.
        length: number of samples.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, data: dict[str, Any], seed: int, length: int) -> None:
        self._images, self._labels, self._data, self._seed, self._length = images, labels, data, seed, length
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        turn, place = divmod(number, len(self._images))
        if self._order[0] != turn:
            self._order = turn, np.random.default_rng([self._seed, turn]).permutation(len(self._images))
        index = self._order[1][place]
        rng = np.random.default_rng([self._seed, turn, place])
        image, most = self._images[index], self._data["max_shift"]
        if self._data["flip"] and rng.random() < 0.5:
            image = image[..., ::-1]
        if most:
            padded = np.pad(image, ((0, 0), (most, most), (most, most)))
            top, left = rng.integers(0, 2 * most + 1, 2)
            image = padded[:, top : top + image.shape[1], left : left + image.shape[2]]
        return {"pixel_values": scale(image[None], self._data)[0], "labels": torch.tensor(self._labels[index])}
