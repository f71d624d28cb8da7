"""The denoiser of absorbing diffusion: from a 3D grid of tokens, some masked, to their distributions (paper A.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from hf_binaryformer.modeling.attention import AttentionControl, BinaryAttention, SharedAttention
from hf_binaryformer.modeling.attention_configuration import AttentionConfig, takes_fields_of
from hf_binaryformer.modeling.gradient_checkpointing import GradientCheckpointing
from hf_binaryformer.modeling.pretrained import DiffusersCheckpointMixin
from hf_binaryformer.modeling.token_weight import TokenWeight


@dataclass
class BinaryVQTransformer3DOutput(BaseOutput):
    """What the transformer returns.

    Args:
        logits: (B, K, V, d, h, w), unnormalised log-probabilities of the V entries of each sub-codebook.
    """

    logits: Tensor


class BinaryVQTransformer3DModel(
    AttentionControl, GradientCheckpointing, DiffusersCheckpointMixin, ModelMixin, ConfigMixin
):
    r"""Predicts every token of a grid from those that are not masked; all tokens attend to all (paper Sec. 3.2, A.2).

    The K tokens of a grid position are embedded separately and concatenated (8 x 48 = 384 channels). A position
    embedding is added, pre-norm blocks with 1-bit attention follow, and one linear layer gives K distributions over V
    entries. The time is not an input, because the input shows how much is masked.

    Args:
        grid_size: positions (d, h, w) that it is trained on; for other grids the position embedding is resized.
        num_codebooks: tokens K at each position.
        codebook_size: entries V of each sub-codebook; the token V means "masked" (:attr:`mask_token_id`).
        embedding_dim: channels of one token's embedding; the blocks are K times as wide.
        num_layers, num_heads, mlp_ratio, qkv_bias, layer_norm_eps: of the pre-norm blocks, as in timm.
        dropout: after each attention and MLP, in training.
        position_embedding: "learned" (one vector per position) or "axial" (the sum of one vector for each coordinate);
            both are initialised with sines and cosines of the three coordinates.
        mask_granularity: what was masked together in training: a whole "position", or each "codebook" entry separately.
        train_block_sizes: sides of the blocks of positions that were masked together in training.
        attention: the fields of :class:`AttentionConfig`, each a keyword of its own.

    Raises:
        ValueError: the fields do not fit together.

    Example:
        >>> model = BinaryVQTransformer3DModel(grid_size=(2, 3, 4), num_layers=2)
        >>> tokens = torch.full((1, 8, 2, 3, 4), model.mask_token_id)
        >>> model(tokens).logits.shape
        torch.Size([1, 8, 64, 2, 3, 4])
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (diffusers reads it from the class)

    @register_to_config
    @takes_fields_of(AttentionConfig)
    def __init__(
        self,
        grid_size: Sequence[int] = (10, 14, 12),
        num_codebooks: int = 8,
        codebook_size: int = 64,
        embedding_dim: int = 48,
        num_layers: int = 8,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_norm_eps: float = 1e-6,
        dropout: float = 0.0,
        position_embedding: str = "learned",
        mask_granularity: str = "position",
        train_block_sizes: Sequence[int] = (1, 2),
        **attention: Any,
    ) -> None:
        super().__init__()
        if len(grid_size) != 3 or min(grid_size) < 1:
            raise ValueError(f"grid_size is {grid_size}, expected three numbers of positions, each at least 1")
        if position_embedding not in ("learned", "axial"):
            raise ValueError(f"position_embedding is '{position_embedding}', expected 'learned' or 'axial'")
        if mask_granularity not in ("position", "codebook"):
            raise ValueError(f"mask_granularity is '{mask_granularity}', expected 'position' or 'codebook'")
        dim = num_codebooks * embedding_dim
        config = AttentionConfig(**attention)
        config.check_heads(dim, num_heads)

        self.token_embed = nn.Embedding(num_codebooks * (codebook_size + 1), embedding_dim)
        axes = _axial_start(grid_size, dim)
        tables = [sum(axes, torch.zeros(()))] if position_embedding == "learned" else axes
        self.pos_embed = nn.ParameterList(nn.Parameter(table) for table in tables)
        self.blocks = nn.ModuleList(
            Block(
                dim,
                num_heads,
                mlp_ratio,
                qkv_bias,
                proj_drop=dropout,
                norm_layer=cast(Any, partial(nn.LayerNorm, eps=layer_norm_eps)),
                attn_layer=BinaryAttention.bound_to(config),
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim, eps=layer_norm_eps)
        self.head = nn.Linear(dim, num_codebooks * codebook_size)
        self.gradient_checkpointing = False

        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=config.initializer_range)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, TokenWeight):
                module.reset_parameters()
        # As large as the sines and cosines of the position, so that neither dominates.
        nn.init.normal_(self.token_embed.weight, std=math.sqrt(0.5))
        if config.share_attention:
            for block in self.blocks[1:]:
                block.attn = SharedAttention(cast(BinaryAttention, self.blocks[0].attn))

    @property
    def mask_token_id(self) -> int:
        """The token that means "masked"; one above the last codebook entry."""
        return self.config.codebook_size

    def forward(self, tokens: Tensor, return_dict: bool = True) -> BinaryVQTransformer3DOutput | tuple[Tensor]:
        """Distributions of all tokens, masked or not.

        Args:
            tokens: (B, K, d, h, w) integers, 0 to V - 1, or V where masked.

        Raises:
            ValueError: the number of codebooks or axes is wrong, or tokens are out of range.
        """
        config = self.config
        self._check(tokens)
        offsets = torch.arange(config.num_codebooks, device=tokens.device) * (config.codebook_size + 1)
        x = self.token_embed(tokens.flatten(2).mT.long() + offsets).flatten(2)  # (B, N, D)
        x = x + self._positions(tokens.shape[2:]).to(x.dtype)
        for block in self.blocks:
            checkpointed = self.gradient_checkpointing and torch.is_grad_enabled()
            x = self._checkpointed(block, x) if checkpointed else block(x)
        logits = self.head(self.norm(x)).unflatten(2, (config.num_codebooks, config.codebook_size))  # (B, N, K, V)
        logits = logits.permute(0, 2, 3, 1).unflatten(3, tokens.shape[2:])
        return BinaryVQTransformer3DOutput(logits) if return_dict else (logits,)

    def _positions(self, grid: Sequence[int]) -> Tensor:
        """Position embedding (1, N, D) of any grid."""
        total: Tensor | None = None
        for axis, table in enumerate(self.pos_embed):
            # A learned table spans all three axes, an axial one only its own.
            size = list(grid) if len(self.pos_embed) == 1 else [n if a == axis else 1 for a, n in enumerate(grid)]
            if list(table.shape[2:]) != size:
                table = F.interpolate(table.float(), size, mode="trilinear").to(table.dtype)
            total = table if total is None else total + table
        return cast(Tensor, total).flatten(2).mT

    def _check(self, tokens: Tensor) -> None:
        config = self.config
        if tokens.dim() != 5 or tokens.shape[1] != config.num_codebooks:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}, expected (batch, {config.num_codebooks} codebooks, d, h, w)"
            )
        if tokens.is_floating_point():
            raise ValueError(f"tokens are {tokens.dtype}, expected integers from 0 to {self.mask_token_id} (masked)")
        # A token out of range would read the embedding of the next codebook.
        if tokens.numel() and not torch.compiler.is_compiling():
            low, high = (int(value) for value in tokens.aminmax())
            if low < 0 or high > self.mask_token_id:
                raise ValueError(
                    f"tokens run from {low} to {high}, expected 0 to {config.codebook_size - 1}, or {self.mask_token_id} "
                    f"where masked: was this volume encoded with another codebook?"
                )


def _axial_start(grid_size: Sequence[int], dim: int) -> list[Tensor]:
    """For each axis sines and cosines of its coordinate in a third of the channels: (1, D, d, 1, 1), (1, D, 1, h, 1), ..."""
    tables = []
    bands = [dim * axis // 3 for axis in range(4)]
    for axis, side in enumerate(grid_size):
        channels = bands[axis + 1] - bands[axis]
        # Wavelengths range from two positions to four times the grid, so that neighbours differ, and so do both ends.
        frequencies = torch.logspace(math.log10(math.pi), math.log10(math.pi / (2 * side)), -(-channels // 2))
        phase = torch.arange(side) * frequencies[:, None]
        table = torch.zeros(dim, side)
        table[bands[axis] : bands[axis + 1]] = torch.cat([phase.sin(), phase.cos()])[:channels]
        tables.append(table.view(1, dim, *(side if a == axis else 1 for a in range(3))))
    return tables


def elbo_loss(
    logits: Tensor,
    tokens: Tensor,
    masked: Tensor,
    timesteps: Tensor,
    num_train_timesteps: int,
    weighting: str = "paper",
    reduction: str = "mean",
    hole: Tensor | None = None,
) -> Tensor:
    r"""Weighted evidence lower bound of absorbing diffusion, in bits for each codebook entry (paper A.2; Bond-Taylor 2022).

    The cross-entropies of the masked tokens are summed, divided by the number of all tokens that could be masked, and
    weighted by time:

    | weighting | factor | |
    | --- | --- | --- |
    | paper | 1 - t/T | nothing is learned from t = T, where all tokens are masked |
    | bond_taylor | (T - t + 1) / T | trains t = T too |
    | elbo | T / t | the bound itself: its mean over t uniform in 1 ... T is at least the entropy of the tokens |

    Multiplied by the number of codebooks, the loss is in bits for each grid position ("bits per token").

    Args:
        logits: (B, K, V, d, h, w).
        tokens: (B, K, d, h, w), the truth.
        masked: (B, K, d, h, w) bool, what was masked in the transformer's input.
        timesteps: (B,), t from 1 to T, as given to ``AbsorbingScheduler.add_noise``.
        num_train_timesteps: T.
        weighting: see above.
        reduction: "mean" over the batch, or "none": (B,).
        hole: bool, broadcastable to ``masked``: the tokens that could be masked. The bound is then that of the hole's
            tokens, given the others. None: all tokens. It must not be empty for any sample.

    Raises:
        ValueError: unknown weighting.
    """
    total = num_train_timesteps
    t = timesteps.to(logits.device, torch.float32)
    weights = {"paper": 1 - t / total, "bond_taylor": (total - t + 1) / total, "elbo": total / t}
    if weighting not in weights:
        raise ValueError(f"weighting is '{weighting}', expected one of {', '.join(weights)}")
    # Logits are read in the order in which the head wrote them, so that only the masked rows are copied.
    rows = logits.permute(0, 3, 4, 5, 1, 2)[masked.permute(0, 2, 3, 4, 1)]  # (M, V)
    nats = F.cross_entropy(rows.float(), tokens.permute(0, 2, 3, 4, 1)[masked.permute(0, 2, 3, 4, 1)], reduction="none")
    counts = masked.flatten(1).sum(1)
    owner = torch.repeat_interleave(torch.arange(len(counts), device=logits.device), counts)
    sums = nats.new_zeros(len(counts)).index_add(0, owner, nats)
    tokens_in = masked[0].numel() if hole is None else hole.expand_as(masked).flatten(1).sum(1)
    losses = weights[weighting] * sums / (math.log(2) * tokens_in)
    return losses.mean() if reduction == "mean" else losses
