"""Whole volumes through stand-in networks whose answer is known for every voxel, and through the real tiny classes."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from torch import Tensor, nn

from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.image_processing import BinaryFormerImageProcessor
from hf_binaryformer.modeling.networks import BinaryFormerForSemanticSegmentation
from hf_binaryformer.pipelines import segmentation, slice_results
from hf_binaryformer.pipelines.grids import foreground_box
from hf_binaryformer.pipelines.segmentation import VolumeSegmentationPipeline
from hf_binaryformer.pipelines.slice_results import most_probable
from hf_binaryformer.pipelines.volumes import Volume, read_volume, volume_from_image

NAMES = {0: "background", 1: "grey", 2: "white"}


class Bands(nn.Module):
    """Labels a pixel by the band of intensity that one of its channels falls into: below .3, below .7, above."""

    def __init__(self, num_channels: int, channel: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(id2label=NAMES, num_channels=num_channels, patch_size=8)
        self.scale = nn.Parameter(torch.tensor(100.0))
        self.channel = channel
        self.seen: list[Tensor] = []
        self.modes: set[tuple[bool, bool, bool]] = set()

    def forward(self, pixel_values: Tensor) -> Any:
        self.seen.append(pixel_values.cpu())
        self.modes.add((self.training, torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
        x = pixel_values[:, self.channel]
        centres = torch.tensor([0.0, 0.5, 0.9]).view(1, 3, 1, 1)
        return SimpleNamespace(logits=-self.scale * (x[:, None] - centres).abs())


def bands(scaled: np.ndarray) -> np.ndarray:
    """What ``Bands`` answers, computed without it."""
    return np.digitize(scaled, (0.25, 0.7)).astype(np.int32)


def make(
    processor: BinaryFormerImageProcessor, channel: int | None = None, **options: Any
) -> VolumeSegmentationPipeline:
    middle = processor.num_slices // 2
    model = Bands(processor.num_channels, middle if channel is None else channel)
    return VolumeSegmentationPipeline(model, processor, **options)


def processor(**changes: Any) -> BinaryFormerImageProcessor:
    fields = {
        "num_slices": 3,
        "image_size": (32, 32),
        "spacing": None,
        "percentiles": (0, 100),
        "foreground_only": False,
    }
    return BinaryFormerImageProcessor(**{**fields, **changes})


def smooth_volume(shape: tuple[int, int, int] = (26, 21, 17), affine: np.ndarray | None = None) -> Volume:
    """Two blobs on a dark ground, 0 to 1."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    one = np.exp(-((grid - np.array([0.2, -0.1, 0.1])[:, None, None, None]) ** 2).sum(0) * 4)
    two = 0.6 * np.exp(-((grid + np.array([0.5, 0.3, 0.4])[:, None, None, None]) ** 2).sum(0) * 9)
    array = (one + two).astype(np.float32)
    array = (array - array.min()) / (array.max() - array.min())
    return volume_from_image(nib.Nifti1Image(array, np.eye(4) if affine is None else affine))


@pytest.mark.parametrize("slice_axis", [0, 1, 2])
@pytest.mark.parametrize("image_size", [(32, 32), (16, 8), (8, 32)], ids=["padded", "windows", "both"])
def test_every_voxel_gets_the_label_of_its_own_slice(slice_axis: int, image_size: tuple[int, int]) -> None:
    volume = smooth_volume()
    pipeline = make(processor(slice_axis=slice_axis, image_size=image_size))
    result = pipeline(volume)
    np.testing.assert_array_equal(result.labels, bands(volume.array))
    assert result.labels.dtype == np.int32
    assert len(np.unique(result.labels)) == 3
    assert {tuple(x.shape[1:]) for x in pipeline.model.seen} == {(3, *image_size)}
    assert max(len(x) for x in pipeline.model.seen) == 4


def test_neighbours_are_the_slices_before_and_after() -> None:
    volume = smooth_volume()
    for channel, shift in ((0, 1), (2, -1)):
        expected = bands(np.roll(volume.array, shift, axis=1))
        edge = 0 if shift == 1 else -1
        expected[:, edge] = bands(volume.array)[:, edge]
        found = make(processor(), channel)(volume).labels
        # The last slice that the box holds stands for those beyond it.
        box = foreground_box(volume.array, volume.spacing)
        np.testing.assert_array_equal(found[box], expected[box])


def test_padding_is_dark_and_even_and_the_position_channel_is_not_padded() -> None:
    volume = smooth_volume((11, 9, 6))
    pipeline = make(processor(slice_axis=2, slice_position=True, image_size=(16, 16), image_mean=0.5, image_std=0.25))
    pipeline(volume)
    seen = torch.cat(pipeline.model.seen)
    assert seen.shape == (6, 4, 16, 16)
    scaled = torch.from_numpy(volume.array)
    inner = (seen[:, 1, 2:13, 3:12].permute(1, 2, 0) * 0.25) + 0.5
    torch.testing.assert_close(inner, scaled)
    ring = torch.ones(16, 16, dtype=torch.bool)
    ring[2:13, 3:12] = False
    # Intensity 0 after the processor's own normalisation.
    assert (seen[:, :3, ring] == -2).all()
    torch.testing.assert_close(seen[:, 3].mean((1, 2)), torch.linspace(-1, 1, 6))
    assert (seen[:, 3].flatten(1).std(1) == 0).all()


def test_overlapping_windows_are_blended_with_weight_on_their_middles() -> None:
    class RowOfWindow(Bands):
        def forward(self, pixel_values: Tensor) -> Any:
            # Wrong near the window's edge, right in its middle.
            middle = torch.zeros(pixel_values.shape[2:])
            middle[3:13, 3:13] = 1
            logits = torch.stack([1 - middle, middle, middle * 0]).expand(len(pixel_values), -1, -1, -1)
            return SimpleNamespace(logits=logits * 10)

    volume = smooth_volume((40, 6, 40))
    p = processor(image_size=(16, 16), window_overlap=0.5)
    labels = VolumeSegmentationPipeline(RowOfWindow(3, 1), p)(volume).labels
    box = foreground_box(volume.array, volume.spacing)
    inside = labels[box][3:-3, :, 3:-3]
    assert inside.size > 0
    assert (inside == 1).all()


def ball(spacing: tuple[float, float, float], turned: bool) -> tuple[Volume, np.ndarray]:
    """A bright ball of 14 mm radius in a 60 mm cube, and the mask of the voxels whose centre is inside."""
    affine = np.diag([*spacing, 1.0])
    if turned:
        c, s = np.cos(0.3), np.sin(0.3)
        affine = np.array([[c, -s, 0, 5], [s, c, 0, -9], [0, 0, 1, 3], [0, 0, 0, 1.0]]) @ affine
    shape = tuple(round(60 / s) for s in spacing)
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    centre = (np.array(shape) - 1) / 2 + np.array([2.3, -1.7, 0.4]) / spacing
    radius = np.sqrt((((index - centre) * spacing) ** 2).sum(-1))
    # A rim one millimetre wide on either side, so that the half-way intensity marks the surface.
    image = np.clip((15 - radius) / 2, 0, 1).astype(np.float32)
    return volume_from_image(nib.Nifti1Image(image, affine)), radius < 14


class Half(Bands):
    """Label 2 where brighter than one half."""

    def forward(self, pixel_values: Tensor) -> Any:
        bright = self.scale * 0.1 * (pixel_values[:, self.channel] - 0.5)
        return SimpleNamespace(logits=torch.stack([-bright, bright * 0 - 9, bright], 1))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("spacing", [(0.6, 0.9, 1.5), (1.0, 1.0, 3.0), (2.0, 1.3, 0.7)])
def test_resampling_there_and_back_moves_nothing(spacing: tuple[float, float, float], turned: bool) -> None:
    volume, truth = ball(spacing, turned)
    p = processor(spacing=(1.0, 1.0, 1.0), image_size=(40, 40))
    result = VolumeSegmentationPipeline(Half(3, 1), p)(volume)
    found = result.labels == 2
    assert result.labels.shape == volume.array.shape
    assert not (result.labels == 1).any()
    dice = 2 * (found & truth).sum() / (found.sum() + truth.sum())
    assert dice > 0.96
    shift = [np.abs(np.argwhere(found)[:, a].mean() - np.argwhere(truth)[:, a].mean()) * spacing[a] for a in range(3)]
    assert max(shift) < 0.1  # mm
    row = result.report["labels"][2]
    assert row["voxels"] == found.sum()
    assert row["volume_ml"] == pytest.approx(found.sum() * np.prod(spacing) / 1000)
    assert row["volume_ml"] == pytest.approx(4 / 3 * np.pi * 1.4**3, rel=0.05)
    grid = result.report["network_grid"]
    np.testing.assert_allclose(nib.affines.voxel_sizes(np.array(grid["affine"])), 1)


def test_spacing_within_one_per_cent_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("resampled")

    monkeypatch.setattr(segmentation, "resample", never)
    monkeypatch.setattr(slice_results, "resample_to", never)
    volume = smooth_volume(affine=np.diag([1.009, 0.995, 1.0, 1.0]))
    labels = make(processor(spacing=(1.0, 1.0, 1.0)))(volume).labels
    np.testing.assert_array_equal(labels, bands(volume.array))
    with pytest.raises(AssertionError, match="resampled"):
        make(processor(spacing=(1.0, 1.02, 1.0)))(volume)
    # An axis without a wanted spacing keeps its own; below one that is resampled, too.
    assert (make(processor(spacing=(None, 1.0, None)))(volume).labels == labels).all()
    with pytest.raises(AssertionError, match="resampled"):
        make(processor(spacing=(None, None, 1.02)))(volume)
    monkeypatch.undo()
    result = make(processor(spacing=(0.5, 1.0, None)))(volume)
    np.testing.assert_allclose(
        nib.affines.voxel_sizes(np.array(result.report["network_grid"]["affine"])), [0.5, 0.995, 1], atol=0.006
    )


def test_only_the_foreground_is_seen_and_the_rest_is_background() -> None:
    array = np.zeros((70, 60, 50), dtype=np.float32)
    array[30:40, 20:35, 25:30] = 1
    array[5, 50, 5] = 0.05
    volume = volume_from_image(nib.Nifti1Image(array, np.diag([1.0, 2.0, 2.5, 1.0])))
    pipeline = make(processor())

    class AlwaysOne(Bands):
        def forward(self, pixel_values: Tensor) -> Any:
            self.seen.append(pixel_values)
            return SimpleNamespace(logits=torch.zeros(len(pixel_values), 3, 32, 32).index_fill_(1, torch.tensor(1), 1))

    pipeline.model = AlwaysOne(3, 1)
    result = pipeline(volume, return_probabilities=True)
    box = (slice(20, 50), slice(15, 40), slice(21, 34))  # 10 mm on each side
    expected = np.zeros(array.shape, dtype=np.int32)
    expected[box] = 1
    np.testing.assert_array_equal(result.labels, expected)
    assert result.probabilities is not None
    assert (result.probabilities[0][expected == 0] == 1).all()
    # The position of slices counts from end to end of the foreground, as in training.
    pipeline = make(processor(slice_position=True))
    assert pipeline(volume).report["network_grid"]["shape"] == [30, 25, 13]
    positions = torch.cat(pipeline.model.seen)[:, 3, 0, 0]
    torch.testing.assert_close(positions, torch.linspace(-1, 1, 25))


@pytest.mark.parametrize(
    ("spacing", "views", "shape"),
    [
        (None, "coronal", (16, 35, 45)),  # the window's height; along the slices; a foreground larger than the window
        (None, "all", (16, 16, 45)),
        ((2.0, 2.0, 2.0), "coronal", (15, 18, 22)),
        ((0.8, 1.0, 1.0), "axial", (15, 24, 45)),
    ],
)
def test_a_margin_yields_where_one_window_then_holds_the_slice(spacing, views, shape) -> None:
    array = np.zeros((60, 60, 60), dtype=np.float32)
    array[25:35, 20:35, 15:40] = 1
    pipeline = make(processor(image_size=(16, 24), spacing=spacing))
    result = pipeline(volume_from_image(nib.Nifti1Image(array, np.eye(4))), views=views)
    assert result.report["network_grid"]["shape"] == list(shape)
    if views == "axial":
        assert len(torch.cat(pipeline.model.seen)) == 45, "a window a slice"


@pytest.mark.parametrize("spacing", [None, (1.4, 1.4, 1.4)])
def test_probabilities_sum_to_one_and_agree_with_the_labels(spacing: tuple[float, float, float] | None) -> None:
    volume = smooth_volume()
    pipeline = make(processor(spacing=spacing))
    pipeline.model.scale.data.fill_(3.0)
    result, plain = pipeline(volume, return_probabilities=True), pipeline(volume)
    assert result.probabilities is not None
    assert plain.probabilities is None
    assert result.probabilities.shape == (3, *volume.array.shape)
    assert result.probabilities.dtype == np.float16
    np.testing.assert_allclose(result.probabilities.sum(0, dtype=np.float32), 1, atol=2e-3)
    np.testing.assert_array_equal(result.labels, plain.labels)
    best = np.take_along_axis(result.probabilities, result.labels[None], 0)[0]
    assert (best >= result.probabilities.max(0) - 1e-3).all()


def test_labels_are_brought_back_one_at_a_time() -> None:
    count, side = 40, 48
    p = torch.rand(count, side // 2, side // 2, side // 2).half()
    fine, coarse = np.eye(4), np.diag([2.0, 2.0, 2.0, 1.0])
    coarse[:3, 3] = 0.5
    tracemalloc.start()
    labels, _ = most_probable(p, coarse, fine, (side,) * 3, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(labels)) > count // 2
    assert peak < 6 * labels.nbytes


@pytest.mark.parametrize("codes", ["RAS", "PSL", "IRP", "LPI"])
@pytest.mark.parametrize("spacing", [None, (1.5, 1.5, 1.5)])
def test_file_in_file_out_in_any_orientation(
    codes: str, spacing: tuple[float, float, float] | None, tmp_path: Path
) -> None:
    ras = smooth_volume(affine=np.diag([1.0, 1.2, 0.9, 1.0]))
    ornt = ornt_transform(io_orientation(ras.affine), axcodes2ornt(codes))
    image = nib.Nifti1Image(apply_orientation(ras.array, ornt), ras.affine @ inv_ornt_aff(ornt, ras.array.shape))
    path = tmp_path / "head.nii.gz"
    nib.save(image, path)
    content = path.read_bytes()

    pipeline = make(processor(spacing=spacing))
    result = pipeline(str(path))
    written = nib.load(result.save(tmp_path / "labels.nii.gz"))
    assert path.read_bytes() == content
    np.testing.assert_array_equal(written.affine, nib.load(path).affine)
    np.testing.assert_array_equal(np.asarray(written.dataobj), apply_orientation(pipeline(ras).labels, ornt))
    assert b"not for clinical use" in written.header["descrip"].item()
    assert json.loads(written.header.extensions[0].get_content()) == {str(k): v for k, v in NAMES.items()}


def test_model_runs_in_inference_mode_and_is_left_as_it_was() -> None:
    pipeline = make(processor())
    pipeline.model.train()
    pipeline(smooth_volume())
    assert pipeline.model.modes == {(False, True, False)}
    assert pipeline.model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", torch.float16])
def test_half_precision_runs_under_autocast(dtype: torch.dtype | str) -> None:
    volume = smooth_volume()
    pipeline = make(processor(), dtype=dtype)
    result = pipeline(volume)
    assert pipeline.model.modes == {(False, True, True)}
    np.testing.assert_array_equal(result.labels, bands(volume.array))
    assert result.report["dtype"] == str(dtype).removeprefix("torch.")


def test_progress_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    volume = smooth_volume()
    calls: list[tuple[int, int]] = []
    make(processor())(volume, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(4, 21), (8, 21), (12, 21), (16, 21), (20, 21), (21, 21)]
    assert capsys.readouterr().err == ""
    make(processor())(volume, progress=True)
    assert "21/21" in capsys.readouterr().err


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(ValueError, match=r"processor makes 4 channels, the model expects 3: .*same checkpoint"):
        VolumeSegmentationPipeline(Bands(3, 1), processor(slice_position=True))
    with pytest.raises(ValueError, match=r"image_size is \(32, 30\), expected multiples of the model's patch size 8"):
        make(processor(image_size=(32, 30)))
    with pytest.raises(ValueError, match=r"dtype is torch\.float64, expected one of auto, float32"):
        make(processor(), dtype=torch.float64)
    with pytest.raises(ValueError, match="batch_size is 0"):
        make(processor(), batch_size=0)


def tiny_model(**changes: Any) -> BinaryFormerForSemanticSegmentation:
    fields = {
        "image_size": 32,
        "num_channels": 3,
        "hidden_size": 48,
        "num_heads": 3,
        "num_hidden_layers": 2,
        "decoder_hidden_size": 64,
        "attention_type": "sign",
        "id2label": {0: "background", 1: "left", 2: "right"},
        "label2id": {"background": 0, "left": 1, "right": 2},
    }
    return BinaryFormerForSemanticSegmentation(BinaryFormerConfig(**{**fields, **changes})).eval()


def test_real_classes_from_a_saved_checkpoint(tmp_path: Path) -> None:
    model, p = tiny_model(), processor(image_size=(32, 32))
    model.save_pretrained(tmp_path / "tiny")
    p.save_pretrained(tmp_path / "tiny")
    volume = smooth_volume()
    nib.save(nib.Nifti1Image(volume.array, volume.affine), tmp_path / "head.nii.gz")

    pipeline = VolumeSegmentationPipeline.from_pretrained(tmp_path / "tiny", batch_size=5, backend="reference")
    result = pipeline(read_volume(tmp_path / "head.nii.gz"), return_probabilities=True)

    # The same by hand: pad, slice, run, unpad, stack.
    box = foreground_box(volume.array, volume.spacing)
    slices = p.volume_to_slices(p.scale_volume(volume.array)[box])
    height, width = slices.shape[2:]
    top, left = (32 - height) // 2, (32 - width) // 2
    padded = torch.zeros(len(slices), 3, 32, 32)
    padded[:, :, top : top + height, left : left + width] = slices
    with torch.no_grad():
        probability = model(padded).logits.softmax(1)[:, :, top : top + height, left : left + width]
    expected = p.slices_to_volume(probability).numpy()
    assert result.probabilities is not None
    np.testing.assert_allclose(result.probabilities[(slice(None), *box)], expected, atol=2e-3)

    report = json.loads(json.dumps(result.report, allow_nan=False))
    assert report["model"] == "tiny"
    assert report["attention_type"] == "sign"
    assert report["backend"] == "reference"
    assert report["input"] == str(tmp_path / "head.nii.gz")
    assert [row["name"] for row in report["labels"]] == ["background", "left", "right"]
    assert sum(row["voxels"] for row in report["labels"]) == volume.array.size
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert report["seconds"] > 0


def test_softmax_attention_has_no_backend() -> None:
    pipeline = VolumeSegmentationPipeline(tiny_model(attention_type="softmax"), processor())
    assert pipeline(smooth_volume()).report["backend"] is None
