"""The encoder as a backbone of transformers: feature maps for heads of other libraries."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AutoBackbone
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.networks import BinaryFormerModel


class BinaryFormerBackbone(BackboneMixin, BinaryFormerModel):  # type: ignore[misc]
    """The encoder as ``AutoBackbone`` makes it: tokens after chosen blocks, as maps.

    Args:
        config: its ``out_features`` or ``out_indices`` choose the maps: "stem" (0) before the first block, "stage1" (1) after
            it, and so on. Default: the last.

    Example:
        >>> config = BinaryFormerConfig(image_size=32, num_hidden_layers=3, out_indices=[1, 3])
        >>> [tuple(one.shape) for one in BinaryFormerBackbone(config)(torch.zeros(1, 3, 32, 32)).feature_maps]
        [(1, 384, 4, 4), (1, 384, 4, 4)]
    """

    def __init__(self, config: BinaryFormerConfig) -> None:
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)

    def forward(  # type: ignore[override]
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> BackboneOutput:
        """Feature maps.

        Args:
            pixel_values: (B, C, H, W) as the image processor makes them; H and W multiples of the patch size.
            output_hidden_states: return the tokens (B, N, D) after every block too, without the last norm.

        Returns:
            ``feature_maps``: for each of ``out_features`` (B, D, h, w), normalised, without the class token.

        Raises:
            ValueError: channels or size do not fit the configuration.
        """
        x = self._embed(pixel_values)
        states = [x]
        for block in self.encoder.blocks:
            states.append(self._run(block, states[-1]))
        side = self.config.patch_size if self.config.token_type == "patch" else 1
        height, width = (pixels // side for pixels in pixel_values.shape[2:])
        chosen = [states[index] for index in self.out_indices]
        maps = [self.encoder.norm(one)[:, -height * width :].mT.unflatten(2, (height, width)) for one in chosen]
        return BackboneOutput(feature_maps=tuple(maps), hidden_states=tuple(states) if output_hidden_states else None)


AutoBackbone.register(BinaryFormerConfig, BinaryFormerBackbone, exist_ok=True)
