"""Losses of the autoencoder: values by hand, slices by position, and what is missing said before training."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from hf_binaryformer.modeling.vq_losses import PerceptualLoss, PerceptualWeightsError, reconstruction_loss


def slice_means(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Stands for a network: one value a slice."""
    return (prediction - target).mean((1, 2, 3))


def test_reconstruction_by_hand():
    prediction, target = torch.tensor([1.0, 3.0], dtype=torch.bfloat16), torch.tensor([0.0, 0.0])
    assert reconstruction_loss(prediction, target, "l1").item() == 2
    assert reconstruction_loss(prediction, target, "mse").item() == 5
    with pytest.raises(ValueError, match="'l2', expected l1 or mse"):
        reconstruction_loss(prediction, target, "l2")


def test_perceptual_sees_one_slice_along_each_axis():
    seen = []

    def record(prediction, target):
        seen.append((prediction, target))
        return slice_means(prediction, target)

    prediction, target = torch.randn(5, 1, 3, 4, 6), torch.randn(5, 1, 3, 4, 6)
    loss = PerceptualLoss(record)(prediction, target)
    assert [tuple(p.shape) for p, _ in seen] == [(5, 1, 4, 6), (5, 1, 3, 6), (5, 1, 3, 4)]
    positions = set()
    for axis, (p, t) in enumerate(seen):
        for n in range(5):
            candidates = [
                index
                for index in range(prediction.shape[axis + 2])
                if torch.equal(prediction[n].select(axis + 1, index), p[n])
                and torch.equal(target[n].select(axis + 1, index), t[n])
            ]
            assert len(candidates) == 1
            positions.add(candidates[0])
    assert len(positions) > 2  # and at random positions
    expected = torch.stack([slice_means(p, t).mean() for p, t in seen]).mean()
    torch.testing.assert_close(loss, expected)


def test_perceptual_positions_repeat_with_their_generator():
    pair = torch.randn(2, 1, 8, 8, 8), torch.randn(2, 1, 8, 8, 8)
    loss = PerceptualLoss(slice_means)
    first, second = (loss(*pair, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, loss(*pair, torch.Generator().manual_seed(4)))


def test_a_network_of_the_loss_passes_gradients_and_does_not_learn():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, prediction, target):
            return (self.conv(prediction) - self.conv(target)).square().mean()

    loss = PerceptualLoss(Network())
    prediction = torch.randn(1, 1, 8, 8, 8, requires_grad=True)
    loss(prediction, torch.randn(1, 1, 8, 8, 8)).backward()
    assert prediction.grad.abs().sum() > 0
    assert all(not p.requires_grad for p in loss.parameters())


def test_a_function_by_name():
    loss = PerceptualLoss("torch.nn.functional:mse_loss")
    prediction, target = torch.ones(1, 1, 4, 4, 4), torch.zeros(1, 1, 4, 4, 4)
    assert loss(prediction, target).item() == 1
    with pytest.raises(ValueError, match=r"'vgg', expected none, lpips, monai or package\.module:function"):
        PerceptualLoss("vgg")


@pytest.mark.parametrize("kind", ["lpips", "monai"])
def test_missing_weights_are_an_error_and_nothing_is_fetched(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "lpips", types.ModuleType("lpips"))
    with pytest.raises(PerceptualWeightsError, match=f"'{kind}' and its weights .*pth are not there: fetch them once"):
        PerceptualLoss(kind)
    assert not list(tmp_path.rglob("*"))


def test_missing_package_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(PerceptualWeightsError, match="pip install lpips"):
        PerceptualLoss("lpips")


def test_lpips_gets_three_channels_from_minus_one_to_one(tmp_path, monkeypatch):
    class Double(nn.Module):  # stands for the package lpips, which is not installed here
        def __init__(self, net, verbose):
            super().__init__()
            assert net == "vgg"

        def forward(self, prediction, target):
            assert prediction.shape[1] == 3
            return (prediction - target).abs().amax((1, 2, 3), keepdim=True)

    package = types.ModuleType("lpips")
    package.LPIPS = Double
    monkeypatch.setitem(sys.modules, "lpips", package)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth").touch()
    loss = PerceptualLoss("lpips")(torch.ones(2, 1, 4, 4, 4), torch.zeros(2, 1, 4, 4, 4))
    assert loss.item() == 2
