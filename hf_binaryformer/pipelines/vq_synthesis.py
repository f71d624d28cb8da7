"""Synthesis of volumes, and likelihood of given ones, by unconditional absorbing diffusion (paper Sec. 3.2, A.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from hf_binaryformer.modeling.attention import drawing_from
from hf_binaryformer.pipelines.token_units import Generators
from hf_binaryformer.pipelines.vq_sampling import StepCallback, VQSamplingPipeline

OUTPUT_TYPES = ("pt", "np", "tokens")


@dataclass
class BinaryVQOutput(BaseOutput):
    """Synthesised volumes.

    Args:
        images: (B, 1, D, H, W) float32, axes I, J, K in RAS order, 0 (background) to about 1; None for "tokens".
        tokens: (B, K, d, h, w) uint8.
    """

    images: Tensor | np.ndarray | None
    tokens: Tensor


class BinaryVQPipeline(VQSamplingPipeline):
    """Synthesises 3D volumes: all tokens start masked, are drawn a share at a time, and decoded.

    Args:
        vqmodel, transformer, scheduler: see :class:`~hf_binaryformer.pipelines.vq_sampling.VQSamplingPipeline`.

    Example:
        >>> pipeline = BinaryVQPipeline.from_pretrained("binaryvq-tiny-brain")
        >>> volume = pipeline(generator=torch.Generator().manual_seed(0)).images[0, 0]
    """

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 200,
        temperature: float | None = None,
        generator: Generators = None,
        grid_size: Sequence[int] | None = None,
        output_type: str = "pt",
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("tokens",),
        return_dict: bool = True,
    ) -> BinaryVQOutput | tuple[Tensor | np.ndarray | None, Tensor]:
        """Synthesise volumes.

        Args:
            batch_size: how many.
            num_inference_steps: steps that share the tokens evenly; more steps than tokens make no difference.
            temperature: temperature of the draws; 0 takes the likeliest token, None the scheduler's temperature.
            generator: one (its volumes are the same as if they were made one after another), or a list with one per
                volume.
            grid_size: token positions (d, h, w); None takes what the transformer was trained on.
            output_type: "pt", "np", or "tokens" to skip decoding.
            callback_on_step_end: called with (pipeline, step, timestep, {"tokens": ...}) after each step; a dictionary
                that it returns replaces the tokens.
            callback_on_step_end_tensor_inputs: what that dictionary holds.
            return_dict: False returns a tuple.

        Returns:
            Volumes on the CPU and their tokens.

        Raises:
            ValueError: an argument is out of range, or the number of generators differs from that of the volumes.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is '{output_type}', expected one of {', '.join(OUTPUT_TYPES)}")
        grid = tuple(grid_size or self.transformer.config.grid_size)
        if len(grid) != 3 or min(grid) < 1:
            raise ValueError(f"grid_size is {grid}, expected three numbers of token positions, each at least 1")
        masked = torch.ones((batch_size, self.transformer.config.num_codebooks, *grid), dtype=torch.bool)
        tokens = self.unmask(
            torch.zeros(masked.shape, dtype=torch.int64),
            masked,
            num_inference_steps,
            temperature,
            generator,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        images: Tensor | np.ndarray | None = None if output_type == "tokens" else self.decode(tokens)
        if output_type == "np" and isinstance(images, Tensor):
            images = images.numpy()
        self.maybe_free_model_hooks()
        output = BinaryVQOutput(images, tokens.to(torch.uint8))
        return output if return_dict else (output.images, output.tokens)

    @torch.no_grad()
    def elbo(self, volumes: Tensor, *, num_samples: int = 16, generator: torch.Generator | None = None) -> Tensor:
        """Upper bound of the bits that a volume's tokens take: the negative evidence lower bound of the diffusion.

        Times of masking are spread evenly over 1 ... T; each gives one mask.

        Args:
            volumes: scaled volumes (B, 1, D, H, W), or their tokens (B, K, d, h, w) as integers.
            num_samples: number of times for each volume; the error of the estimate decreases with it.
            generator: random generator of the masks and times, and of attention that draws.

        Returns:
            (B,) bits for each token position, all K entries together. A model without any knowledge has K * log2(V).
        """
        from hf_binaryformer.modeling.vq_transformer import elbo_loss

        total, sums = self.scheduler.config.num_train_timesteps, torch.zeros(len(volumes), dtype=torch.float64)
        tokens = self._as_tokens(volumes)
        for timestep in self._times(num_samples, generator):
            times = torch.full((len(tokens),), timestep)
            noisy, masked = self.scheduler.add_noise(tokens, times, generator)
            logits = self._logits(noisy, generator)
            sums += elbo_loss(logits, tokens, masked, times, total, weighting="elbo", reduction="none").double()
        return (sums * self.transformer.config.num_codebooks / num_samples).float()

    @torch.no_grad()
    def token_accuracy(
        self, volumes: Tensor, *, num_samples: int = 16, generator: torch.Generator | None = None
    ) -> Tensor:
        """Share of the masked entries whose likeliest prediction is right, over times of masking spread evenly.

        Args and shapes as in :meth:`elbo`.

        Returns:
            (B,), 0 to 1.
        """
        tokens = self._as_tokens(volumes)
        right, count = torch.zeros(len(tokens)), torch.zeros(len(tokens))
        for timestep in self._times(num_samples, generator):
            noisy, masked = self.scheduler.add_noise(tokens, torch.full((len(tokens),), timestep), generator)
            hits = (self._logits(noisy, generator).argmax(2) == tokens) & masked
            right += hits.flatten(1).sum(1)
            count += masked.flatten(1).sum(1)
        return right / count.clamp_min(1)

    def _times(self, number: int, generator: torch.Generator | None) -> list[int]:
        """One time out of each of ``number`` equal parts of 1 ... T."""
        if number < 1:
            raise ValueError(f"num_samples is {number}, expected at least 1")
        total = self.scheduler.config.num_train_timesteps
        draws = torch.rand(number, generator=generator, dtype=torch.float64)
        return [min(total, math.floor((i + float(u)) * total / number) + 1) for i, u in enumerate(draws)]

    def _as_tokens(self, volumes: Tensor) -> Tensor:
        return self.encode(volumes) if volumes.is_floating_point() else volumes.cpu().long()

    def _logits(self, tokens: Tensor, generator: torch.Generator | None) -> Tensor:
        with self._running(self.transformer), drawing_from(self.transformer, generator):
            return self.transformer(tokens.to(self.device)).logits.float().cpu()
