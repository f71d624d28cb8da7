"""What synthesis and inpainting share: grids of volumes as the autoencoder sees them, and the sampling loop."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from hf_binaryformer.modeling.at_rest import unchanged
from hf_binaryformer.modeling.attention import drawing_from
from hf_binaryformer.modeling.checkpoint_files import check_components
from hf_binaryformer.modeling.pretrained import (
    HUB_OPTIONS,
    PIPELINE_CONFIG,
    CheckpointError,
    read_json,
    resolve_checkpoint,
)

# diffusers loads components only from modules that are already imported.
from hf_binaryformer.modeling.vq_autoencoder import BinaryVQModel
from hf_binaryformer.modeling.vq_transformer import BinaryVQTransformer3DModel
from hf_binaryformer.pipelines.absorbing_scheduler import AbsorbingScheduler
from hf_binaryformer.pipelines.grids import Box, foreground_mask, occupied_box
from hf_binaryformer.pipelines.precision import number_format
from hf_binaryformer.pipelines.token_units import Generators

# Called with (pipeline, steps done before, timestep, {"tokens": ...}); what it returns replaces the tokens.
StepCallback = Callable[[Any, int, int, dict[str, Tensor]], dict[str, Tensor]]
# Decoded intensities below this are background: the air around a head is 0, not a haze.
BACKGROUND_CEILING = 0.02


@dataclass(frozen=True)
class Placement:
    """Where a volume and a grid overlap.

    Args:
        volume_shape: (I, J, K) of the volume.
        volume: the part of the volume that lies on the grid.
        grid: the same part on the grid.
    """

    volume_shape: tuple[int, int, int]
    volume: Box
    grid: Box

    def apply(self, array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """From the volume to a grid of this shape; 0 where the volume does not reach."""
        placed = np.zeros(tuple(shape), dtype=array.dtype)
        placed[self.grid] = array[self.volume]
        return placed

    def undo(self, placed: np.ndarray) -> np.ndarray:
        """From the grid back to the volume's shape; 0 where the volume reaches beyond the grid."""
        array = np.zeros(self.volume_shape, dtype=placed.dtype)
        array[self.volume] = placed[self.grid]
        return array


def place_on_grid(
    array: np.ndarray, shape: Sequence[int], *, box: Sequence[slice] | None = None
) -> tuple[np.ndarray, Placement]:
    """Cut and pad a volume to a grid so that the box of its foreground lies in the middle.

    Args:
        array: scaled intensities, 0 for background, (I, J, K).
        shape: voxels of the grid along I, J, K, of the same size as the volume's.
        box: the part to place in the middle; None takes the box of the foreground (:func:`foreground_mask`), or else
            the whole volume.

    Returns:
        The array on the grid, 0 where the volume does not reach; and where it lies, for ``Placement.undo``.
    """
    if box is None:
        box = occupied_box(foreground_mask(array))
    inside, on_grid = [], []
    for size, wanted, part in zip(array.shape, shape, box, strict=True):
        # Voxel `start` of the volume is voxel 0 of the grid.
        start = (part.start + part.stop - wanted) // 2
        first, last = max(start, 0), min(start + wanted, size)
        last = max(first, last)
        inside.append(slice(first, last))
        on_grid.append(slice(first - start, last - start))
    placement = Placement((array.shape[0], array.shape[1], array.shape[2]), _box(inside), _box(on_grid))
    return placement.apply(array, shape), placement


def _box(parts: Sequence[slice]) -> Box:
    return parts[0], parts[1], parts[2]


class VQSamplingPipeline(DiffusionPipeline):
    """What the pipelines of absorbing diffusion have in common: their components, loading, unmasking and decoding.

    Args:
        vqmodel: ``BinaryVQModel``.
        transformer: ``BinaryVQTransformer3DModel``.
        scheduler: ``AbsorbingScheduler``.

    Raises:
        ValueError: the components were not made for one another.
    """

    model_cpu_offload_seq = "transformer->vqmodel"
    _callback_tensor_inputs = ["tokens"]  # noqa: RUF012 (diffusers reads it from the class)

    vqmodel: BinaryVQModel
    transformer: BinaryVQTransformer3DModel
    scheduler: AbsorbingScheduler

    def __init__(
        self, vqmodel: BinaryVQModel, transformer: BinaryVQTransformer3DModel, scheduler: AbsorbingScheduler
    ) -> None:
        super().__init__()
        for name in ("num_codebooks", "codebook_size"):
            ours, theirs = getattr(vqmodel.config, name), getattr(transformer.config, name)
            if ours != theirs:
                raise ValueError(
                    f"the autoencoder's {name} is {ours}, the transformer's {theirs}, expected the same: load both from "
                    f"one checkpoint"
                )
        scheduler.check_compatible(transformer.config)
        self.register_modules(vqmodel=vqmodel, transformer=transformer, scheduler=scheduler)
        self._num_timesteps = 0
        self._autocast_dtype: torch.dtype | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, **options: Any) -> Any:
        """Load by short name, folder or Hub id (:func:`~hf_binaryformer.modeling.pretrained.resolve_checkpoint`).

        Takes the options of diffusers' ``from_pretrained``.

        Raises:
            CheckpointNotFoundError, CheckpointError: no such checkpoint, or it cannot be used.
            ChangedError: its files changed meanwhile.
        """
        hub_options = {key: options.pop(key) for key in HUB_OPTIONS if key in options}
        folder = Path(cls.download(os.fspath(pretrained_model_name_or_path or ""), **hub_options))
        if not (folder / PIPELINE_CONFIG).is_file():
            raise CheckpointError(
                f"{folder} has no {PIPELINE_CONFIG}, expected a pipeline's folder made by save_pretrained: load models "
                f"with their own class"
            )
        index = read_json(folder / PIPELINE_CONFIG)
        kinds = {"vqmodel": BinaryVQModel, "transformer": BinaryVQTransformer3DModel, "scheduler": AbsorbingScheduler}
        own = {name: [kind.__module__, kind.__name__] for name, kind in kinds.items()}
        # What the caller gives is not loaded, of whatever class it is in the checkpoint.
        own |= {name: index.get(name, []) for name in options}
        check_components(folder, index, own)
        with unchanged(*(path for path in folder.iterdir() if path.is_dir()), folder / PIPELINE_CONFIG):
            return super().from_pretrained(str(folder), **options)

    @classmethod
    def download(cls, pretrained_model_name: str | os.PathLike[str], **options: Any) -> str:
        """The folder with the checkpoint's files, fetched from the Hub if need be.

        diffusers' own method fails: it treats components from outside its library as code that it must not run.
        """
        hub_options = {key: value for key, value in options.items() if key in HUB_OPTIONS and value is not None}
        return str(resolve_checkpoint(pretrained_model_name, **hub_options))

    @property
    def volume_shape(self) -> tuple[int, int, int]:
        """Voxels (I, J, K) of the grid that the transformer was trained on."""
        i, j, k = (int(n) * self.vqmodel.downsample for n in self.transformer.config.grid_size)
        return i, j, k

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size (I, J, K) of that grid in mm; 1 where the checkpoint does not say."""
        i, j, k = self.vqmodel.config.spacing or (1.0, 1.0, 1.0)
        return float(i), float(j), float(k)

    @property
    def num_timesteps(self) -> int:
        """Steps of the run in progress, or of the last one; those in which nothing changes are left out."""
        return self._num_timesteps

    def set_attention_backend(self, backend: str | None) -> None:
        """Choose the code that computes Hamming attention; None leaves the choice to the operator."""
        self.transformer.set_attention_backend(backend)

    def set_autocast(self, dtype: torch.dtype | str | None) -> None:
        """Run the networks in torch.bfloat16 or torch.float16 where that is safe; float32 or None turns this off.

        "auto" is bfloat16 where the device has it in hardware, or else float32.

        Raises:
            ValueError: the dtype is another one.
        """
        wanted = number_format(dtype, self.device)
        self._autocast_dtype = None if wanted == torch.float32 else wanted

    @contextmanager
    def _running(self, network: nn.Module, *, autocast: bool = True) -> Iterator[None]:
        """Context without gradients, under autocast and in evaluation mode; the network's mode is restored afterwards.

        In evaluation mode no codebook learns.
        """
        training, enabled = network.training, autocast and self._autocast_dtype is not None
        network.eval()
        try:
            with torch.inference_mode(), torch.autocast(self.device.type, self._autocast_dtype, enabled=enabled):
                yield
        finally:
            network.train(training)

    def encode(self, volumes: Tensor) -> Tensor:
        """Tokens (B, K, d, h, w) int64, on the CPU, of scaled volumes (B, 1, D, H, W) on a grid the autoencoder takes."""
        # Without autocast, so that known tokens do not change with the number format. One volume at a time, because a
        # volume is large and its tokens do not depend on the others.
        with self._running(self.vqmodel, autocast=False):
            codes = [self.vqmodel.encode(v[None].to(self.device, self.vqmodel.dtype)).tokens.cpu() for v in volumes]
        return torch.cat(codes)

    def decode(self, tokens: Tensor) -> Tensor:
        """Volumes (B, 1, D, H, W) float32, on the CPU, 0 to the intensity ceiling, of tokens (B, K, d, h, w)."""
        with self._running(self.vqmodel):
            decoded = [self.vqmodel.tiled_decode(t[None].to(self.device)).sample.float().cpu() for t in tokens.long()]
        volumes = torch.cat(decoded).clamp(0, self.vqmodel.config.intensity_ceiling)
        return volumes.masked_fill(volumes < BACKGROUND_CEILING, 0)

    def check_callback_inputs(self, names: Sequence[str]) -> None:
        """Refuse names that are not tensors of the loop.

        Raises:
            ValueError: an unknown name.
        """
        if unknown := sorted(set(names) - set(self._callback_tensor_inputs)):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs holds {', '.join(unknown)}, expected only "
                f"{', '.join(self._callback_tensor_inputs)}"
            )

    def unmask(
        self,
        tokens: Tensor,
        masked: Tensor,
        num_inference_steps: int,
        temperature: float | None,
        generator: Generators,
        callback: StepCallback | None = None,
        callback_tensor_inputs: Sequence[str] = ("tokens",),
        selection: str | None = None,
    ) -> Tensor:
        """Draw the masked tokens, a share at each step; the network does not run for steps that change nothing.

        Args:
            tokens, masked: (B, K, d, h, w), int64 and bool.
            num_inference_steps, temperature, selection: see ``AbsorbingScheduler.set_timesteps``.
            generator: one (its samples are the same as if they were drawn one after another), one per sample, or None. It
                decides all random numbers, those of attention that draws too.
            callback, callback_tensor_inputs: see :data:`StepCallback`.

        Returns:
            (B, K, d, h, w) int64 without mask tokens, on the CPU.
        """
        self.check_callback_inputs(callback_tensor_inputs)
        self.scheduler.set_timesteps(num_inference_steps, temperature=temperature, selection=selection)
        self.scheduler.prepare(masked, generator)
        tokens = tokens.masked_fill(masked, self.scheduler.config.mask_token_id).to(self.device)
        self._num_timesteps = len(self.scheduler.timesteps)
        drawing = drawing_from(self.transformer, self.scheduler.generators)
        with self._running(self.transformer), drawing, self.progress_bar(total=self._num_timesteps) as bar:
            for step, timestep in enumerate(self.scheduler.timesteps.tolist()):
                logits = self.transformer(tokens).logits
                tokens = self.scheduler.step(logits, timestep, tokens, return_dict=False)[0]
                if callback is not None:
                    values = {}
                    for name in callback_tensor_inputs:
                        values[name] = tokens
                    tokens = (callback(self, step, timestep, values) or {}).get("tokens", tokens)
                bar.update()
        return tokens.cpu()
