"""Segmentation networks as graphs of standard operators: ``torch.export`` programs and ONNX files.

A network calls the operators of :mod:`hf_binaryformer.kernels`, which other runtimes do not have. In an exported graph they
are replaced by what they compute, in real numbers: signs stay signs instead of bits, and attention is

    O = softmax(scale (w_q sgn(q)) (w_k sgn(k))^T) V

The graph holds the N x N scores of one block at a time: 61 MB for six heads of 1601 tokens.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_binaryformer.kernels.balance import EPSILON

# The newest that onnxruntime has had since version 1.17, and the lowest that torch's exporter writes.
OPSET = 18
# Batch of the example that is traced; 1 would be taken for a constant.
EXAMPLE_BATCH = 2


class SegmentationNetwork(Protocol):
    """What can be exported: ``BinaryFormerForSemanticSegmentation``."""

    config: Any

    def __call__(self, pixel_values: Tensor) -> Any:
        """(B, C, H, W) -> an object with ``logits``."""


class LogitsOnly(torch.nn.Module):
    """A network that returns its logits alone, under the names that the graph has."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_labels, H, W)."""
        return self.model(pixel_values).logits


def signs(x: Tensor) -> Tensor:
    """sgn(x), sgn(0) = +1, in place of packed bits."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def plain_hamming_attention(
    query_signs: Tensor,
    key_signs: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    seed: Tensor,
    head_dim: int,
    scale: float,
    *options: Any,
    **named_options: Any,
) -> tuple[Tensor, Tensor]:
    """The forward pass of :func:`~hf_binaryformer.kernels.hamming_attention` by signs (B, H, N, d), without its mask."""
    scores = (query_signs * (scale * query_weight).unsqueeze(-1)) @ (key_signs * key_weight.unsqueeze(-1)).mT
    return scores.softmax(-1).to(value.dtype) @ value, scores.logsumexp(-1)


def plain_balance(x: Tensor, centering: bool, norm: bool, window: float) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`~hf_binaryformer.kernels.balance.balance` with signs in place of bits."""
    y = x - x.mean(2, keepdim=True) if centering else x
    factor = (y.square().mean(-1) + EPSILON).rsqrt() if norm else torch.ones_like(y[..., 0])
    y = y * factor.unsqueeze(-1)
    return y, signs(y), factor


def plain_saturate_and_sign(x: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """:func:`~hf_binaryformer.kernels.saturation.saturate_and_sign`."""
    return torch.tanh(beta * x), signs(x)


def export_program(model: SegmentationNetwork, *, height: int | None = None, width: int | None = None) -> Any:
    """A segmentation network as a ``torch.export`` program of standard operators, which runs without this package.

    Args:
        model: on the CPU; every form of attention but "hamming_bernoulli", which draws random numbers.
        height, width: of the images in pixels, multiples of the patch size; None: the configuration's. They are fixed in
            the program, the batch is not.

    Returns:
        ``torch.export.ExportedProgram``: ``pixel_values`` (B, C, H, W) float32, as the image processor makes them, to
        ``logits`` (B, num_labels, H, W).

    Raises:
        ValueError: the network draws random numbers, is on another device, or the size is no multiple of the patch size.

    Example:
        >>> program = export_program(hf_binaryformer.from_pretrained("binaryformer-tiny-brain"))
        >>> torch.export.save(program, "network.pt2")
    """
    network: Any = model
    config = network.config
    if config.attention_type == "hamming_bernoulli":
        raise ValueError(
            "attention_type 'hamming_bernoulli' draws random numbers, which an exported graph cannot repeat: export another"
        )
    size = (height or config.image_shape[0], width or config.image_shape[1])
    if any(side % config.patch_size for side in size):
        raise ValueError(f"the image is {size} pixels, expected multiples of the patch size {config.patch_size}")
    if network.device.type != "cpu":
        raise ValueError(f"the model is on '{network.device}', expected 'cpu': call model.cpu() first")
    example = torch.zeros(EXAMPLE_BATCH, config.num_channels, *size, dtype=network.dtype)
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            program = torch.export.export(
                LogitsOnly(network), (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
            )
            return program.run_decompositions({**torch.export.default_decompositions(), **_plain_operators()})
    finally:
        network.train(training)


def export_onnx(
    model: SegmentationNetwork,
    path: str | os.PathLike[str],
    *,
    height: int | None = None,
    width: int | None = None,
    opset: int = OPSET,
) -> Path:
    """Write a segmentation network as an ONNX file of standard operators.

    Args:
        model, height, width: as in :func:`export_program`.
        path: ends in ``.onnx``. The weights are in the file.
        opset: version of ONNX's operators.

    Returns:
        The path. The graph takes ``pixel_values`` (batch, C, H, W) float32 and gives ``logits`` (batch, num_labels, H, W).

    Raises:
        ImportError: onnx or onnxscript is missing.
        ValueError: as :func:`export_program`, or the file's name ends otherwise.
    """
    target = Path(path)
    if target.suffix != ".onnx":
        raise ValueError(f"path is '{target}', expected a name that ends in .onnx")
    try:
        import onnxscript  # noqa: F401 (torch needs it)
    except ImportError as error:
        raise ImportError("onnxscript is missing: pip install 'hf-binaryformer[onnx]'") from error
    program = export_program(model, height=height, width=width)
    torch.onnx.export(
        program,
        (),
        str(target),
        input_names=["pixel_values"],
        output_names=["logits"],
        opset_version=opset,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    return target


def _plain_operators() -> dict[Any, Any]:
    """The package's operators, and what replaces them."""
    own = torch.ops.hf_binaryformer
    return {
        own.pack_sign_bits.default: signs,
        own.hamming_attention.default: plain_hamming_attention,
        own.balance.default: plain_balance,
        own.saturate_and_sign.default: plain_saturate_and_sign,
    }
