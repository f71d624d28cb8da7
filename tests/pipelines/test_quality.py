"""Quality scores, against probabilities that are known for every voxel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from hf_binaryformer.modeling.image_processing import BinaryFormerImageProcessor
from hf_binaryformer.modeling.networks import BinaryFormerForSemanticSegmentation
from hf_binaryformer.pipelines.quality import expected_dice, quality_notes, quality_report
from hf_binaryformer.pipelines.segmentation import VolumeSegmentationPipeline
from hf_binaryformer.pipelines.volumes import Volume, volume_from_image

NAMES = {0: "background", 1: "left thalamus", 2: "right thalamus", 3: "cerebellum cortex"}


def volume(shape: tuple[int, int, int] = (12, 10, 9)) -> Volume:
    """Bright everywhere, so that all of it is foreground."""
    array = np.random.default_rng(0).uniform(0.5, 1, shape).astype(np.float32)
    return volume_from_image(nib.Nifti1Image(array, np.eye(4)))


class OfIntensity(nn.Module):
    """Logits of a pixel by its own intensity, and by the axis that it is sliced along if there are three."""

    def __init__(self, names: dict[int, str] = NAMES, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(id2label=names, num_channels=1, patch_size=1, **config)
        self.weight = nn.Parameter(torch.linspace(2.0, 4.0, len(names)))

    def forward(self, pixel_values: Tensor) -> Any:
        turned = torch.arange(pixel_values.shape[2])[:, None] * 0.7 + torch.arange(pixel_values.shape[3]) * 0.4
        phase = 1.6 * torch.arange(len(self.weight))[:, None, None]
        return SimpleNamespace(logits=self.weight[:, None, None] * torch.sin(5 * pixel_values + turned + phase))


def processor(**changes: Any) -> BinaryFormerImageProcessor:
    fields = {
        "num_slices": 1,
        "image_size": (16, 16),
        "spacing": None,
        "percentiles": (0, 100),
        "foreground_only": False,
    }
    return BinaryFormerImageProcessor(**{**fields, **changes})


def by_hand(model: OfIntensity, p: BinaryFormerImageProcessor, v: Volume, axes: tuple[int, ...]) -> np.ndarray:
    """Mean probabilities (C, I, J, K) in float64, slice by slice, without the pipeline."""
    scaled, total = p.scale_volume(v.array), 0.0
    for axis in axes:
        answers = []
        for one in np.moveaxis(scaled, axis, 0):
            padded = np.zeros((16, 16), np.float32)
            top, left = (16 - one.shape[0]) // 2, (16 - one.shape[1]) // 2
            padded[top : top + one.shape[0], left : left + one.shape[1]] = one
            logits = model(torch.from_numpy(padded)[None, None]).logits[0].detach().double()
            answers.append(logits.softmax(0).numpy()[:, top : top + one.shape[0], left : left + one.shape[1]])
        total = total + np.moveaxis(np.stack(answers, 1), 1, axis + 1)
    return total / len(axes)


@pytest.mark.parametrize(
    ("views", "axes"), [("sagittal", (0,)), ("coronal", (1,)), ("axial", (2,)), ("all", (0, 1, 2))]
)
@pytest.mark.parametrize("keep", [False, True])
def test_views_and_scores_are_those_of_the_probabilities(views: str, axes: tuple[int, ...], keep: bool) -> None:
    v, model, p = volume(), OfIntensity(), processor()
    wanted = by_hand(model, p, v, axes)
    result = VolumeSegmentationPipeline(model, p)(v, views=views, return_probabilities=keep)
    first, second = np.sort(wanted, axis=0)[[-1, -2]]
    clear = first - second > 4e-3  # beyond the rounding of what is stored
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(result.labels[clear], wanted.argmax(0)[clear])
    if keep:
        np.testing.assert_allclose(result.probabilities, wanted, atol=2e-3)
    assert result.report["views"] == [name for a, name in enumerate(("sagittal", "coronal", "axial")) if a in axes]
    thalamus, cerebellum = result.report["quality"]["groups"]
    for row, members in ((thalamus, [1, 2]), (cerebellum, [3])):
        assert row["labels"] == members
        assert row["score"] == pytest.approx(wanted.max(0)[np.isin(result.labels, members)].mean(), abs=1e-3)
    mean = (thalamus["score"] + cerebellum["score"]) / 2
    assert (
        result.report["quality"]["score"] == pytest.approx(mean) and abs(thalamus["score"] - cerebellum["score"]) > 0.02
    )


def test_the_three_views_differ_and_the_processor_may_ask_for_all() -> None:
    v, model = volume(), OfIntensity()
    one, other = (VolumeSegmentationPipeline(model, processor())(v, views=w).labels for w in ("coronal", "axial"))
    assert (one != other).any()
    asked = VolumeSegmentationPipeline(model, processor(slice_axis="all"))(v)
    named = VolumeSegmentationPipeline(model, processor())(v, views="all")
    np.testing.assert_array_equal(asked.labels, named.labels)
    unusual = "the checkpoint takes coronal slices: with sagittal and axial ones, labels are probably worse"
    assert [any(unusual in note for note in one.report["notes"]) for one in (asked, named)] == [False, True]
    calls: list[tuple[int, int]] = []
    VolumeSegmentationPipeline(model, processor())(v, views="all", progress=lambda *step: calls.append(step))
    assert calls[-1] == (31, 31) and calls == sorted(calls) and len({total for _, total in calls}) == 1
    with pytest.raises(ValueError, match="views is 'oblique', expected one of sagittal, coronal, axial, all"):
        VolumeSegmentationPipeline(model, processor())(v, views="oblique")
    with pytest.raises(ValueError, match="slice_axis is 'all', expected 0, 1 or 2"):
        processor(slice_axis="all").volume_to_slices(v.array)


def test_views_of_a_resampled_volume() -> None:
    v = Volume(volume((10, 12, 14)).array, np.diag([2.0, 2.0, 2.0, 1]), volume().source)
    model, p = OfIntensity(), processor(spacing=(4.0, 4.0, 4.0))
    whole = VolumeSegmentationPipeline(model, p)(v, views="all", return_probabilities=True)
    parts = [
        VolumeSegmentationPipeline(model, p)(v, views=w, return_probabilities=True)
        for w in ("sagittal", "coronal", "axial")
    ]
    mean = np.mean([part.probabilities.astype(np.float64) for part in parts], axis=0)
    np.testing.assert_allclose(whole.probabilities, mean, atol=2e-3)
    best = np.take_along_axis(mean, whole.labels[None], 0)[0]
    assert (best >= mean.max(0) - 4e-3).all()
    for row in whole.report["quality"]["groups"]:
        assert row["score"] == pytest.approx(best[np.isin(whole.labels, row["labels"])].mean(), abs=2e-3)


@pytest.mark.parametrize(
    ("views", "axes"), [("sagittal", (0,)), ("coronal", (1,)), ("axial", (2,)), ("all", (0, 1, 2))]
)
def test_the_mirror_image_is_averaged_with_its_sides_exchanged(views: str, axes: tuple[int, ...]) -> None:
    v, model, p = volume(), OfIntensity(), processor(mirror=False)
    other = by_hand(model, p, Volume(v.array[::-1].copy(), v.affine, v.source), axes)
    wanted = (by_hand(model, p, v, axes) + other[[0, 2, 1, 3], ::-1]) / 2
    pipeline = VolumeSegmentationPipeline(model, p)
    result = pipeline(v, views=views, mirror=True, return_probabilities=True)
    np.testing.assert_allclose(result.probabilities, wanted, atol=2e-3)
    assert result.report["mirror"] and not pipeline(v, views=views).report["mirror"]
    asked = VolumeSegmentationPipeline(model, processor(mirror=True))(v, views=views)
    np.testing.assert_array_equal(asked.labels, pipeline(v, views=views, mirror=True).labels)


@pytest.mark.parametrize("views", ["sagittal", "coronal", "axial", "all"])
def test_the_mirror_image_gets_the_mirrored_labels(views: str) -> None:
    """Neighbouring slices, positions, windows that overlap, and FreeSurfer's numbers; a plain call treats the two apart."""
    torch.manual_seed(0)
    sizes = {"image_size": 8, "num_channels": 4, "hidden_size": 48, "num_heads": 3, "num_hidden_layers": 1}
    names = {0: "background", 1: "brain stem", 2: "left hippocampus", 3: "right hippocampus"}
    config = BinaryFormerConfig(
        **sizes, decoder_hidden_size=64, attention_type="sign", id2label=names, label_values=[0, 16, 17, 53]
    )
    p = processor(num_slices=3, slice_position=True, image_size=(8, 8), mirror=False)
    pipeline = VolumeSegmentationPipeline(BinaryFormerForSemanticSegmentation(config), p)
    v = volume((13, 10, 9))
    turned = Volume(v.array[::-1].copy(), v.affine, v.source)
    exchanged = {0: 0, 16: 16, 17: 53, 53: 17}

    def share_alike(**options: Any) -> float:
        plain, mirrored = (pipeline(one, views=views, **options).labels for one in (v, turned))
        assert len(np.unique(plain)) > 2
        return float((np.vectorize(exchanged.get)(mirrored[::-1]) == plain).mean())

    # Where two labels have the same probability in float16, the lower number wins.
    assert share_alike(mirror=True) > 0.998 and share_alike() < 0.9


def test_a_network_that_saw_no_mirror_images_refuses_them() -> None:
    v, model = volume(), OfIntensity()
    with pytest.raises(ValueError, match="OfIntensity, whose image processor does not allow it: leave it out"):
        VolumeSegmentationPipeline(model, processor())(v, mirror=True)
    one_side = VolumeSegmentationPipeline(OfIntensity({0: "background", 1: "left eye"}), processor(mirror=False))
    with pytest.raises(ValueError, match="'left eye' and no label is the same on the right"):
        one_side.settings(mirror=True)


def test_classes_keep_their_order_whatever_that_of_the_file() -> None:
    """JSON that was sorted has "10" before "2"."""
    names = {number: f"part {number}" for number in range(9)} | {9: "left eye", 10: "right eye", 11: "part 11"}
    p = processor(mirror=False)
    wanted = VolumeSegmentationPipeline(OfIntensity(names), p)(volume(), mirror=True).labels
    by_text = VolumeSegmentationPipeline(OfIntensity(dict(sorted(names.items(), key=lambda pair: str(pair[0])))), p)
    np.testing.assert_array_equal(by_text(volume(), mirror=True).labels, wanted)
    assert list(by_text.label_names) == list(names)


def test_steps_after_the_network_are_off_unless_asked_for() -> None:
    """Old processors know neither; what is removed is not scored."""
    array = np.zeros((24, 24, 24), np.float32)
    array[6:18, 6:18, 6:18] = 1
    v = volume_from_image(nib.Nifti1Image(array, np.eye(4)))

    class Everywhere(OfIntensity):
        def forward(self, pixel_values: Tensor) -> Any:
            logits = torch.zeros(len(pixel_values), 4, *pixel_values.shape[2:])
            logits[:, 1] = 1 + pixel_values[:, 0]
            logits[:, 3, ::9, ::9] = logits[:, 3, :3, :3] = 4
            return SimpleNamespace(logits=logits)

    model, p = Everywhere(), processor(image_size=(24, 24))
    assert (p.keep_largest, p.head_only) == (None, None)
    plain = VolumeSegmentationPipeline(model, p)(v)
    assert (plain.labels > 0).all() and (plain.report["keep_largest"], plain.report["head_only"]) == (False, False)
    head = VolumeSegmentationPipeline(model, p)(v, head_only=True)
    assert (head.labels[array > 0] > 0).all() and head.labels[0, 0, 0] == 0 and head.labels[23].max() == 0
    assert head.report["quality"]["groups"][0]["score"] > plain.report["quality"]["groups"][0]["score"]
    largest = VolumeSegmentationPipeline(model, processor(image_size=(24, 24), keep_largest=True, head_only=True))
    assert largest(v).report["keep_largest"] and not largest(v, keep_largest=False).report["keep_largest"]
    assert (largest(v).labels == 1).sum() == (head.labels == 1).sum()
    # Of a bar of 3 x 3 voxels and eight of one voxel, the first is left.
    pieces = [(VolumeSegmentationPipeline(model, p)(v, keep_largest=k).labels == 3).sum() for k in (False, True)]
    assert pieces == [(9 + 8) * 24, 9 * 24]


def test_a_table_gives_the_expected_dice() -> None:
    table = {"thalamus": [[0.5, 0.2], [0.9, 0.8]], "all": [[0.6, 0.6], [1.0, 0.9]]}
    assert expected_dice(0.7, "thalamus", table) == pytest.approx(0.5)
    assert expected_dice(0.3, "thalamus", table) == 0.2 and expected_dice(0.95, "thalamus", table) == 0.8
    assert expected_dice(0.8, "cerebellum", table) == pytest.approx(0.75)
    assert expected_dice(0.8, "cerebellum", None) is None and expected_dice(None, "thalamus", table) is None
    assert expected_dice(0.8, "cerebellum", {"thalamus": [[0.5, 0.2]]}) is None


@pytest.mark.parametrize(
    ("probability", "table", "expected"),
    [
        (0.62, None, ["cerebellum: low confidence (0.62), is it in the field of view?"]),
        (0.9, None, []),
        (0.62, {"all": [[0.0, 0.9], [1.0, 0.95]]}, []),
        (
            0.9,
            {"cerebellum": [[0.8, 0.4], [1.0, 0.6]], "all": [[0.0, 0.9]]},
            ["cerebellum: low confidence (0.90, expected Dice 0.50), is it in the field of view?"],
        ),
        (None, None, ["cerebellum: not found, is it in the field of view?"]),
    ],
)
def test_low_quality_is_told_in_plain_words(probability: float | None, table: Any, expected: list[str]) -> None:
    labels, confidence = np.zeros((4, 4, 4), np.int32), np.full((4, 4, 4), 0.97)
    labels[0], labels[1] = 1, 2
    if probability is not None:
        labels[2], confidence[2] = 3, probability
    quality = quality_report(labels, confidence, NAMES, table)
    assert quality_notes(quality) == expected
    # Where nothing at all was found, another note says so once.
    assert quality_notes(quality_report(np.zeros_like(labels), confidence, NAMES, table)) == []


def test_the_table_of_a_checkpoint_is_kept_and_checked(tmp_path: Any) -> None:
    sizes = {"image_size": 16, "num_channels": 1, "hidden_size": 48, "num_heads": 3, "num_hidden_layers": 1}
    table = {"all": [[0.5, 0.25], [0.75, 0.875]]}
    config = BinaryFormerConfig(**sizes, decoder_hidden_size=64, attention_type="sign", id2label=NAMES, quality=table)
    BinaryFormerForSemanticSegmentation(config).save_pretrained(tmp_path)
    processor(keep_largest=True, slice_axis="all").save_pretrained(tmp_path)
    pipeline = VolumeSegmentationPipeline.from_pretrained(tmp_path)
    assert pipeline.model.config.quality == table
    assert pipeline.settings() == {
        "dtype": "float32", "views": ["sagittal", "coronal", "axial"], "mirror": False, "keep_largest": True,
        "head_only": False,
    }  # fmt: skip
    quality = pipeline(volume()).report["quality"]
    found = [row for row in quality["groups"] if row["score"] is not None]
    assert found and all(row["expected_dice"] == expected_dice(row["score"], "", table) for row in found)
    for wrong in ([], [[0.5]], [[0.9, 0.5], [0.5, 0.6]], [[0.5, 1.5]]):
        with pytest.raises(Exception, match=r"quality of 'all' is .* expected pairs of score and Dice"):
            BinaryFormerConfig(quality={"all": wrong})
