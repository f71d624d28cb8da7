"""Training samples: random windows of random slices of a prepared folder. Each depends only on its number.

Sample ``n`` of a run depends on (seed, n) and nothing else, so that a resumed run, or one on two processes, sees exactly
the samples that an uninterrupted single process would have seen.
"""

from __future__ import annotations

from typing import Any

import monai.transforms as mt
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_binaryformer.data.prepared_folder import Case, read_labels
from hf_binaryformer.modeling.image_processing import BinaryFormerImageProcessor
from hf_binaryformer.pipelines.grids import (
    add_margin,
    crop_affine,
    extent_mm,
    foreground_mask,
    occupied_box,
    resample,
    same_spacing,
)
from hf_binaryformer.pipelines.volumes import read_volume


class SliceSamples(Dataset):
    """Augmented training windows.

    Args:
        cases: volumes to draw from; held in memory, slice axis first, scaled and at the processor's spacing.
        processor: scaling, slicing and window size.
        augment: the recipe's ``augment`` section.
        seed: random seed of the whole run.
        length: number of samples.

    Attributes:
        foreground_extent: smallest extent of the cases' foreground in mm, (R, A, S).
    """

    def __init__(
        self, cases: list[Case], processor: BinaryFormerImageProcessor, augment: dict[str, Any], seed: int, length: int
    ) -> None:
        self.processor, self.augment, self.seed, self.length = processor, augment, seed, length
        self.images: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.foreground: list[np.ndarray] = []
        extents = []
        for case in cases:
            image, label = read_volume(case.image), read_labels(case).array
            scaled = processor.scale_volume(image.array)
            # Crop as the pipeline does, so that a slice's position means the same in training and in the pipeline.
            foreground = occupied_box(foreground_mask(scaled))
            box = add_margin(foreground, scaled.shape, image.spacing)
            extents.append(extent_mm(foreground, image.spacing))
            scaled, label, affine = scaled[box], label[box], crop_affine(image.affine, box)
            spacing = processor.target_spacing(image.spacing)
            if not same_spacing(image.spacing, spacing):
                scaled, _ = resample(scaled, affine, spacing, order=1)
                label, _ = resample(label, affine, spacing, order=0)
            axis = processor.slice_axis
            self.images.append(torch.from_numpy(np.ascontiguousarray(np.moveaxis(scaled, axis, 0))).half())
            self.labels.append(torch.from_numpy(np.ascontiguousarray(np.moveaxis(label, axis, 0))).to(torch.uint8))
            self.foreground.append(np.flatnonzero(self.labels[-1].flatten(1).any(1).numpy()))
        self.foreground_extent = tuple(np.min(extents, axis=0).tolist())
        self.spatial, self.intensity = build_augmentation(augment, processor)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """``pixel_values`` (C, H, W) float32 and ``labels`` (H, W) int64 of sample ``number``."""
        rng = np.random.default_rng([self.seed, number])
        volume = int(rng.integers(len(self.images)))
        image, label = self.images[volume], self.labels[volume]
        slices = self.foreground[volume]
        if rng.random() >= self.augment["foreground_fraction"] or len(slices) == 0:
            slices = np.arange(len(image))
        index = int(rng.choice(slices))

        processor = self.processor
        channels = processor.slices_at(image, torch.tensor([index]))[0]
        pixels, position = channels[: processor.num_slices], channels[processor.num_slices :]
        # Augmentation works on the scaled intensities, in which 0 is background.
        pixels = pixels * processor.image_std + processor.image_mean
        pixels, target = self._window(pixels, label[index], rng)

        for transform in (self.spatial, self.intensity):
            transform.set_random_state(seed=int(rng.integers(2**31)))
        sample = self.spatial({"image": pixels, "label": target[None].float()})
        sample = self.intensity(sample)
        pixels = sample["image"].clamp(0, processor.intensity_ceiling)
        pixels = (pixels - processor.image_mean) / processor.image_std
        position = position[:, :1, :1].expand(-1, *pixels.shape[1:])
        return {
            "pixel_values": torch.cat([pixels, position]).contiguous(),
            "labels": sample["label"][0].round().long(),
        }

    def _window(self, pixels: Tensor, label: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A window 1.5 times as large as the network's, at a position that the pipeline could use, shifted at random.

        The pipeline centres a slice that is smaller than the window and tiles a larger one. Training does the same.
        """
        extent, window = np.array(label.shape), np.array(self.processor.image_size)
        spare = np.maximum(extent - window, 0)
        middle = extent / 2 + rng.uniform(-0.5, 0.5, 2) * spare + rng.uniform(-1, 1, 2) * self.augment["max_shift"]
        size = window * 3 // 2
        start = np.round(middle - size / 2).astype(int)
        before, after = np.maximum(-start, 0), np.maximum(start + size - extent, 0)
        inner = tuple(slice(max(s, 0), max(s + n, 0)) for s, n in zip(start, size, strict=True))
        padding = [int(p) for p in (before[1], after[1], before[0], after[0])]
        cut = [torch.nn.functional.pad(t[..., inner[0], inner[1]], padding) for t in (pixels, label)]
        return cut[0][..., : size[0], : size[1]], cut[1][: size[0], : size[1]]


def build_augmentation(augment: dict[str, Any], processor: BinaryFormerImageProcessor) -> tuple[mt.Compose, mt.Compose]:
    """MONAI transforms of a recipe's ``augment`` section: spatial ones for image and label, intensity ones for the image."""
    zoom, turn = augment["max_zoom"], augment["max_rotation"]
    spatial: list[mt.Transform] = [
        mt.RandAffined(
            keys=["image", "label"],
            prob=1.0,
            rotate_range=turn,
            scale_range=(zoom, zoom),
            shear_range=(augment["max_shear"], augment["max_shear"]),
            spatial_size=processor.image_size,
            mode=["bilinear", "nearest"],
            padding_mode="zeros",
        )
    ]
    if augment["flip_axis"] is not None:
        spatial.append(mt.RandFlipd(keys=["image", "label"], prob=0.5, spatial_axis=augment["flip_axis"]))
    p, key = augment["intensity_probability"], "image"
    intensity: list[mt.Transform] = [
        mt.RandGaussianSmoothd(key, sigma_x=(0.3, augment["max_blur"]), sigma_y=(0.3, augment["max_blur"]), prob=p),
        # MONAI's own choice, "nearest", moves the image by up to a pixel off its labels.
        mt.RandSimulateLowResolutiond(
            key, prob=p / 2, zoom_range=(0.5, 1.0), downsample_mode="area", upsample_mode="bilinear"
        ),
        mt.RandBiasFieldd(key, degree=2, coeff_range=(0.0, augment["max_bias"]), prob=p),
        mt.RandAdjustContrastd(key, gamma=(1 / augment["max_gamma"], augment["max_gamma"]), prob=p),
        mt.RandScaleIntensityd(key, factors=augment["max_gain"], prob=1.0),
        mt.RandGaussianNoised(key, std=augment["max_noise"], prob=p),
        mt.ToTensord([key, "label"], track_meta=False),
    ]
    return mt.Compose(spatial), mt.Compose(intensity)
