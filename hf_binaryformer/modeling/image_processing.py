"""From intensities to network input, and from logits to labels. The settings are saved with the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoImageProcessor, BaseImageProcessor, BatchFeature

from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.intensities import IntensityScale
from hf_binaryformer.modeling.pretrained import ProcessorCheckpointMixin

# Images with values below this many HU are taken for CTs.
HOUNSFIELD_AIR = -500


class BinaryFormerImageProcessor(ProcessorCheckpointMixin, BaseImageProcessor):  # type: ignore[misc]
    """Scales intensities by percentiles and cuts volumes into slices with their neighbours as channels.

    Args:
        orientation: axis codes that a volume is brought to before slicing; "RAS" is the only one supported.
        slice_axis: axis that slices are taken along: 0 left-right (sagittal), 1 posterior-anterior (coronal),
            2 inferior-superior (axial); "all": along each of them, and pipelines average the three views.
        spacing: voxel size in mm, (R, A, S), that a volume is resampled to. None, for all axes or for one, keeps the
            volume's own.
        num_slices: odd number of neighbouring slices that become channels.
        slice_position: add one channel with the slice's position along the axis, -1 to 1.
        image_size: (height, width) in pixels of the window that the network sees; one number: both.
        window_overlap: overlap of neighbouring windows, at least 0 and below 1.
        percentiles: lower and upper percentile of the intensities that become 0 and 1.
        foreground_only: find the background, which becomes 0, and take the percentiles over the foreground
            (:class:`~hf_binaryformer.modeling.intensities.IntensityScale`).
        intensity_ceiling: scaled intensities are clipped to [0, intensity_ceiling].
        hounsfield_window: HU that become 0 and 1 in a CT, outside of which intensities are clipped, in place of percentiles,
            which leave soft tissue hardly any contrast beside air and bone. A CT is told by values below -500. None: a CT
            is scaled as any image.
        image_mean, image_std: the mean is subtracted from the scaled intensities, then they are divided by the standard
            deviation.
        foreground_extent: smallest extent in mm, (R, A, S), of the foreground of the images that the network was trained
            on; pipelines tell when an image shows less. None: not known.
        keep_largest: pipelines keep the largest connected piece of each structure only. None: False.
        head_only: pipelines remove labels outside the head (:func:`~hf_binaryformer.pipelines.postprocessing.head_mask`).
            None: False.
        mirror: pipelines average the probabilities of each image with those of its mirror image, left and right exchanged.
            False: they do if asked to. None: they refuse, since the network may not have seen mirror images.

    Example:
        >>> processor = BinaryFormerImageProcessor(num_slices=3, image_size=(64, 64), spacing=None)
        >>> slices = processor.volume_to_slices(processor.scale_volume(np.random.rand(48, 20, 40)))
        >>> slices.shape  # 20 coronal slices, 3 channels
        torch.Size([20, 3, 48, 40])
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 (transformers reads it from the class)

    def __init__(
        self,
        orientation: str = "RAS",
        slice_axis: int | Literal["all"] = 1,
        spacing: Sequence[float | None] | None = (1.0, 1.0, 1.0),
        num_slices: int = 3,
        slice_position: bool = False,
        image_size: int | Sequence[int] = (224, 224),
        window_overlap: float = 0.25,
        percentiles: Sequence[float] = (0.5, 99.5),
        foreground_only: bool = True,
        intensity_ceiling: float = 1.5,
        hounsfield_window: Sequence[float] | None = None,
        image_mean: float = 0.0,
        image_std: float = 1.0,
        foreground_extent: Sequence[float] | None = None,
        keep_largest: bool | None = None,
        head_only: bool | None = None,
        mirror: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if orientation != "RAS":
            raise ValueError(f"orientation is '{orientation}', expected 'RAS'")
        if slice_axis not in (0, 1, 2, "all"):
            raise ValueError(f"slice_axis is {slice_axis}, expected 0, 1, 2 or 'all'")
        if num_slices < 1 or num_slices % 2 == 0:
            raise ValueError(f"num_slices is {num_slices}, expected an odd number of at least 1")
        size = [image_size] * 2 if isinstance(image_size, int) else image_size
        if not (isinstance(size, Sequence) and len(size) == 2 and all(int(s) == s > 0 for s in size)):
            raise ValueError(f"image_size is {image_size}, expected (height, width) in pixels, or one number for both")
        if spacing is not None and not (isinstance(spacing, Sequence) and len(spacing) == 3):
            raise ValueError(f"spacing is {spacing}, expected three numbers in mm or null, such as [1.0, 1.0, null]")
        if not 0 <= window_overlap < 1:
            raise ValueError(f"window_overlap is {window_overlap}, expected at least 0 and below 1")
        self.orientation = orientation
        self.slice_axis = slice_axis
        # A list even of None: transformers saves no None, and a loaded processor would get the default spacing.
        self.spacing = [None if s is None else float(s) for s in spacing or (None, None, None)]
        self.num_slices = num_slices
        self.slice_position = slice_position
        self.image_size = [int(s) for s in size]
        self.window_overlap = window_overlap
        self.percentiles = [float(p) for p in percentiles]
        self.foreground_only = foreground_only
        self.intensity_ceiling = intensity_ceiling
        self.hounsfield_window = None if hounsfield_window is None else [float(hu) for hu in hounsfield_window]
        self.image_mean = image_mean
        self.image_std = image_std
        self.foreground_extent = None if foreground_extent is None else [float(mm) for mm in foreground_extent]
        self.keep_largest = keep_largest
        self.head_only = head_only
        self.mirror = mirror

    @property
    def num_channels(self) -> int:
        """Channels of the network's input."""
        return self.num_slices + self.slice_position

    @property
    def slice_axes(self) -> tuple[int, ...]:
        """The axes that slices are taken along: one, or all three."""
        return (0, 1, 2) if self.slice_axis == "all" else (self.slice_axis,)

    def target_spacing(self, spacing: Sequence[float]) -> tuple[float, float, float]:
        """Voxel size in mm that a volume of this spacing is resampled to."""
        x, y, z = (own if asked is None else asked for asked, own in zip(self.spacing, spacing, strict=True))
        return x, y, z

    def intensity_scale(self, array: np.ndarray) -> IntensityScale:
        """The linear map of a volume or image of any shape to the network's intensities.

        Raises:
            ValueError: all intensities are equal.
        """
        if self.hounsfield_window is not None and np.min(array) < HOUNSFIELD_AIR:
            low, high = self.hounsfield_window
            return IntensityScale(low, high, ceiling=1.0)
        return IntensityScale.of(array, self.percentiles, self.intensity_ceiling, foreground_only=self.foreground_only)

    def scale_volume(self, array: np.ndarray) -> np.ndarray:
        """Scaled intensities, float32: background 0, the upper percentile 1 (:meth:`intensity_scale`)."""
        return self.intensity_scale(array).apply(array)

    def volume_to_slices(self, scaled: np.ndarray | Tensor) -> Tensor:
        """All slices of a scaled volume (I, J, K): (S, C, H, W) float32, with each slice's neighbours as its channels.

        H and W are the two other axes in their order. Beyond the ends, the first and last slices are repeated.

        Raises:
            ValueError: ``slice_axis`` is "all".
        """
        volume = torch.as_tensor(scaled, dtype=torch.float32).movedim(self._one_axis(), 0)
        return self.slices_at(volume, torch.arange(len(volume)))

    def slices_at(self, volume: Tensor, index: Tensor) -> Tensor:
        """Slices ``index`` (B,) of a scaled volume whose first axis is the slice axis: (B, C, H, W)."""
        half = self.num_slices // 2
        neighbours = (index[:, None] + torch.arange(-half, half + 1)).clamp(0, len(volume) - 1)
        channels = (volume[neighbours].float() - self.image_mean) / self.image_std
        if self.slice_position:
            position = 2 * index / max(len(volume) - 1, 1) - 1
            plane = position.float()[:, None, None, None].expand(-1, 1, *volume.shape[1:])
            channels = torch.cat([channels, plane], dim=1)
        return channels

    def slices_to_volume(self, slices: Tensor) -> Tensor:
        """Stack slices to a volume: (S, ..., H, W) to (..., I, J, K).

        Raises:
            ValueError: ``slice_axis`` is "all".
        """
        return slices.movedim(0, -3).movedim(-3, self._one_axis() - 3)

    def _one_axis(self) -> int:
        if self.slice_axis == "all":
            raise ValueError("slice_axis is 'all', expected 0, 1 or 2: set processor.slice_axis to one of them first")
        return self.slice_axis

    def preprocess(
        self,
        images: Any,
        segmentation_maps: Any = None,
        return_tensors: str | None = "pt",
        position: float = 0.0,
        **kwargs: Any,
    ) -> BatchFeature:
        """2D images to network input: scaled, resized to ``image_size``, grey values repeated over the slice channels.

        Args:
            images: one or a list of PIL images, (H, W) or (H, W, 3) arrays or tensors; colours are averaged.
            segmentation_maps: labels (H, W) of each; resized without interpolation.
            return_tensors: "pt" or "np".
            position: where the images lie along the slice axis, from -1 to 1 (0: in the middle), for a network that is told.

        Returns:
            ``pixel_values`` (B, C, H, W) float32, and ``labels`` (B, H, W) int64 if maps are given.
        """
        images = images if isinstance(images, (list, tuple)) else [images]
        grey = [np.asarray(image, dtype=np.float32) for image in images]
        grey = [g.mean(-1) if g.ndim == 3 else g for g in grey]
        pixels = [
            self.slices_at(torch.from_numpy(self.scale_volume(g))[None], torch.zeros(1, dtype=torch.long)) for g in grey
        ]
        if self.slice_position:
            for one in pixels:
                one[:, -1] = position
        data = {"pixel_values": torch.cat([F.interpolate(p, self.image_size, mode="bilinear") for p in pixels])}
        if segmentation_maps is not None:
            maps = segmentation_maps if isinstance(segmentation_maps, (list, tuple)) else [segmentation_maps]
            tensors = [torch.as_tensor(np.asarray(m), dtype=torch.float32)[None, None] for m in maps]
            # "nearest" rounds positions down, which moves labels half a pixel off an image that shrinks.
            resized = [F.interpolate(t, self.image_size, mode="nearest-exact") for t in tensors]
            data["labels"] = torch.cat(resized)[:, 0].long()
        return BatchFeature(data, tensor_type=return_tensors)

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[Tensor]:
        """Label maps (H, W) int64 from a model's output, resized to ``target_sizes`` (height, width) if given."""
        logits = outputs.logits.float()
        if target_sizes is None:
            return list(logits.argmax(1))
        if len(target_sizes) != len(logits):
            raise ValueError(f"{len(target_sizes)} target_sizes for {len(logits)} images; give one for each")
        return [
            F.interpolate(one[None], tuple(size), mode="bilinear")[0].argmax(0)
            for one, size in zip(logits, target_sizes, strict=True)
        ]


AutoImageProcessor.register(
    BinaryFormerConfig, image_processor_classes={"torchvision": BinaryFormerImageProcessor}, exist_ok=True
)
