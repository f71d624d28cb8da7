"""Masking and time of absorbing diffusion: which tokens are masked in training, which are drawn at each step (paper A.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from hf_binaryformer.modeling.pretrained import DiffusersCheckpointMixin
from hf_binaryformer.pipelines.token_units import Generators, TokenUnits, gumbel_noise, sample_generators

SELECTIONS = ("random", "halton", "confidence", "raster")
GRANULARITIES = ("position", "codebook")


@dataclass
class AbsorbingSchedulerOutput(BaseOutput):
    """One step of :class:`AbsorbingScheduler`; all of the sample's shape (B, K, d, h, w).

    Args:
        prev_sample: tokens after the step, the input of the next one.
        pred_original_sample: ``sample`` with every masked token drawn, including those that stay masked: a preview.
        changed: bool, where ``prev_sample`` differs from ``sample``.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor
    changed: Tensor


@dataclass
class _Run:
    """State that :meth:`AbsorbingScheduler.prepare` fixes.

    Tokens of a sample are flattened; N = K d h w tokens, U units, V codebook entries.
    """

    units: TokenUnits
    generators: list[torch.Generator]
    hole: Tensor  # (B, N) bool, the tokens to draw
    wanted: Tensor  # (B,) number of units to draw
    steps: Tensor  # (B,) number of steps in which they are drawn
    order: Tensor = field(default_factory=lambda: torch.empty(0))  # (B, U), the smallest is drawn first
    noise: Tensor = field(default_factory=lambda: torch.empty(0))  # (B, N, V) Gumbel
    remask: Tensor = field(default_factory=lambda: torch.empty(0))  # (B, U) uniform

    def left(self, step: int, per_step: int | None) -> Tensor:
        """(B,) number of units that are still masked after ``step`` steps, independent of the other samples."""
        done = step * per_step if per_step else (step * self.wanted + self.steps // 2) // self.steps.clamp_min(1)
        return (self.wanted - done).clamp_min(0)


class AbsorbingScheduler(DiffusersCheckpointMixin, SchedulerMixin, ConfigMixin):
    r"""Masks tokens for training and draws them again, a few at each step (Bond-Taylor 2022; paper Sec. 3.2, A.2).

    Tokens that are masked and drawn together form a *unit*: a grid position with all its K tokens, or one token of it
    (``mask_granularity``), or a block of positions (``block_size``). Sampling in K' steps draws an equal share of the
    masked units at each step: token = argmax(logits + temperature * Gumbel noise), in float64. The tokens of one step,
    and so the K tokens of one position, are drawn independently of one another. A single token per step is exact in
    "random" and "raster" order; fewer steps are an approximation.

    All random numbers of a sample come from its own generator. They are drawn in advance for the whole grid, so that
    they depend neither on the rest of the batch nor on the mask. With ``remask_eta`` they are drawn again at each step,
    from the same generator.

    Args:
        num_train_timesteps: T; at training time t each unit is masked with probability t / T.
        mask_token_id: the token that says "masked"; also the number of codebook entries.
        num_codebooks: tokens at each position.
        selection: order in which units are drawn: "random"; "halton" (spread evenly over the grid, Besnier 2025);
            "confidence" (the likeliest first, Chang 2022: for holes; in synthesis it tends to draw only background);
            "raster" (one after another, C order).
        temperature: temperature of the draws; 0 takes the likeliest token.
        top_k: draw among the k likeliest tokens only.
        top_p: draw among the fewest tokens whose probabilities sum to this only.
        remask_eta: at each step each token drawn before is masked again with at most this probability, and drawn again
            later (ReMDM-cap, Wang 2025). Then more steps than units improve the sample further.
        block_size: side of the blocks of positions that are drawn together.
        mask_granularity: "position" or "codebook".

    Raises:
        ValueError: an unknown selection or granularity, or a number out of range.

    Example:
        >>> scheduler = AbsorbingScheduler(num_codebooks=1, mask_token_id=4)
        >>> scheduler.set_timesteps(3)
        >>> sample = torch.full((1, 1, 2, 2, 2), 4)
        >>> scheduler.prepare(sample == 4, torch.Generator().manual_seed(0))
        >>> for t in scheduler.timesteps:
        ...     sample = scheduler.step(torch.zeros(1, 1, 4, 2, 2, 2), t, sample).prev_sample
        >>> bool((sample == 4).any())
        False
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 256,
        mask_token_id: int = 64,
        num_codebooks: int = 8,
        selection: str = "random",
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        remask_eta: float = 0.0,
        block_size: int = 1,
        mask_granularity: str = "position",
    ) -> None:
        if mask_granularity not in GRANULARITIES:
            raise ValueError(f"mask_granularity is '{mask_granularity}', expected one of {', '.join(GRANULARITIES)}")
        for name, number, low, high in (
            ("top_k", top_k, 1, math.inf),
            ("top_p", top_p, 0, 1),
            ("remask_eta", remask_eta, 0, 1),
            ("block_size", block_size, 1, math.inf),
            ("num_train_timesteps", num_train_timesteps, 1, math.inf),
        ):
            if number is not None and not low <= number <= high:
                raise ValueError(f"{name} is {number}, expected {low} to {high}")
        self.timesteps = torch.zeros(0, dtype=torch.int64)
        self.num_inference_steps: int | None = None
        self._request: tuple[int | None, int | None] | None = None
        self._run: _Run | None = None
        self._set_draws(None, None)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        *,
        tokens_per_step: int | None = None,
        temperature: float | None = None,
        selection: str | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """Choose the number of steps, before :meth:`prepare`.

        ``timesteps`` count down, to 1 at most. They are final after :meth:`prepare`, which knows the mask. There are no
        more steps than units to draw, and none for an empty mask. With ``remask_eta`` all requested steps are kept,
        because each of them changes something.

        Args:
            num_inference_steps: steps that share the masked units evenly.
            tokens_per_step: the alternative: number of units drawn at each step; 1 is the paper's wording.
            temperature, selection: of this run; None takes the configuration's.
            device: of ``timesteps``.

        Raises:
            ValueError: not exactly one of the two numbers is given, it is below 1, the temperature is negative, or the
                selection is unknown.
        """
        given = [n for n in (num_inference_steps, tokens_per_step) if n is not None]
        if len(given) != 1 or given[0] < 1:
            raise ValueError(
                f"num_inference_steps is {num_inference_steps} and tokens_per_step {tokens_per_step}: give one, at least 1"
            )
        self._set_draws(temperature, selection)
        self._request, self._run = (num_inference_steps, tokens_per_step), None
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps or 0, 0, -1, device=device)

    def prepare(self, masked: Tensor, generator: Generators = None) -> None:
        """Draw the random numbers of each sample, and distribute its masked units over the steps.

        Args:
            masked: (B, K, d, h, w) bool, the tokens to be drawn; the others are known and never change.
            generator: one for the batch (its samples are the same as if they were drawn one after another), a list with
                one for each sample, or None: torch's own.

        Raises:
            ValueError: no steps are chosen, the shape is wrong, the number of generators differs from that of the
                samples, or a position is partly masked although its tokens are drawn together.
        """
        if self._request is None:
            raise ValueError("no steps are chosen: call set_timesteps before prepare")
        self._check_shape("masked", masked)
        if self.config.mask_granularity == "position" and not torch.equal(masked, masked[:, :1].expand_as(masked)):
            raise ValueError(
                "a position is masked in part; with mask_granularity 'position' mask all of its tokens or none"
            )
        # MPS has no float64.
        hole = masked.to("cpu" if masked.device.type == "mps" else masked.device).flatten(1)
        units = self._units(masked)
        wanted = (units.sum(hole) > 0).sum(1)
        steps, per_step = self._request
        if per_step is not None:
            used = -(-wanted // per_step)
        elif self.config.remask_eta:
            used = torch.where(wanted > 0, steps or 0, 0)
        else:
            used = wanted.clamp_max(steps or 0)
        needed = int(used.max()) if len(used) else 0
        self.num_inference_steps = needed if steps is None else steps
        first = self.num_inference_steps
        self.timesteps = torch.arange(first, first - needed, -1, device=self.timesteps.device)
        self._run = _Run(units, sample_generators(generator, len(masked)), hole, wanted, used)
        self._draw(self._run)

    @property
    def generators(self) -> list[torch.Generator]:
        """The generator of each sample since :meth:`prepare`, for a network that draws too; empty before that."""
        return self._run.generators if self._run else []

    def step(
        self, logits: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> AbsorbingSchedulerOutput | tuple[Tensor, Tensor, Tensor]:
        """Draw this step's share of the masked units.

        Args:
            logits: (B, K, V, d, h, w), the transformer's output for ``sample``.
            timestep: one of ``timesteps``.
            sample: (B, K, d, h, w) tokens, the masked ones ``mask_token_id``.

        Raises:
            ValueError: :meth:`prepare` was not called for samples of this shape, shapes do not fit, or logits are NaN.
        """
        run, config = self._run, self.config
        self._check_shape("sample", sample)
        if run is None or run.hole.shape != (len(sample), sample[0].numel()):
            raise ValueError(f"samples of shape {tuple(sample.shape)} are not prepared: call prepare before the steps")
        expected = (*sample.shape[:2], config.mask_token_id, *sample.shape[2:])
        if logits.shape != expected:
            raise ValueError(f"logits have shape {tuple(logits.shape)}, expected {expected}")
        if config.remask_eta:
            # A token that was masked again must not be drawn with the same random numbers as before.
            self._draw(run)
        before = sample.to(run.hole.device).flatten(1)
        masked = (before == config.mask_token_id) & run.hole
        rows = logits.movedim(2, -1)[masked.view(sample.shape).to(logits.device)].to(before.device).double()  # (M, V)
        if rows.isnan().any():
            raise ValueError("logits hold NaN: check the transformer's weights and its input")
        drawn = self._sample(rows, run.noise[masked])
        predicted = before.masked_scatter(masked, drawn.to(before.dtype))

        certainty = torch.zeros(before.shape, dtype=torch.float64, device=before.device)
        if self._selection == "confidence":
            certainty[masked] = rows.log_softmax(-1).gather(1, drawn[:, None])[:, 0]
        reveal, remask = self._choose(run, int(self.num_inference_steps or 0) - int(timestep), masked, certainty)
        after = torch.where(reveal, predicted, before).masked_fill(remask, config.mask_token_id)
        output = [t.view(sample.shape).to(sample.device) for t in (after, predicted, after != before)]
        return AbsorbingSchedulerOutput(*output) if return_dict else (output[0], output[1], output[2])

    def add_noise(
        self,
        tokens: Tensor,
        timesteps: Tensor,
        generator: Generators = None,
        block_size: int | Sequence[int] | None = None,
        hole: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mask each unit with probability t / T; t = T masks all, t = 0 none.

        Args:
            tokens: (B, K, d, h, w).
            timesteps: (B,), t from 0 to T.
            generator: as for :meth:`prepare`.
            block_size: side of the blocks masked together, one number or one per sample; None: the configuration's.
            hole: bool, broadcastable to the tokens' shape: nothing is masked outside it, as when a hole is inpainted.

        Returns:
            (masked tokens, masked), both (B, K, d, h, w), the second bool.

        Raises:
            ValueError: shapes that do not fit, or a time out of range.
        """
        config = self.config
        self._check_shape("tokens", tokens)
        times = timesteps.tolist()
        if len(times) != len(tokens) or any(not 0 <= t <= config.num_train_timesteps for t in times):
            raise ValueError(f"timesteps are {times}, expected {len(tokens)} from 0 to {config.num_train_timesteps}")
        size = config.block_size if block_size is None else block_size
        sizes = [size] * len(tokens) if isinstance(size, int) else list(size)
        masked = torch.zeros(tokens.shape, dtype=torch.bool)
        generators = sample_generators(generator, len(tokens))
        for row, t, side, own in zip(masked, times, sizes, generators, strict=True):
            units = self._units(row[None], side)
            draw = torch.rand(1, units.count, generator=own, dtype=torch.float64)
            row.copy_(units.spread(draw < t / config.num_train_timesteps).view(row.shape))
        masked = masked.to(tokens.device)
        if hole is not None:
            masked &= hole
        return tokens.masked_fill(masked, config.mask_token_id), masked

    def check_compatible(self, transformer_config: Any) -> None:
        """Refuse a transformer that was trained for another kind of masking.

        Args:
            transformer_config: of a :class:`BinaryVQTransformer3DModel`.

        Raises:
            ValueError: granularity, block size, number of codebooks or mask token differ.
        """
        mine, theirs = self.config, transformer_config
        if mine.block_size not in theirs.train_block_sizes:
            raise ValueError(
                f"the scheduler's block_size {mine.block_size} is not in the transformer's train_block_sizes "
                f"{list(theirs.train_block_sizes)}: take one of those, or train with this one"
            )
        for own_name, own, name, other in (
            ("mask_granularity", mine.mask_granularity, "mask_granularity", theirs.mask_granularity),
            ("num_codebooks", mine.num_codebooks, "num_codebooks", theirs.num_codebooks),
            ("mask_token_id", mine.mask_token_id, "codebook_size", theirs.codebook_size),
        ):
            if own != other:
                raise ValueError(
                    f"the scheduler's {own_name} is {own!r}, the transformer's {name} is {other!r}: make them equal"
                )

    def _set_draws(self, temperature: float | None, selection: str | None) -> None:
        self._selection = self.config.selection if selection is None else selection
        if self._selection not in SELECTIONS:
            raise ValueError(f"selection is '{self._selection}', expected one of {', '.join(SELECTIONS)}")
        self._temperature = self.config.temperature if temperature is None else temperature
        if not 0 <= self._temperature < math.inf:
            raise ValueError(f"temperature is {self._temperature}, expected a finite number, 0 or above")

    def _check_shape(self, name: str, tensor: Tensor) -> None:
        if tensor.dim() != 5 or tensor.shape[1] != self.config.num_codebooks:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected (batch, {self.config.num_codebooks} codebooks, d, h, w)"
            )

    def _units(self, tokens: Tensor, block_size: int | None = None) -> TokenUnits:
        return TokenUnits.build(tokens.shape[1:], block_size or self.config.block_size, self.config.mask_granularity)

    def _draw(self, run: _Run) -> None:
        """Fresh random numbers for every sample, each from its own generator."""
        size, device = run.hole.shape[1], run.hole.device
        # A Halton order is even only if one sequence is kept. A kept random order would begin with the same units.
        if not run.order.numel() or self._selection != "halton":
            run.order = torch.stack([run.units.order(self._selection, g) for g in run.generators]).to(device)
        run.noise = torch.stack([gumbel_noise((size, self.config.mask_token_id), g) for g in run.generators]).to(device)
        if self.config.remask_eta:
            draws = [torch.rand(run.units.count, generator=g, dtype=torch.float64) for g in run.generators]
            run.remask = torch.stack(draws).to(device)

    def _sample(self, rows: Tensor, noise: Tensor) -> Tensor:
        """One token for each row of logits (M, V), by the Gumbel-max rule."""
        top_k, top_p, temperature = self.config.top_k, self.config.top_p, self._temperature
        if top_k is not None and top_k < rows.shape[1]:
            rows = rows.masked_fill(rows < rows.topk(top_k).values[:, -1:], -math.inf)
        if top_p is not None and temperature > 0:
            probabilities, ranked = (rows / temperature).softmax(-1).sort(-1, descending=True)
            # A token is kept if those before it do not reach top_p, so that the likeliest is always kept.
            beyond = probabilities.cumsum(-1) - probabilities >= top_p
            beyond[:, 0] = False
            rows = rows.masked_fill(beyond.scatter(1, ranked, beyond), -math.inf)
        return (rows + temperature * noise).argmax(-1)

    def _choose(self, run: _Run, step: int, masked: Tensor, certainty: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens to draw now and tokens to mask again, each (B, N) bool, in step ``step``, counted from 0."""
        per_step = self._request[1] if self._request else None
        tokens = run.units.sum(masked)
        waiting = tokens > 0  # (B, U)
        target = run.left(step + 1, per_step)
        again = torch.zeros_like(waiting)
        if self.config.remask_eta:
            # ReMDM-cap: with a larger share, more units would be masked than the step should leave.
            share = target / (run.wanted - run.left(step, per_step)).clamp_min(1)
            done = (run.units.sum(run.hole) > 0) & ~waiting
            again = done & (run.remask < share.clamp_max(self.config.remask_eta)[:, None])
            again &= _smallest(run.remask.masked_fill(~again, math.inf), target)
        keys = run.order
        if self._selection == "confidence":
            keys = -run.units.sum(certainty) / tokens.clamp_min(1)
        number = waiting.sum(1) + again.sum(1) - target
        chosen = _smallest(keys.masked_fill(~waiting, math.inf), number) & waiting
        return run.units.spread(chosen) & masked, run.units.spread(again) & run.hole


def _smallest(keys: Tensor, number: Tensor) -> Tensor:
    """(B, U) bool, the ``number`` (B,) smallest keys of each row."""
    rank = keys.argsort(dim=1, stable=True).argsort(dim=1)
    return rank < number[:, None]
