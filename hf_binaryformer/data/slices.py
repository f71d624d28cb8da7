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

from hf_binaryformer.data.contrasts import RandomCurve, redrawn
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
from hf_binaryformer.pipelines.sides import mirrored_labels
from hf_binaryformer.pipelines.volumes import read_volume


class SliceSamples(Dataset):
    """Augmented training windows.

    Args:
        cases: volumes to draw from; held in memory, scaled and at the processor's spacing.
        processor: scaling, slicing and window size.
        augment: the recipe's ``augment`` section. Optional in it: ``slice_axes``, which replace the processor's slice axis
            by one of them at random; ``mirror``, the probability that left and right are exchanged, labels included; and
            ``class_fraction``, the share of slices drawn for a class: one of the volume's at random, then a slice that
            shows it. Structures in few slices are then seen more often. ``redraw_probability`` and ``curve_probability``:
            of another contrast (:func:`redrawn`, :class:`RandomCurve`).
        seed: random seed of the whole run.
        length: number of samples.
        label_names: of the labels in the cases' files. The k-th smallest label becomes class k. None: labels are
            classes and have no sides.

    Attributes:
        foreground_extent: smallest extent of the cases' foreground in mm, (R, A, S).

    Raises:
        ValueError: a case has a label without a name, or a flip along a slice's axis would exchange labels with sides.
    """

    def __init__(
        self,
        cases: list[Case],
        processor: BinaryFormerImageProcessor,
        augment: dict[str, Any],
        seed: int,
        length: int,
        label_names: dict[int, str] | None = None,
    ) -> None:
        self.processor, self.augment, self.seed, self.length = processor, augment, seed, length
        self.axes: list[int] = augment.get("slice_axes") or list(processor.slice_axes)
        classes, self.mirrored_classes = class_tables(label_names, strict=bool(augment.get("mirror")))
        # The first axis of a coronal or axial slice is left-right.
        crosses = augment["flip_axis"] == 0 and any(axis != 0 for axis in self.axes)
        if crosses and (self.mirrored_classes != torch.arange(256)).any():
            raise ValueError("labels are of the left or right: set augment.flip_axis to null and use augment.mirror")
        self.images: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.shown: list[dict[int, np.ndarray]] = []  # of each volume and axis: whether a slice shows a class
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
            if label.max() > 255 or (unnamed := np.setdiff1d(np.unique(label), np.flatnonzero(classes >= 0))).size:
                found = label.max() if label.max() > 255 else unnamed.tolist()
                raise ValueError(f"{case.label} has the labels {found}, which have no name: prepare the data anew")
            # A single slice axis lies outermost in memory, where its slices are read fastest.
            order = [self.axes[0], *(a for a in range(3) if a != self.axes[0])]
            for kept, array in (
                (self.images, scaled.astype(np.float16)),
                (self.labels, classes[label].astype(np.uint8)),
            ):
                inner = np.ascontiguousarray(array.transpose(order))
                kept.append(torch.from_numpy(inner).movedim(0, self.axes[0]))
            self.shown.append({axis: shown_classes(self.labels[-1].movedim(axis, 0)) for axis in set(self.axes)})
        self.foreground_extent = tuple(np.min(extents, axis=0).tolist())
        self.spatial, self.intensity = build_augmentation(augment, processor)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """``pixel_values`` (C, H, W) float32 and ``labels`` (H, W) int64 of sample ``number``."""
        rng = np.random.default_rng([self.seed, number])
        volume = int(rng.integers(len(self.images)))
        axis = self.axes[int(rng.integers(len(self.axes)))] if len(self.axes) > 1 else self.axes[0]
        image, label = self.images[volume].movedim(axis, 0), self.labels[volume].movedim(axis, 0)
        index = self._slice(self.shown[volume][axis], rng)

        processor = self.processor
        channels = processor.slices_at(image, torch.tensor([index]))[0]
        pixels, position = channels[: processor.num_slices], channels[processor.num_slices :]
        # Augmentation works on the scaled intensities, in which 0 is background.
        pixels = pixels * processor.image_std + processor.image_mean
        half = processor.num_slices // 2
        classes = label[torch.arange(index - half, index + half + 1).clamp(0, len(label) - 1)].long()
        if self.augment.get("mirror") and rng.random() < self.augment["mirror"]:
            # In a sagittal slice, left and right are the neighbours and the sign of the position.
            pixels = pixels.flip(0 if axis == 0 else 1)
            position = -position if axis == 0 else position
            classes = self.mirrored_classes[classes.flip(0 if axis == 0 else 1)]
        if self.augment.get("redraw_probability") and rng.random() < self.augment["redraw_probability"]:
            pixels = redrawn(pixels, classes, self.mirrored_classes, rng)
        pixels, target = self._window(pixels, classes[half], rng)

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

    def _slice(self, shown: np.ndarray, rng: np.random.Generator) -> int:
        """Number of a slice, given whether each slice shows each foreground class."""
        slices = np.flatnonzero(shown.any(1))
        if rng.random() >= self.augment["foreground_fraction"] or len(slices) == 0:
            slices = np.arange(len(shown))
        elif self.augment.get("class_fraction") and rng.random() < self.augment["class_fraction"]:
            slices = np.flatnonzero(shown[:, rng.choice(np.flatnonzero(shown.any(0)))])
        return int(rng.choice(slices))

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


def shown_classes(label: Tensor) -> np.ndarray:
    """Whether each slice of classes (slices, H, W) shows each foreground class: (slices, 255)."""
    first = torch.arange(len(label))[:, None, None] * 256
    counts = torch.bincount((first + label).flatten(), minlength=256 * len(label)).view(-1, 256)
    return (counts[:, 1:] > 0).numpy()


def class_tables(label_names: dict[int, str] | None, *, strict: bool) -> tuple[np.ndarray, Tensor]:
    """Class of each label (256,), -1 for those without a name, and the class that each class is in a mirror (256,).

    Raises:
        ValueError: a label is above 255, or, if ``strict``, is of one side alone.
    """
    if label_names is None:
        return np.arange(256, dtype=np.int16), torch.arange(256)
    if max(label_names) > 255:
        raise ValueError(f"a label is {max(label_names)}, expected at most 255 for training")
    classes, mirrored = np.full(256, -1, dtype=np.int16), torch.arange(256)
    classes[sorted(label_names)] = np.arange(len(label_names))
    for label, other in mirrored_labels(label_names, strict=strict).items():
        mirrored[int(classes[label])] = int(classes[other])
    return classes, mirrored


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
        *([RandomCurve(key, augment["curve_probability"])] if augment.get("curve_probability") else []),
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
