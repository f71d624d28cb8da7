"""Training samples of the autoencoder: random crops of volumes. Each depends only on its number (as in slices.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from hf_binaryformer.data.prepared_folder import PreparedFolder
from hf_binaryformer.modeling.intensities import IntensityScale
from hf_binaryformer.pipelines.grids import foreground_box, resample, same_spacing
from hf_binaryformer.pipelines.volumes import VOLUME_SUFFIXES, read_volume

# Crops with too little foreground are drawn again, up to this number of draws.
MAX_DRAWS = 10


def image_paths(folder: Path, split: str, validation_fraction: float, seed: int) -> list[Path]:
    """Images of a split, from a folder by ``binaryformer prepare`` or any folder with files of volumes.

    Without a manifest, a random share of the files, drawn with ``seed``, is for validation. If subjects have several
    files, the folder needs a manifest.

    Raises:
        FileNotFoundError: no images.
    """
    if (folder / "manifest.json").is_file():
        return [case.image for case in PreparedFolder(folder).split(split)]
    paths = sorted(path for path in folder.rglob("[!.]*") if path.name.lower().endswith(VOLUME_SUFFIXES))
    if not paths:
        raise FileNotFoundError(
            f"{folder} holds neither manifest.json nor files that end in {', '.join(VOLUME_SUFFIXES)}: give a folder of volumes"
        )
    order = np.random.default_rng(seed).permutation(len(paths))
    held_out = set(order[: round(validation_fraction * len(paths))].tolist())
    return [p for n, p in enumerate(paths) if (n in held_out) == (split == "validation") and split != "test"]


def load_scaled(path: Path, vqmodel: dict[str, Any]) -> np.ndarray:
    """A volume (I, J, K) float16 at the recipe's spacing, scaled to 0 to about 1, cropped to its foreground plus 10 mm.

    Args:
        path: any file that :func:`read_volume` takes.
        vqmodel: the recipe's section: spacing, percentiles, intensity_ceiling.
    """
    volume = read_volume(path)
    array, spacing = volume.array, vqmodel["spacing"] or volume.spacing
    if not same_spacing(volume.spacing, spacing):
        array, _ = resample(array, volume.affine, spacing, order=1)
    scale = IntensityScale.of(array, vqmodel["percentiles"], vqmodel["intensity_ceiling"])
    scaled = scale.apply(array)
    return scaled[foreground_box(scaled, spacing)].astype(np.float16)


def load_all(paths: list[Path], vqmodel: dict[str, Any], show: bool) -> list[np.ndarray]:
    """:func:`load_scaled` of all, with a progress bar."""
    return [load_scaled(path, vqmodel) for path in tqdm(paths, desc="load", disable=not show)]


class PatchSamples(Dataset):
    """Augmented crops out of one or more sources.

    Args:
        sources: scaled volumes of each folder; a volume smaller than a crop is extended by mirroring.
        data: the recipe's section; ``sources[n]`` has the share of folder n, and its margin: the number of voxels by
            which a crop may extend beyond a volume. Voxels there are 0.
        ceiling: intensities are cut to [0, ceiling].
        seed: random seed of the whole run.
        length: number of samples.
    """

    def __init__(
        self, sources: list[list[np.ndarray]], data: dict[str, Any], ceiling: float, seed: int, length: int
    ) -> None:
        self.data, self.ceiling, self.seed, self.length = data, ceiling, seed, length
        self.crop = np.array(data["crop"])
        self.sources = [[mirrored(volume, self.crop) for volume in volumes] for volumes in sources]
        shares = np.array([source["share"] for source in data["sources"][: len(sources)]], dtype=float)
        self.shares = shares / shares.sum()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Tensor:
        """Sample ``number``: (1, D, H, W) float32."""
        rng = np.random.default_rng([self.seed, number])
        source = int(rng.choice(len(self.sources), p=self.shares))
        volume = self.sources[source][int(rng.integers(len(self.sources[source])))]
        margin = self.data["sources"][source]["margin"]
        for _ in range(MAX_DRAWS):
            start = rng.integers(-margin, np.array(volume.shape) - self.crop + margin + 1)
            patch = window(volume, start, self.crop)
            if (patch > self.data["foreground_threshold"]).mean() >= self.data["min_foreground"]:
                break
        axis = self.data["mirror_axis"]
        if axis is not None and rng.random() < 0.5:
            patch = np.flip(patch, axis)
        gain = 1 + rng.uniform(-1, 1) * self.data["max_gain"]
        return torch.from_numpy(np.clip(patch.astype(np.float32) * gain, 0, self.ceiling))[None]


class NestedDropout(Dataset):
    """Crops, each with the number of sub-codebooks that it is to be decoded from (see ``BinaryVQModel.forward``).

    Args:
        patches: the crops.
        share: share of the crops that lose at least one sub-codebook; the first sub-codebook is never lost.
        num_codebooks: number of sub-codebooks.
        seed: random seed of the whole run.
    """

    def __init__(self, patches: PatchSamples, share: float, num_codebooks: int, seed: int) -> None:
        self.patches, self.share, self.num_codebooks, self.seed = patches, share, num_codebooks, seed

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        """Crop ``number``, and 1 to ``num_codebooks``."""
        rng = np.random.default_rng([self.seed, number, 1])  # independent of the crop's random numbers
        loses = self.num_codebooks > 1 and rng.random() < self.share
        return self.patches[number], int(rng.integers(1, self.num_codebooks)) if loses else self.num_codebooks


def mirrored(volume: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Extend a volume by mirroring until it is at least as large as ``shape``."""
    missing = np.maximum(shape - volume.shape, 0)
    return np.pad(volume, [(m // 2, m - m // 2) for m in missing], mode="symmetric")


def window(volume: np.ndarray, start: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Box of ``shape`` voxels from ``start``, 0 where it reaches beyond the volume."""
    size = np.array(volume.shape)
    inside = tuple(slice(a, b) for a, b in zip(np.maximum(start, 0), np.minimum(start + shape, size), strict=True))
    before, after = np.maximum(-start, 0), np.maximum(start + shape - size, 0)
    return np.pad(volume[inside], list(zip(before, after, strict=True)))
