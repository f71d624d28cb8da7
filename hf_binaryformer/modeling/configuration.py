"""Configuration of every BinaryFormer network; the defaults are the paper's ViT-S/8 (Sec. 3.1, A.1)."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from hf_binaryformer.modeling import attention_forms  # noqa: F401 (registers the forms)
from hf_binaryformer.modeling.attention_configuration import AttentionConfig


@strict
class BinaryFormerConfig(BackboneConfigMixin, PreTrainedConfig, AttentionConfig):
    """Sizes and mathematics of a BinaryFormer: the fields below, and those of :class:`AttentionConfig`.

    Encoder (timm's ``VisionTransformer``):
        image_size: pixels, one number or (height, width); other sizes resample the position table.
        patch_size: pixels along each side of a token. Ignored for ``token_type="pixel"``.
        num_channels: input channels.
        token_type: "patch", or "pixel": each pixel's values and its two coordinates are one token (Appendix B).
        hidden_size, num_hidden_layers, num_heads, mlp_ratio, qkv_bias, layer_norm_eps: as in timm.
        class_token: whether a learned token comes first, as in DINO.

    Heads:
        decoder_hidden_size: channels after the decoder's first 1x1 convolution; halved at each of its stages.
        decoder_expansion: hidden channels of a residual unshuffle block, as a multiple of the stage's channels.
        decoder_num_convs: residual 3x3 convolutions at the last resolution.
        decoder_image_skip: add a 3x3 convolution of the image itself before them. This is not in the paper, whose
            decoder sees only tokens. Without pretraining, boundaries are learned from far fewer images.
        pooling: "mean", "max" or "cls" over tokens, for classification.
        label_values: number of each class in label volumes, such as FreeSurfer's, ascending from 0, the background. None:
            the class's own number.
        quality: for each structure group, or "all" for those not named, pairs of quality score and Dice (both 0 to 1),
            scores ascending: what a score meant on validation volumes (``scripts/calibrate_quality.py``). None: not known.

    Backbone:
        out_features: names of the feature maps that :class:`BinaryFormerBackbone` returns: "stem" before the first block,
            "stage1" after it, and so on.
        out_indices: the same as numbers, 0 for "stem". None for both: the last.

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
    class_token: bool = True

    decoder_hidden_size: int = 1024
    decoder_expansion: float = 1.5
    decoder_num_convs: int = 2
    decoder_image_skip: bool = False
    pooling: Literal["mean", "max", "cls"] = "mean"
    label_values: list[int] | None = None
    quality: dict[str, list[list[float]]] | None = None

    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.image_size, tuple):
            self.image_size = list(self.image_size)
        kwargs.pop("stage_names", None)
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)

    @property
    def stage_names(self) -> list[str]:
        """Names of the feature maps that a backbone can return."""
        return ["stem", *(f"stage{number}" for number in range(1, self.num_hidden_layers + 1))]

    def to_dict(self) -> dict[str, Any]:
        """The fields that are saved; the choice of feature maps only if it is not the last one."""
        fields = super().to_dict()
        if fields.get("out_indices") == [self.num_hidden_layers]:
            del fields["out_features"], fields["out_indices"]
        return fields

    def validate_sizes(self) -> None:
        """Relations between width and heads."""
        self.check_heads(self.hidden_size, self.num_heads)

    def validate_label_values(self) -> None:
        """One number for each class."""
        values = self.label_values
        if values is not None and (len(values) != self.num_labels or values[0] != 0 or values != sorted(set(values))):
            raise ValueError(
                f"label_values are {values}, expected {self.num_labels} ascending numbers from 0, one for each class"
            )

    def validate_quality(self) -> None:
        """Pairs of numbers from 0 to 1, by ascending score."""
        for group, pairs in (self.quality or {}).items():
            scores = [pair[0] for pair in pairs if len(pair) == 2]
            in_range = all(0 <= number <= 1 for pair in pairs for number in pair)
            if not pairs or len(scores) < len(pairs) or scores != sorted(set(scores)) or not in_range:
                raise ValueError(
                    f"quality of '{group}' is {pairs}, expected pairs of score and Dice from 0 to 1, scores ascending"
                )

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
        return self.query_key_head_dim or self.hidden_size // self.num_heads
