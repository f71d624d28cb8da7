"""Fills holes in volumes by absorbing diffusion; known voxels are returned bit for bit (paper Sec. 3.2, Fig. 4)."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils import BaseOutput
from torch import Tensor

from hf_binaryformer.pipelines.grids import VolumeError, affine_spacing
from hf_binaryformer.pipelines.provenance import GENERATED, NOTICE, versions
from hf_binaryformer.pipelines.token_units import Generators
from hf_binaryformer.pipelines.volumes import Volume, check_same_grid, read_volume, write_image
from hf_binaryformer.pipelines.vq_holes import HoleCase
from hf_binaryformer.pipelines.vq_sampling import StepCallback, VQSamplingPipeline

OUTPUT_TYPES = ("pt", "np", "tokens")
Image = Volume | Tensor | np.ndarray | str | os.PathLike[str]
EMPTY_MASK = "the mask is empty: nothing was filled, the image is the input"
CUT_OFF = "the image reaches beyond the checkpoint's grid: what lies outside was not looked at"


@dataclass
class BinaryVQInpaintOutput(BaseOutput):
    """Filled volumes, B images times ``num_samples``; the samples of one image follow one another.

    Args:
        images: (B * num_samples, 1, D, H, W) float32, on the input's grid (in RAS order, if it was a file) and in its
            intensities. Outside the hole they equal the input, as float32, bit for bit. None for output type "tokens".
        tokens: (B * num_samples, K, d, h, w) uint8, on the model's grid.
        std: (B, 1, D, H, W) float32, sample standard deviation over the samples in each voxel, 0 outside the hole; None
            for one sample.
        decoded: like ``images``, but with the decoded tokens in all voxels.
        report: seconds, steps, sizes and settings, in machine-readable form.
        volume: the input, if it was a file or a ``Volume``.
        hole: (D, H, W) bool, if the input was one.
    """

    images: Tensor | np.ndarray | None
    tokens: Tensor
    std: Tensor | np.ndarray | None
    decoded: Tensor | np.ndarray | None
    report: dict[str, Any]
    volume: Volume | None = None
    hole: np.ndarray | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the images on the input file's own grid; several samples become a 4D NIfTI.

        Outside the hole, the file has the input's own values: it is float32, or float64 if float32 would change them.

        Raises:
            VolumeError: the input was not a file, or the path cannot be written to.
        """
        if self.volume is None or self.images is None:
            raise VolumeError("the input was an array, expected a file or a Volume: save the images with its affine")
        images = as_one(np.asarray(self.images)[:, 0])
        if self.volume.exact is not None and self.hole is not None:
            images = np.where(self.hole, images.astype(np.float64), self.volume.exact)
        write_image(path, images, self.volume, description=f"{GENERATED} {NOTICE}")


def as_one(samples: np.ndarray) -> np.ndarray:
    """(N, I, J, K) as it is written: (I, J, K) for one sample."""
    return samples[0] if len(samples) == 1 else samples


class BinaryVQInpaintPipeline(VQSamplingPipeline):
    """Fills the hole of a volume.

    The image is scaled by percentiles of its known voxels, brought to the checkpoint's voxel size and onto its grid, and
    encoded. Every token whose receptive field touches the hole is masked and drawn again, a share of them at each step.
    Then all tokens are decoded and brought back to the image's grid, and only the hole is taken from the result. The
    image's values inside the hole are never used.

    Args:
        vqmodel, transformer, scheduler: see :class:`~hf_binaryformer.pipelines.vq_sampling.VQSamplingPipeline`.

    Example:
        >>> pipeline = BinaryVQInpaintPipeline.from_pretrained("binaryvq-tiny-brain")
        >>> result = pipeline("head.nii.gz", "hole.nii.gz", generator=torch.Generator().manual_seed(0))
        >>> result.save("filled.nii.gz")
    """

    @torch.no_grad()
    def __call__(
        self,
        image: Image,
        mask_image: Image,
        num_inference_steps: int = 200,
        temperature: float | None = 0.8,
        generator: Generators = None,
        num_samples: int = 1,
        output_type: str = "pt",
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("tokens",),
        feather: int = 0,
        selection: str | None = None,
        spacing: Sequence[float] | None = None,
        return_dict: bool = True,
    ) -> BinaryVQInpaintOutput | tuple[Any, ...]:
        """Fill the holes of one image or a batch of one size.

        Args:
            image: a file or ``Volume``; or a tensor or array (I, J, K), (1, I, J, K) or (B, 1, I, J, K) in RAS order, any
                intensities.
            mask_image: the same, on the same grid; voxels other than 0 are the hole. One mask serves a batch of images.
            num_inference_steps: steps that share the masked tokens evenly; those that change nothing are left out.
            temperature: temperature of the draws; 0 takes the likeliest token, None the scheduler's.
            generator: one, or a list with one for each of the B * num_samples results.
            num_samples: results for each image.
            output_type: "pt", "np", or "tokens" to skip decoding.
            callback_on_step_end, callback_on_step_end_tensor_inputs: as in ``BinaryVQPipeline``.
            feather: number of voxels, inwards from the hole's edge, over which the fill is blended. The difference
                between the known image at the edge and its decoded form is added to the fill with decreasing weight, so
                that no seam is visible. 0 is a hard edge.
            selection: order in which tokens are drawn, "random", "halton", "confidence" or "raster"; None takes the
                scheduler's.
            spacing: voxel size of an array along I, J, K in mm; None means that of the checkpoint.
            return_dict: False returns the tuple (images, tokens, std, decoded).

        Raises:
            VolumeError: an image or mask cannot be used: its shape is wrong, it has NaN outside the hole, the mask is on
                another grid,
                or the hole does not fit on the checkpoint's grid.
            ValueError: an argument out of range, or known intensities that are all equal.
        """
        start = time.perf_counter()
        check_inputs(output_type, num_samples, feather)
        images, holes, affine, volume, mask_notes = self._read(image, mask_image, spacing)
        cases = [self.prepare(one, hole, affine) for one, hole in zip(images, holes, strict=True)]
        notes = list(volume.notes) if volume is not None else []
        if any(case.cut_off for case in cases):
            notes.append(CUT_OFF)
        if not holes.any():
            notes.append(EMPTY_MASK)
            warnings.warn(EMPTY_MASK, stacklevel=3)
        notes += mask_notes

        known, masked = self.prepare_latents(cases, num_samples)
        sampling = time.perf_counter()
        tokens = self.unmask(
            known,
            masked,
            num_inference_steps,
            temperature,
            generator,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            selection,
        )
        sampling = time.perf_counter() - sampling

        filled = std = decoded = None
        if output_type != "tokens":
            filled, std, decoded = self._fill(cases, tokens, num_samples, feather)
        self.maybe_free_model_hooks()
        report = self._report(cases, volume, masked, num_samples, time.perf_counter() - start, sampling, notes)
        fields = [
            None if a is None else torch.from_numpy(a) if output_type == "pt" else a for a in (filled, std, decoded)
        ]
        hole = holes[0] if volume is not None else None
        output = BinaryVQInpaintOutput(fields[0], tokens.to(torch.uint8), fields[1], fields[2], report, volume, hole)
        return output if return_dict else (output.images, output.tokens, output.std, output.decoded)

    def prepare_latents(self, cases: Sequence[HoleCase], num_samples: int) -> tuple[Tensor, Tensor]:
        """Tokens of the known images, and which of them are to be drawn: (B * num_samples, K, d, h, w), int64 and bool."""
        known = self.encode(torch.from_numpy(np.stack([case.network_image() for case in cases]))[:, None])
        masked = torch.stack([self.touched(case) for case in cases])[:, None].expand_as(known)
        return known.repeat_interleave(num_samples, 0), masked.repeat_interleave(num_samples, 0)

    def _fill(
        self, cases: Sequence[HoleCase], tokens: Tensor, num_samples: int, feather: int
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Filled images, their standard deviation if there are several samples, and the decoded images."""
        owners = [case for case in cases for _ in range(num_samples)]
        volumes = self.decode(tokens)[:, 0].numpy()
        decoded = np.stack([case.to_input(one) for case, one in zip(owners, volumes, strict=True)])[:, None]
        filled = np.stack([c.composite(one[0], feather) for c, one in zip(owners, decoded, strict=True)])[:, None]
        std = None
        if num_samples > 1:
            groups = filled.reshape(len(cases), num_samples, *filled.shape[1:])
            holes = np.stack([case.hole for case in cases])
            std = np.where(holes[:, None], groups.std(1, ddof=1), 0).astype(np.float32)
        return filled, std, decoded

    def _read(
        self, image: Image, mask: Image, spacing: Sequence[float] | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, Volume | None, tuple[str, ...]]:
        """Images (B, I, J, K) float32, holes of that shape, their affine, the volume if it was a file, the mask's notes."""
        volume = read_volume(image, exact=True) if isinstance(image, (str, os.PathLike)) else image
        hole = read_volume(mask, labels=True) if isinstance(mask, (str, os.PathLike)) else mask
        if isinstance(volume, Volume) and isinstance(hole, Volume):
            check_same_grid(volume, hole)
        images, holes = _as_batch("image", volume), _as_batch("mask_image", hole)
        check_finite("mask_image", holes, "finite float32 values")
        if images.shape[1:] != holes.shape[1:] or len(holes) not in (1, len(images)):
            raise VolumeError(
                f"the mask has shape {holes.shape}, the image {images.shape} (batch, I, J, K), expected the same grid: "
                f"resample the mask onto the image"
            )
        holes = np.broadcast_to(holes != 0, images.shape)
        check_finite("image", np.where(holes, np.float32(0), images), "finite values outside the hole")
        images = np.where(np.isfinite(images), images, np.float32(0))
        notes = hole.notes if isinstance(hole, Volume) else ()
        if isinstance(volume, Volume):
            return images, holes, volume.affine, volume, notes
        return images, holes, np.diag([*(spacing or self.spacing), 1.0]), None, notes

    def prepare(self, image: np.ndarray, hole: np.ndarray, affine: np.ndarray) -> HoleCase:
        """Bring one image (I, J, K) with its hole to the model's intensities and grid: :meth:`HoleCase.of`."""
        config = self.vqmodel.config
        return HoleCase.of(
            image,
            hole,
            affine,
            grid=self.volume_shape,
            spacing=self.spacing if config.spacing else affine_spacing(affine),
            percentiles=config.percentiles,
            ceiling=config.intensity_ceiling,
        )

    def touched(self, case: HoleCase) -> Tensor:
        """Token positions (d, h, w), bool, whose receptive field touches the hole."""
        reach = self.vqmodel.encoder_reach
        hole = torch.from_numpy(case.network_hole)[None, None].float()
        for axis in range(3):
            kernel, padding = [1, 1, 1], [0, 0, 0]
            kernel[axis], padding[axis] = 2 * reach + 1, reach
            hole = F.max_pool3d(hole, kernel, stride=1, padding=padding)
        return F.max_pool3d(hole, self.vqmodel.downsample)[0, 0] > 0

    def _report(
        self,
        cases: Sequence[HoleCase],
        volume: Volume | None,
        masked: Tensor,
        num_samples: int,
        seconds: float,
        sampling_seconds: float,
        notes: list[str],
    ) -> dict[str, Any]:
        case = cases[0]
        config = self.transformer.config
        return {
            "notice": NOTICE,
            "generated": GENERATED,
            "notes": notes,
            "input": volume.name if volume is not None else "image in memory",
            "shape": list(case.image.shape),
            "affine": case.affine.tolist(),
            "intensities": [c.scale.as_dict() for c in cases],
            "hole_voxels": [int(c.hole.sum()) for c in cases],
            "hole_ml": [float(c.hole.sum() * abs(np.linalg.det(c.affine[:3, :3])) / 1000) for c in cases],
            "samples": num_samples,
            "token_grid": list(masked.shape[2:]),
            "tokens_masked": masked[::num_samples, 0].flatten(1).sum(1).tolist(),
            "steps": self.num_timesteps,
            "model_spacing_mm": list(self.spacing),
            "attention_type": config.attention_type,
            "device": str(self.device),
            "seconds": seconds,
            "sampling_seconds": sampling_seconds,
            "versions": versions(),
        }


def check_inputs(output_type: str, num_samples: int, feather: int) -> None:
    """Raise ValueError for arguments of :class:`BinaryVQInpaintPipeline` that are out of range."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type is '{output_type}', expected one of {', '.join(OUTPUT_TYPES)}")
    for name, value, least in (("num_samples", num_samples, 1), ("feather", feather, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}, expected at least {least}")


def check_finite(name: str, values: np.ndarray, expected: str) -> None:
    """Raise VolumeError if any value is NaN or infinite."""
    if bad := int((~np.isfinite(values)).sum()):
        raise VolumeError(
            f"{name} has {bad} NaN or infinite voxels of {values.size}, expected {expected}: repair them "
            f"(numpy.nan_to_num)"
        )


def _as_batch(name: str, values: Volume | Tensor | np.ndarray) -> np.ndarray:
    """(B, I, J, K) float32."""
    if isinstance(values, Volume):
        return values.array[None].astype(np.float32, copy=False)
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    shape = array.shape
    if array.ndim not in (3, 4, 5) or 0 in shape or any(n != 1 for n in shape[-4:-3]):
        raise VolumeError(
            f"{name} has shape {shape}, expected (I, J, K), (1, I, J, K) or (batch, 1, I, J, K) with one channel"
        )
    with np.errstate(over="ignore"):
        return array.reshape(shape[0] if array.ndim == 5 else 1, *shape[-3:]).astype(np.float32)
