"""Segments whole volumes: runs slices through the network, and resamples probabilities to the volume's own grid."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_binaryformer.modeling.at_rest import unchanged
from hf_binaryformer.modeling.attention import attention_backend, drawing_from
from hf_binaryformer.pipelines.grids import (
    ROUNDING,
    add_margin,
    crop_affine,
    extent_mm,
    foreground_mask,
    narrow_margin,
    occupied_box,
    resample,
    same_spacing,
)
from hf_binaryformer.pipelines.postprocessing import head_mask, intracranial_ml, largest_pieces
from hf_binaryformer.pipelines.precision import AUTO, number_format
from hf_binaryformer.pipelines.quality import quality_notes, quality_report
from hf_binaryformer.pipelines.segmentation_report import (
    VolumeSegmentationOutput,
    segmentation_notes,
    segmentation_report,
)
from hf_binaryformer.pipelines.sides import mirrored_labels
from hf_binaryformer.pipelines.slice_results import (
    Probabilities,
    ProgressCallback,
    Winners,
    axes_of,
    batches_of_slices,
    most_probable,
    pad_in_plane,
    view_names,
)
from hf_binaryformer.pipelines.structure_names import is_brain
from hf_binaryformer.pipelines.volumes import Volume, read_volume

DEFAULT_SEED = 0


class VolumeSegmentationPipeline:
    """Labels whole 3D volumes with a network that sees 2D slices.

    The volume is scaled by the processor, cut to its foreground, brought to the processor's spacing, and run through
    the network slice by slice, in overlapping windows where the foreground of a slice is larger than the window.
    Probabilities are resampled back, one label at a time, and the most probable label is taken on the volume's own grid. The
    mean probability of what was taken is the quality score of each structure (:mod:`hf_binaryformer.pipelines.quality`).

    Args:
        model: ``BinaryFormerForSemanticSegmentation``, or any module that takes (B, C, H, W), returns an object with
            ``logits`` (B, num_labels, H, W), and has a ``config`` with ``id2label``.
        processor: the image processor that the model was trained with.
        device: to move the model to; None leaves it where it is.
        dtype: torch.bfloat16 or torch.float16, or their names, run the network under autocast; None and torch.float32 run
            it in the type of its own weights, which ``pipeline.model.half()`` for example may change. "auto": bfloat16 where
            the device has it in hardware (:func:`~hf_binaryformer.pipelines.precision.fast_format`), or else float32.
        batch_size: windows that go through the network at once.

    Raises:
        ValueError: processor and model do not belong together, or ``dtype`` or ``batch_size`` is invalid.

    Example:
        >>> pipeline = VolumeSegmentationPipeline.from_pretrained("binaryformer-brain")
        >>> result = pipeline("head.nii.gz", progress=True)
        >>> result.save("head_labels.nii.gz")
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        batch_size: int = 4,
    ) -> None:
        channels = getattr(model.config, "num_channels", processor.num_channels)
        if processor.num_channels != channels:
            raise ValueError(
                f"the processor makes {processor.num_channels} channels, the model expects {channels}: "
                f"load both from the same checkpoint"
            )
        patch = getattr(model.config, "patch_size", 1)
        if any(side % patch for side in processor.image_size):
            raise ValueError(
                f"the processor's image_size is {tuple(processor.image_size)}, expected multiples of the model's patch "
                f"size {patch}: load both from the same checkpoint"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        self.model = model if device is None else model.to(device)
        self.processor = processor
        self.dtype = number_format(dtype, self.device)
        if dtype == AUTO and self.weight_dtype != torch.float32:
            self.dtype = torch.float32  # weights of another type run in their own
        self.batch_size = batch_size
        self._number_format()  # raises if weights and dtype do not go together
        # In the order of the network's classes, whatever the order in the file.
        self.label_names = {
            index: str(name) for index, name in sorted((int(k), n) for k, n in model.config.id2label.items())
        }
        # The number of each class of the network in label volumes; None: its own.
        self.label_values = getattr(model.config, "label_values", None)
        if self.label_values is not None:
            self.label_names = {value: self.label_names[index] for index, value in enumerate(self.label_values)}

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        batch_size: int = 4,
        backend: str | None = None,
        **options: Any,
    ) -> VolumeSegmentationPipeline:
        """Load model and processor by short name, folder or Hub id.

        Args:
            name: see :func:`hf_binaryformer.from_pretrained`.
            device: None takes CUDA where there is one, or else the CPU.
            dtype, batch_size: as in the constructor.
            backend: backend of Hamming attention; None leaves the choice to the operator.
            options: handed to the model's and the processor's ``from_pretrained``, ``revision`` for example.

        Raises:
            CheckpointNotFoundError, CheckpointError: as for :func:`hf_binaryformer.from_pretrained`.
            ChangedError: the checkpoint's files changed meanwhile.
            BackendUnavailableError: the backend cannot run here.
        """
        from hf_binaryformer.modeling.image_processing import BinaryFormerImageProcessor
        from hf_binaryformer.modeling.networks import BinaryFormerForSemanticSegmentation
        from hf_binaryformer.modeling.pretrained import HUB_OPTIONS, resolve_checkpoint

        hub_options = {key: options.pop(key) for key in HUB_OPTIONS if key in options}
        folder = resolve_checkpoint(name, **hub_options)
        with unchanged(folder):
            model = BinaryFormerForSemanticSegmentation.from_pretrained(folder, **options)
            processor = BinaryFormerImageProcessor.from_pretrained(folder, **options)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        pipeline = cls(model, processor, device=device, dtype=dtype, batch_size=batch_size)
        pipeline.model.set_attention_backend(backend)
        return pipeline

    @property
    def name(self) -> str:
        """What the model is called: its folder, or its class if it was loaded from none."""
        return Path(getattr(self.model.config, "name_or_path", "")).name or type(self.model).__name__

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def weight_dtype(self) -> torch.dtype:
        """Type of the model's weights."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    def _number_format(self) -> torch.dtype:
        """What the network is computed in: ``dtype`` under autocast, or the type of its weights.

        Raises:
            ValueError: autocast cannot run weights of this type.
        """
        if self.dtype == torch.float32:
            return self.weight_dtype
        if self.weight_dtype not in (torch.float32, self.dtype):
            raise ValueError(
                f"the model's weights are {self.weight_dtype}, dtype is {self.dtype}, which takes weights of torch.float32 "
                f"or of that type: call model.float(), or leave dtype out to run the weights in their own type"
            )
        return self.dtype

    def settings(
        self,
        *,
        views: str | None = None,
        mirror: bool | None = None,
        keep_largest: bool | None = None,
        head_only: bool | None = None,
    ) -> dict[str, Any]:
        """What decides about labels beside the weights: number format, views, steps after the network.

        Arguments as in a call; the result says what such a call takes.

        Raises:
            ValueError: there is no such view, the processor does not allow ``mirror``, or a label has one side only.
        """
        if mirror and self.processor.mirror is None:
            raise ValueError(
                f"mirror is asked of {self.name}, whose image processor does not allow it: leave it out, or set mirror to false "
                f"there if the network was trained on mirror images"
            )
        mirror = bool(self.processor.mirror if mirror is None else mirror)
        if mirror:
            mirrored_labels(self.label_names)  # raises
        axes = self.processor.slice_axes if views is None else axes_of(views)
        return {
            "dtype": str(self._number_format()).removeprefix("torch."),
            "views": view_names(axes),
            "mirror": mirror,
            "keep_largest": bool(self.processor.keep_largest if keep_largest is None else keep_largest),
            "head_only": bool(self.processor.head_only if head_only is None else head_only),
        }

    def __call__(
        self,
        volume: Volume | str | os.PathLike[str],
        *,
        return_probabilities: bool = False,
        progress: ProgressCallback | bool = False,
        generator: torch.Generator | None = None,
        views: str | None = None,
        mirror: bool | None = None,
        keep_largest: bool | None = None,
        head_only: bool | None = None,
    ) -> VolumeSegmentationOutput:
        """Segment one volume.

        Args:
            volume: a file that :func:`~hf_binaryformer.pipelines.volumes.read_volume` reads, or what it returned.
            return_probabilities: keep the probability of every label on the volume's grid; 2 bytes per label and voxel.
            progress: True shows a bar; a function is called with (slices done, all slices).
            generator: what attention draws from, if it draws ("hamming_bernoulli"). None: a new one with the same seed for
                each volume, so that a volume gets the same labels each time.
            views: "sagittal", "coronal" or "axial" slices, or "all": the mean of the three views' probabilities, in three
                times the time and with 2 bytes per label and voxel. None: the processor's ``slice_axis``.
            mirror: average the probabilities with those of the mirror image, left and right exchanged, in twice the time.
                None: as the processor says.
            keep_largest: keep the largest piece of each structure
                (:func:`~hf_binaryformer.pipelines.postprocessing.largest_pieces`). None: as the processor says.
            head_only: remove labels outside the head (:func:`~hf_binaryformer.pipelines.postprocessing.head_mask`). None: as
                the processor says. Probabilities do not change.

        Raises:
            VolumeError: the file cannot be used.
            ValueError: as for :meth:`settings`, or the model was cast to a type that does not go with ``dtype``.
        """
        start = time.perf_counter()
        self._number_format()  # the model may have been cast since
        settings = self.settings(views=views, mirror=mirror, keep_largest=keep_largest, head_only=head_only)
        axes = [axis for view in settings["views"] for axis in axes_of(view)]
        if not isinstance(volume, Volume):
            volume = read_volume(volume)
        scale = self.processor.intensity_scale(volume.array)
        scaled = scale.apply(volume.array)
        bright = foreground_mask(scaled)
        foreground = occupied_box(bright)
        box = add_margin(foreground, scaled.shape, volume.spacing)
        box = narrow_margin(box, foreground, self._window_voxels(axes, volume.spacing))
        crop, affine = scaled[box], crop_affine(volume.affine, box)
        spacing = self.processor.target_spacing(volume.spacing)
        resampled = not same_spacing(volume.spacing, spacing)
        network_input, network_affine = resample(crop, affine, spacing, order=1) if resampled else (crop, affine)

        labels = np.zeros(volume.array.shape, dtype=np.int32)
        probabilities = None
        if return_probabilities:
            probabilities = np.zeros((len(self.label_names), *labels.shape), dtype=np.float16)
            probabilities[0] = 1  # outside the foreground
        generator = generator or torch.Generator(self.device).manual_seed(DEFAULT_SEED)
        if resampled or return_probabilities or len(axes) > 1:
            found = Probabilities(network_input.shape, axes)
            self._predict(network_input, axes, settings["mirror"], progress, generator, found)
            kept = probabilities[(slice(None), *box)] if probabilities is not None else None
            inside, confidence = most_probable(found.volume, network_affine, affine, crop.shape, kept)
        else:
            winners = Winners(network_input.shape, axes[0])
            self._predict(network_input, axes, settings["mirror"], progress, generator, winners)
            inside, confidence = winners.labels.numpy(), winners.confidence.numpy()
        if self.label_values is not None:
            inside = np.array(self.label_values, dtype=np.int32)[inside]
        if settings["head_only"]:
            inside = np.where(head_mask(bright[box], volume.spacing), inside, 0)
        if settings["keep_largest"]:
            inside = largest_pieces(inside, self.label_names)
        labels[box] = inside
        quality = quality_report(inside, confidence, self.label_names, getattr(self.model.config, "quality", None))

        seconds = time.perf_counter() - start
        extent = extent_mm(foreground, volume.spacing)
        report = {
            **segmentation_report(volume, labels, self.label_names),
            "notes": [
                *segmentation_notes(volume, labels, extent, settings["views"], self.processor),
                *quality_notes(quality),
            ],
            "quality": quality,
            "intracranial_ml": intracranial_ml(inside, volume.spacing) if is_brain(self.label_names) else None,
            **settings,
            "intensities": scale.as_dict(),
            "model": self.name,
            "attention_type": getattr(self.model.config, "attention_type", None),
            "backend": attention_backend(self.model, self.device.type),
            "device": str(self.device),
            "network_grid": {"shape": list(network_input.shape), "affine": network_affine.tolist()},
            "seconds": seconds,
        }
        return VolumeSegmentationOutput(labels, probabilities, volume, dict(self.label_names), seconds, report)

    @torch.inference_mode()
    def _predict(
        self,
        scaled: np.ndarray,
        axes: Sequence[int],
        mirror: bool,
        progress: ProgressCallback | bool,
        generator: torch.Generator,
        result: Winners | Probabilities,
    ) -> None:
        """Run the slices of (I, J, K) along each of the axes, and hand the probabilities of each batch to the result."""
        training = self.model.training
        self.model.eval()
        images = [scaled, scaled[::-1].copy()] if mirror else [scaled]
        views = [
            [pad_in_plane(torch.from_numpy(image).movedim(axis, 0), self.processor.image_size) for image in images]
            for axis in axes
        ]
        classes = list(self.label_names)
        exchanged = [classes.index(label) for label in mirrored_labels(self.label_names).values()] if mirror else []
        try:
            for view, index in batches_of_slices([scaled.shape[axis] for axis in axes], self.batch_size, progress):
                axis, sagittal = axes[view], axes[view] == 0
                with drawing_from(self.model, generator):
                    probability = self._probability(*views[view][0], index)
                    if mirror:  # sagittal slices come in reverse, others are flipped
                        there = scaled.shape[0] - 1 - index if sagittal else index
                        mirrored = self._probability(*views[view][1], there)[:, exchanged]
                        probability = (probability + (mirrored if sagittal else mirrored.flip(2))) / 2
                result.add(axis, index, probability)
        finally:
            self.model.train(training)

    def _probability(self, slices: Tensor, inner: tuple[slice, slice], index: Tensor) -> Tensor:
        """Probabilities (B, C, H, W) float32 of padded slices ``index`` (B,), without their padding."""
        pixel_values = self.processor.slices_at(slices, index).to(self.device)
        return self._logits(pixel_values)[(..., *inner)].softmax(1)

    def _window_voxels(self, axes: Sequence[int], spacing: tuple[float, float, float]) -> list[int | None]:
        """How many of a volume's voxels the window of slices along ``axes`` holds along I, J, K; None: no slice has that axis.

        Where a foreground fits, one window serves a slice in place of four that overlap.
        """
        windows: list[int | None] = [None, None, None]
        for axis in axes:
            for across, side in zip((a for a in range(3) if a != axis), self.processor.image_size, strict=True):
                windows[across] = min(side, windows[across] or side)
        ratio = np.divide(self.processor.target_spacing(spacing), spacing)
        return [None if side is None else int(side * r + ROUNDING) for side, r in zip(windows, ratio, strict=True)]

    def _logits(self, pixel_values: Tensor) -> Tensor:
        """Logits (B, C, H, W) float32 of slices that are at least as large as the window."""
        window = tuple(self.processor.image_size)
        if tuple(pixel_values.shape[2:]) == window:
            return self._forward(pixel_values)
        from monai.inferers import sliding_window_inference

        logits = sliding_window_inference(
            pixel_values, window, self.batch_size, self._forward, overlap=self.processor.window_overlap, mode="gaussian"
        )
        assert isinstance(logits, Tensor)
        return logits

    def _forward(self, pixel_values: Tensor) -> Tensor:
        precision: AbstractContextManager[Any] = nullcontext()
        if self.dtype != torch.float32:
            precision = torch.autocast(self.device.type, dtype=self.dtype)
        with precision:
            logits = self.model(pixel_values.to(self.weight_dtype)).logits
        return logits.float()
