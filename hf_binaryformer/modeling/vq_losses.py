"""Losses of the vector-quantised autoencoder: reconstruction, and perceptual on orthogonal slices (paper A.2)."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Two batches of slices (N, channels, H, W), intensities 0 to about 1 -> scalar, or one value per slice.
SliceLoss = Callable[[Tensor, Tensor], Tensor]
# Files of torchvision in torch's cache, and the code that downloads them.
VGG16 = ("vgg16-397923af.pth", "torchvision.models.vgg16(weights='IMAGENET1K_V1')")
RESNET50 = ("resnet50-11ad3fa6.pth", "torchvision.models.resnet50(weights='DEFAULT')")


class PerceptualWeightsError(RuntimeError):
    """The chosen perceptual loss cannot run: its package or its weights are missing. Nothing is downloaded."""


def reconstruction_loss(prediction: Tensor, target: Tensor, kind: str) -> Tensor:
    """Mean absolute ("l1", the paper's) or squared ("mse") difference of two tensors of one shape, in float32.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in ("l1", "mse"):
        raise ValueError(f"reconstruction_loss is '{kind}', expected l1 or mse")
    loss = F.l1_loss if kind == "l1" else F.mse_loss
    return loss(prediction.float(), target.float())


class PerceptualLoss(nn.Module):
    """Perceptual dissimilarity on three orthogonal slices at random positions of each volume.

    Args:
        kind: "lpips" (the paper's: VGG16 by the package ``lpips``), "monai" (MONAI's on torchvision's ResNet-50),
            "package.module:function", or a function itself; see :data:`SliceLoss` for what it takes and returns.

    Raises:
        PerceptualWeightsError: the package or the weights are missing.
        ValueError: unknown kind.
    """

    def __init__(self, kind: str | SliceLoss) -> None:
        super().__init__()
        self.slice_loss = _slice_loss(kind)
        # Gradients pass through the loss's network but do not change it.
        self.requires_grad_(False)

    def forward(self, prediction: Tensor, target: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Two volumes (B, C, D, H, W) -> scalar, the mean over the slices; ``generator`` draws their positions."""
        losses = []
        for axis in (2, 3, 4):
            position = torch.randint(prediction.shape[axis], (len(prediction),), generator=generator)
            rows = torch.arange(len(prediction))
            pair = [t.float().movedim(axis, 1)[rows, position] for t in (prediction, target)]  # (B, C, H, W)
            losses.append(self.slice_loss(*pair).mean())
        return torch.stack(losses).mean()


def _slice_loss(kind: str | SliceLoss) -> SliceLoss:
    if not isinstance(kind, str):
        return kind
    if kind == "lpips":
        try:
            lpips = import_module("lpips")
        except ImportError as error:
            raise PerceptualWeightsError("perceptual_loss is 'lpips': pip install lpips") from error
        _require_weights(kind, *VGG16)
        return _Lpips(lpips.LPIPS(net="vgg", verbose=False))
    if kind == "monai":
        _require_weights(kind, *RESNET50)
        from monai.losses import PerceptualLoss as MonaiPerceptualLoss

        return cast(SliceLoss, MonaiPerceptualLoss(spatial_dims=2, network_type="resnet50"))
    module, _, name = kind.partition(":")
    if not name:
        raise ValueError(f"perceptual_loss is '{kind}', expected none, lpips, monai or package.module:function")
    return cast(SliceLoss, getattr(import_module(module), name))


def _require_weights(kind: str, file: str, command: str) -> None:
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if not path.is_file():
        raise PerceptualWeightsError(
            f"perceptual_loss is '{kind}' and its weights {path} are not there: fetch them once with "
            f'python -c "import torchvision; {command}", or choose none'
        )


class _Lpips(nn.Module):
    """Converts slices to the input that LPIPS needs: three channels, -1 to 1."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.network(*(2 * t.expand(-1, 3, -1, -1) - 1 for t in (prediction, target)))
