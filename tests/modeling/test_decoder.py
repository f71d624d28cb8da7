"""The decoder against its formula, written with plain loops over pixels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.decoder import SegmentationDecoder


def decoder_of(**fields: object) -> SegmentationDecoder:
    given = dict(
        image_size=16, patch_size=4, num_channels=3, hidden_size=12, num_heads=3, decoder_hidden_size=32, num_labels=5
    )
    decoder = SegmentationDecoder(BinaryFormerConfig(**(given | fields))).double()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return decoder


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def expected(decoder: SegmentationDecoder, tokens: Tensor, image: Tensor) -> Tensor:
    x = decoder.expand(tokens)
    for up, unshuffle, shuffle in decoder.stages:
        x = F.conv_transpose2d(gelu(x), up.weight, up.bias, stride=2)
        y = unshuffle.norm(x)
        result = x.clone()
        for i in range(0, x.shape[2], 2):
            for j in range(0, x.shape[3], 2):
                pixels = y[:, :, i : i + 2, j : j + 2].flatten(1)  # (C, 2, 2)
                hidden = gelu(F.linear(pixels, unshuffle.fc1.weight.flatten(1), unshuffle.fc1.bias))
                out = F.linear(hidden, unshuffle.fc2.weight.flatten(1), unshuffle.fc2.bias)
                result[:, :, i : i + 2, j : j + 2] += out.view_as(y[:, :, i : i + 2, j : j + 2])
        x = result
        fine = F.pixel_shuffle(x, 2)
        fine = fine + shuffle.fc2(gelu(shuffle.fc1(fine)))
        x = F.pixel_unshuffle(fine, 2)
    if decoder.image_skip is not None:
        x = x + decoder.image_skip(image)
    for conv in decoder.convs:
        x = x + conv.conv(gelu(conv.norm(x)))
    return decoder.head(x)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("convs", [0, 2])
def test_the_decoder_is_its_formula(skip: bool, convs: int) -> None:
    decoder = decoder_of(decoder_image_skip=skip, decoder_num_convs=convs)
    tokens, image = torch.randn(2, 12, 4, 4).double(), torch.randn(2, 3, 16, 16).double()
    torch.testing.assert_close(decoder(tokens, image), expected(decoder, tokens, image))
