"""Slices of a volume for a network: padded to its window, in batches, along one axis or several; what is kept of its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_binaryformer.pipelines.grids import resample_to

# Axes along which the slices of a view are taken, in RAS order.
VIEWS = {"sagittal": (0,), "coronal": (1,), "axial": (2,), "all": (0, 1, 2)}
# Called with (slices done, all slices).
ProgressCallback = Callable[[int, int], None]


def axes_of(views: str) -> tuple[int, ...]:
    """The axes of a view.

    Raises:
        ValueError: there is no such view.
    """
    if views not in VIEWS:
        raise ValueError(f"views is '{views}', expected one of {', '.join(VIEWS)}")
    return VIEWS[views]


def view_names(axes: Iterable[int]) -> list[str]:
    """Names of the views along the axes, each one by itself."""
    return [name for name, along in VIEWS.items() if along in [(axis,) for axis in axes]]


def pad_in_plane(slices: Tensor, window: Iterable[int]) -> tuple[Tensor, tuple[slice, slice]]:
    """Pad (S, H, W) with 0 to at least the window, half on each side; also returns the slices' place in the result."""
    padding: list[int] = []
    inner = []
    for size, wanted in zip(slices.shape[1:], window, strict=True):
        missing = max(wanted - size, 0)
        padding = [missing // 2, missing - missing // 2, *padding]
        inner.append(slice(missing // 2, missing // 2 + size))
    return F.pad(slices, padding), (inner[0], inner[1])


def batches_of_slices(
    lengths: Sequence[int], batch_size: int, progress: ProgressCallback | bool
) -> Iterator[tuple[int, Tensor]]:
    """Yield number of the view and slices (B,) of every batch, for views of so many slices; report progress over all."""
    from tqdm.auto import tqdm

    done, total = 0, sum(lengths)
    with tqdm(total=total, unit="slice", desc="segmenting", disable=progress is not True) as bar:
        for view, length in enumerate(lengths):
            for index in torch.arange(length).split(batch_size):
                yield view, index
                done += len(index)
                bar.update(len(index))
                if callable(progress):
                    progress(done, total)


class Winners:
    """The most probable class of each voxel, and its probability: all that is kept where nothing is resampled or averaged.

    Args:
        shape: (I, J, K) of the network's input.
        axis: that slices are taken along.

    Attributes:
        labels: (I, J, K) int32.
        confidence: (I, J, K) float16, 0 to 1.
    """

    def __init__(self, shape: Sequence[int], axis: int) -> None:
        # The slice axis lies outermost in memory, where slices are written fastest.
        outermost = [shape[axis], *(n for a, n in enumerate(shape) if a != axis)]
        self.labels = torch.empty(outermost, dtype=torch.int32).movedim(0, axis)
        self.confidence = torch.empty(outermost, dtype=torch.float16).movedim(0, axis)

    def add(self, axis: int, index: Tensor, probability: Tensor) -> None:
        """Take the probabilities (B, C, H, W) of slices ``index`` (B,)."""
        # Round to the stored precision first, so that labels do not depend on whether probabilities are returned. max is 4
        # times as fast as argmax.
        value, label = probability.half().max(1)
        self.labels.movedim(axis, 0)[index] = label.int().cpu()
        self.confidence.movedim(axis, 0)[index] = value.cpu()


class Probabilities:
    """The mean probability of each class over the views: one volume, to which each batch of slices is added as it comes.

    Args:
        shape: (I, J, K) of the network's input.
        axes: that slices are taken along.

    Attributes:
        volume: (C, I, J, K) float16, 0 to 1; there is none before the first slice.
    """

    def __init__(self, shape: Sequence[int], axes: Sequence[int]) -> None:
        self.shape, self.axes = tuple(shape), tuple(axes)
        self.volume: Tensor

    def add(self, axis: int, index: Tensor, probability: Tensor) -> None:
        """Take the probabilities (B, C, H, W) of slices ``index`` (B,) along ``axis``."""
        if not hasattr(self, "volume"):
            # As in Winners; several views share one order.
            first = self.axes[0] if len(self.axes) == 1 else 0
            outermost = [self.shape[first], *(n for a, n in enumerate(self.shape) if a != first)]
            stored = torch.zeros(outermost[0], probability.shape[1], *outermost[1:], dtype=torch.float16)
            self.volume = stored.movedim(0, -3).movedim(-3, first - 3)
        slices = self.volume.movedim(axis + 1, 0)
        if len(self.axes) == 1:
            slices[index] = probability.half().cpu()
        else:
            slices[index] += (probability / len(self.axes)).half().cpu()


def most_probable(
    probabilities: Tensor,
    network_affine: np.ndarray,
    affine: np.ndarray,
    shape: tuple[int, ...],
    kept: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Resample (C, I', J', K') float16 to ``shape``; most probable label and its probability, one label at a time.

    ``kept`` receives the resampled probabilities, if given.
    """
    same_grid = tuple(probabilities.shape[1:]) == shape and np.array_equal(network_affine, affine)
    labels = np.zeros(shape, dtype=np.int32)
    best = np.full(shape, -1, dtype=np.float32)
    for label, one in enumerate(probabilities):
        value = one.float().numpy()
        if not same_grid:
            value = resample_to(value, network_affine, shape, affine, order=1)
        if kept is not None:
            kept[label] = value
        winner = value > best
        labels[winner] = label
        best[winner] = value[winner]
    return labels, best
