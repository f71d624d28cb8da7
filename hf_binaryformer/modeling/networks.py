"""The networks: tokens, whole-image classes, and labels for each pixel (paper Sec. 3.1, A.1, Appendix B)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput, SemanticSegmenterOutput

from hf_binaryformer.modeling.attention import AttentionControl, BinaryAttention
from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.decoder import SegmentationDecoder
from hf_binaryformer.modeling.encoder import build_encoder, position_table
from hf_binaryformer.modeling.pretrained import CheckpointMixin
from hf_binaryformer.modeling.token_weight import TokenWeight

IGNORED_LABEL = 255


class BinaryFormerPreTrainedModel(AttentionControl, CheckpointMixin, PreTrainedModel):  # type: ignore[misc]
    """Base of all networks: initial weights, checkpoints by name, choice of the attention backend."""

    config_class = BinaryFormerConfig
    base_model_prefix = "binaryformer"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    # The loss is a mean over pixels, so transformers' Trainer has to divide it by the number of accumulated batches.
    accepts_loss_kwargs = False
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers reads it from the class)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, TokenWeight):
            module.reset_parameters()
        elif isinstance(module, BinaryAttention) and module.log_scale is not None:
            nn.init.zeros_(module.log_scale)
        elif isinstance(module, VisionTransformer):
            if module.cls_token is not None:
                nn.init.trunc_normal_(module.cls_token, std=std)
            if module.pos_embed is not None:
                init.copy_(module.pos_embed, position_table(module))
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            # Each output pixel of a stride-2 transposed convolution uses one tap, so its fan-in is its input channels.
            fan_in = module.in_channels if isinstance(module, nn.ConvTranspose2d) else module.weight[0].numel()
            nn.init.trunc_normal_(module.weight, std=fan_in**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)) and module.weight is not None:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class BinaryFormerModel(BinaryFormerPreTrainedModel):
    """The encoder alone: image to tokens.

    Example:
        >>> model = BinaryFormerModel(BinaryFormerConfig(image_size=32, num_hidden_layers=2))
        >>> model(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape
        torch.Size([1, 17, 384])
    """

    # A network with a head may be loaded without it.
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^classifier\."]  # noqa: RUF012 (read from the class)

    def __init__(self, config: BinaryFormerConfig) -> None:
        super().__init__(config)
        self.encoder = build_encoder(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The layer that turns pixels into tokens; tools of transformers and Accelerate call this method."""
        return self.encoder.patch_embed

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Normalised tokens.

        Args:
            pixel_values: (B, C, H, W) as the image processor makes them; H and W multiples of the patch size.

        Returns:
            ``last_hidden_state`` (B, N, D), with the class token first if there is one.

        Raises:
            ValueError: channels or size do not fit the configuration.
        """
        x = self._embed(pixel_values)
        for block in self.encoder.blocks:
            x = self._run(block, x)
        return BaseModelOutput(last_hidden_state=self.encoder.norm(x))

    def _embed(self, pixel_values: Tensor) -> Tensor:
        """Tokens (B, N, D) before the first block."""
        self._check(pixel_values)
        vit = self.encoder
        return vit.norm_pre(vit._pos_embed(vit.patch_embed(pixel_values)))

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        return self._checkpointed(block, x) if self.gradient_checkpointing and self.training else block(x)

    def _check(self, pixel_values: Tensor) -> None:
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, expected (B, {self.config.num_channels}, H, W): "
                f"prepare images with the checkpoint's own image processor"
            )
        patch = self.config.patch_size if self.config.token_type == "patch" else 1
        if any(side % patch for side in pixel_values.shape[2:]):
            raise ValueError(
                f"image is {tuple(pixel_values.shape[2:])} pixels, expected multiples of the patch size {patch}: pad it"
            )


class BinaryFormerForSemanticSegmentation(BinaryFormerPreTrainedModel):
    """Encoder and convolutional decoder: a label for every pixel (paper Sec. 3.1, A.1).

    Example:
        >>> config = BinaryFormerConfig(image_size=32, num_hidden_layers=2, decoder_hidden_size=64, num_labels=4)
        >>> BinaryFormerForSemanticSegmentation(config)(torch.zeros(1, 3, 32, 32)).logits.shape
        torch.Size([1, 4, 32, 32])
    """

    def __init__(self, config: BinaryFormerConfig) -> None:
        super().__init__(config)
        if config.token_type != "patch":
            raise ValueError("segmentation needs token_type 'patch'; pixel tokens are for classification")
        self.binaryformer = BinaryFormerModel(config)
        self.decoder = SegmentationDecoder(config)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> SemanticSegmenterOutput:
        """Logits, and the mean cross-entropy if labels are given.

        Args:
            pixel_values: (B, C, H, W).
            labels: (B, H, W) int64 in [0, num_labels), or 255 for pixels to ignore.

        Returns:
            ``logits`` (B, num_labels, H, W), ``loss`` scalar or None.
        """
        tokens = self.binaryformer(pixel_values).last_hidden_state
        height, width = (side // self.config.patch_size for side in pixel_values.shape[2:])
        grid = tokens[:, -height * width :].mT.unflatten(2, (height, width))
        logits = self.decoder(grid, pixel_values)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels, ignore_index=IGNORED_LABEL)
        return SemanticSegmenterOutput(loss=loss, logits=logits)

    @classmethod
    def from_timm(
        cls,
        name: str,
        *,
        checkpoint: str | Path | bool | None = None,
        pretrained_mlp_blocks: int = 4,
        **config: Any,
    ) -> BinaryFormerForSemanticSegmentation:
        """Start from a timm vision transformer as the paper does (A.1).

        Kept: patch embedding, position table (resampled to ``image_size``), class token, all layer norms, and the MLPs of
        the first ``pretrained_mlp_blocks`` blocks. New: all attention, the other MLPs, the decoder.

        Args:
            name: of a timm model, for example "vit_small_patch8_224.dino".
            checkpoint: a safetensors file in timm's own layout; None: timm's weights from the Hub; False: no weights,
                all parameters are random.
            pretrained_mlp_blocks: number of blocks whose MLP is kept.
            config: fields of :class:`BinaryFormerConfig` that the timm model does not determine, for example
                ``image_size`` and ``num_labels``.

        Raises:
            ValueError: the file is not a safetensors file, or the model has parts that the encoder lacks.

        Example:
            >>> model = BinaryFormerForSemanticSegmentation.from_timm(
            ...     "vit_small_patch8_224.dino", checkpoint=False, image_size=320, num_labels=14
            ... )
        """
        import timm

        if isinstance(checkpoint, (str, Path)) and Path(checkpoint).suffix != ".safetensors":
            raise ValueError(f"checkpoint is '{checkpoint}', expected a .safetensors file: convert it first")
        vit: Any = timm.create_model(name, pretrained=False, num_classes=0)
        fields = {"image_size": vit.patch_embed.img_size, **_timm_sizes(vit), **config}
        model = cls(BinaryFormerConfig(**fields))
        if checkpoint is not False:
            overlay: dict[str, Any] = (
                {} if checkpoint is None else {"pretrained_cfg_overlay": {"file": str(checkpoint)}}
            )
            vit = timm.create_model(
                name,
                pretrained=True,
                num_classes=0,
                img_size=model.config.image_shape,
                in_chans=model.config.num_channels,
                **overlay,
            )
            kept = {key: t for key, t in vit.state_dict().items() if _paper_keeps(key, pretrained_mlp_blocks)}
            _, unexpected = model.binaryformer.encoder.load_state_dict(kept, strict=False)
            if unexpected:
                raise ValueError(f"{name} has tensors that this encoder lacks: {', '.join(unexpected)}")
        return model


def _timm_sizes(vit: VisionTransformer) -> dict[str, Any]:
    """Configuration fields that a timm vision transformer determines."""
    block: Any = vit.blocks[0]
    return {
        "patch_size": vit.patch_embed.patch_size[0],
        "num_channels": vit.patch_embed.proj.in_channels,
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / vit.embed_dim,
        "qkv_bias": block.attn.qkv.bias is not None,
        "layer_norm_eps": block.norm1.eps,
        "class_token": vit.cls_token is not None,
    }


def _paper_keeps(key: str, mlp_blocks: int) -> bool:
    parts = key.split(".")
    if parts[0] != "blocks":
        return True
    return parts[2] != "attn" and (parts[2] != "mlp" or int(parts[1]) < mlp_blocks)


class BinaryFormerForImageClassification(BinaryFormerPreTrainedModel):
    """One class for an image, from patches or from single pixels as tokens (paper Appendix B).

    Example:
        >>> config = BinaryFormerConfig(
        ...     token_type="pixel", image_size=8, num_channels=1, num_hidden_layers=2, class_token=False, num_labels=10
        ... )
        >>> BinaryFormerForImageClassification(config)(torch.zeros(1, 1, 8, 8)).logits.shape
        torch.Size([1, 10])
    """

    def __init__(self, config: BinaryFormerConfig) -> None:
        super().__init__(config)
        self.binaryformer = BinaryFormerModel(config)
        self.classifier = nn.Linear(config.hidden_size, cast(int, config.num_labels))
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """Logits (B, num_labels), and the mean cross-entropy if ``labels`` (B,) int64 are given."""
        tokens = self.binaryformer(pixel_values).last_hidden_state
        if self.config.pooling == "cls":
            pooled = tokens[:, 0]
        else:
            tokens = tokens[:, 1:] if self.config.class_token else tokens
            pooled = tokens.mean(1) if self.config.pooling == "mean" else tokens.amax(1)
        logits = self.classifier(pooled)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(BinaryFormerConfig.model_type, BinaryFormerConfig, exist_ok=True)
AutoModel.register(BinaryFormerConfig, BinaryFormerModel, exist_ok=True)
AutoModelForSemanticSegmentation.register(BinaryFormerConfig, BinaryFormerForSemanticSegmentation, exist_ok=True)
AutoModelForImageClassification.register(BinaryFormerConfig, BinaryFormerForImageClassification, exist_ok=True)
