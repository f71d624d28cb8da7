"""Configuration of every BinaryFormer network; the defaults are the paper's ViT-S/8 (Sec. 3.1, A.1)."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

AttentionType = Literal[
    "softmax", "sign", "sign_stopgrad", "hamming", "hamming_grouped", "hamming_bernoulli", "uniform"
]
LEARNED_WEIGHT_TYPES = ("hamming", "hamming_grouped")
BINARY_TYPES = ("sign", "sign_stopgrad", *LEARNED_WEIGHT_TYPES, "hamming_bernoulli")
# What reaches query and key through their sign bits when the configuration leaves bit_gradient open.
DEFAULT_BIT_GRADIENT = {"sign": "ste"}


@strict
class BinaryFormerConfig(PreTrainedConfig):
    r"""Sizes and mathematics of a BinaryFormer. What the attention *is* stands here; which backend computes it does not.

    Encoder (timm's ``VisionTransformer``):
        image_size: pixels, one number or (height, width); other sizes resample the position table.
        patch_size: pixels along each side of a token. Ignored for ``token_type="pixel"``.
        num_channels: input channels.
        token_type: "patch", or "pixel": each pixel's values and its two coordinates are one token (Appendix B).
        hidden_size, num_hidden_layers, num_heads, mlp_ratio, qkv_bias, layer_norm_eps: as in timm.
        value_head_dim: value channels of each head; None keeps hidden_size / num_heads (the paper reduces 64 to 16).
        class_token: whether a learned token goes first, as in DINO.

    Attention (Sec. 2; formulas in :mod:`hf_binaryformer.kernels.hamming`):
        attention_type: "softmax" (base), "sign" (STE), "sign_stopgrad", "hamming", "hamming_grouped",
            "hamming_bernoulli", or the control "uniform" (mean of the values).
        bit_gradient: what reaches query and key through their signs, "none", "ste" or "ternary" (stochastic, 1-2 bits);
            None: "ste" for "sign", "none" for all others.
        logit_scale: factor of the scores (the authors' segmentation and sampler code multiplies by 4).
        learned_logit_scale: learn a further factor for each head, 1 at the start (not in the paper): scores of sign bits never
            exceed ``logit_scale * sqrt(d)``, which is too little to single out one token among many.
        share_attention: one attention module for all blocks, as in the authors' sampler.
        sigma_beta, sigma_cap: Eq. 4, ``2 tanh(beta x) / min(beta, cap)``.
        weight_bias_init: value that every learned weight has at the start.
        weight_activation: "identity" (paper), "softplus", or "bounded" (``weight_max`` times a sigmoid).
        weight_max: upper end of "bounded".
        weight_input_norm: normalise the input of the weight network.
        grouped_layout: for "hamming_grouped": "per_head" (each head's weight sees its own channels), or "concatenated"
            (the authors': groups cut from the concatenation, so that half of the heads never see the real queries).
        bernoulli_transpose_heads: for "hamming_bernoulli": False repeats a missing transposition in two of the authors'
            scripts, after which head and token axes are mixed.

    Heads:
        decoder_hidden_size: channels after the decoder's first 1x1 convolution; halved at each of its stages.
        decoder_expansion: hidden channels of a residual unshuffle block, as a multiple of the stage's channels.
        decoder_num_convs: residual 3x3 convolutions at the last resolution.
        decoder_image_skip: add a 3x3 convolution of the image itself before them (not in the paper, whose decoder sees
            tokens alone): boundaries are learned from far fewer images where nothing is pretrained.
        pooling: "mean", "max" or "cls" over tokens, for classification.
        initializer_range: standard deviation of the linear layers at the start.

    Example:
        >>> config = BinaryFormerConfig(attention_type="sign", bit_gradient="ternary", image_size=320, num_labels=14)
        >>> config.head_dim, config.value_head_dim
        (64, 16)
    """

    model_type = "binaryformer"
    attribute_map = {"num_attention_heads": "num_heads"}  # noqa: RUF012 (transformers reads it from the class)

    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = 8
    num_channels: int = 3
    token_type: Literal["patch", "pixel"] = "patch"
    hidden_size: int = 384
    num_hidden_layers: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    layer_norm_eps: float = 1e-6
    value_head_dim: int | None = 16
    class_token: bool = True

    attention_type: AttentionType = "hamming"
    bit_gradient: Literal["none", "ste", "ternary"] | None = None
    logit_scale: float = 1.0
    learned_logit_scale: bool = False
    share_attention: bool = False
    sigma_beta: float = 0.5
    sigma_cap: float = 0.75
    weight_bias_init: float = 1.0
    weight_activation: Literal["identity", "softplus", "bounded"] = "identity"
    weight_max: float = 2.0
    weight_input_norm: bool = False
    grouped_layout: Literal["per_head", "concatenated"] = "per_head"
    bernoulli_transpose_heads: bool = True

    decoder_hidden_size: int = 1024
    decoder_expansion: float = 1.5
    decoder_num_convs: int = 2
    decoder_image_skip: bool = False
    pooling: Literal["mean", "max", "cls"] = "mean"
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.image_size, tuple):
            self.image_size = list(self.image_size)
        super().__post_init__(**kwargs)

    def validate_attention(self) -> None:
        """Relations between the attention's fields."""
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be divisible by num_heads {self.num_heads}")
        learns_bits = self.bit_gradient not in (None, "none")
        if learns_bits and self.attention_type not in ("sign", *LEARNED_WEIGHT_TYPES):
            raise ValueError(
                f"bit_gradient '{self.bit_gradient}' does not fit attention_type '{self.attention_type}': "
                f"use it with sign, hamming or hamming_grouped, or leave it None"
            )
        if self.attention_type == "hamming_grouped" and self.hidden_size // 2 % self.num_heads:
            raise ValueError(
                f"hamming_grouped needs hidden_size / 2 = {self.hidden_size // 2} divisible by num_heads {self.num_heads}"
            )
        if self.weight_activation == "bounded" and not 0 < self.weight_bias_init < self.weight_max:
            raise ValueError(
                f"weight_bias_init {self.weight_bias_init} must lie between 0 and weight_max {self.weight_max}"
            )
        if self.weight_activation == "softplus" and self.weight_bias_init <= 0:
            raise ValueError(f"weight_bias_init {self.weight_bias_init} must be positive with softplus")

    def validate_tokens(self) -> None:
        """Relations between image and tokens."""
        if self.token_type == "patch" and any(side % self.patch_size for side in self.image_shape):
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}")
        if self.pooling == "cls" and not self.class_token:
            raise ValueError("pooling 'cls' needs class_token=True")

    @property
    def image_shape(self) -> tuple[int, int]:
        """Image height and width, pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def head_dim(self) -> int:
        """Query and key channels of each head."""
        return self.hidden_size // self.num_heads

    @property
    def resolved_bit_gradient(self) -> str:
        """``bit_gradient``, or what the attention type implies where that is None."""
        return self.bit_gradient or DEFAULT_BIT_GRADIENT.get(self.attention_type, "none")
