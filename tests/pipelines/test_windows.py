"""Blending of windows, against MONAI's and against what any blending must keep."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import sliding_window_inference

from hf_binaryformer.pipelines.windows import in_windows, window_starts


@pytest.mark.parametrize(
    ("size", "window", "overlap", "wanted"),
    [
        (160, 160, 0.25, [0]),
        (161, 160, 0.25, [0, 1]),
        (280, 160, 0.25, [0, 120]),
        (281, 160, 0.25, [0, 60, 121]),
        (5, 1, 0.5, [0, 1, 2, 3, 4]),
        (30, 10, 0.0, [0, 10, 20]),
    ],
)
def test_windows_are_few_and_evenly_spaced(size, window, overlap, wanted):
    assert window_starts(size, window, overlap) == wanted


@pytest.mark.parametrize("shape", [(32, 48), (33, 48), (50, 60), (56, 84)])
def test_up_to_two_windows_a_side_are_monais(shape):
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 4, 5, padding=2)  # its borders differ from window to window
    pixels = torch.randn(2, 3, *shape)
    wanted = sliding_window_inference(pixels, (32, 48), 2, network, overlap=0.25, mode="gaussian")
    with torch.no_grad():
        torch.testing.assert_close(in_windows(network, pixels, (32, 48), 0.25), wanted, rtol=1e-5, atol=1e-5)


def test_what_does_not_depend_on_the_window_is_kept_in_one_batch_at_a_time():
    pixels, batches = torch.randn(3, 2, 71, 40), []

    def network(part):
        batches.append(tuple(part.shape))
        return part.flip(1)

    torch.testing.assert_close(in_windows(network, pixels, (16, 24), 0.5), pixels.flip(1))
    assert set(batches) == {(3, 2, 16, 24)}
