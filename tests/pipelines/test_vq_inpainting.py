"""Inpainting: what is known stays to the bit, what is hidden is never looked at, and what a hole is to the tokens."""

from __future__ import annotations

import itertools
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from volume_cases import in_orientation, oblique_affine, save_nifti
from vq_cases import CODEBOOKS, ENTRIES, GRID, SHAPE, inpainting, seeded, synthesis

from hf_binaryformer.pipelines.grids import VolumeError
from hf_binaryformer.pipelines.volumes import read_volume

STEPS = 4


def head(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    """An ellipsoid of noise on a background of 0, 0 to 1000."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    noise = np.random.default_rng(seed).integers(200, 1000, shape)
    return np.where((grid**2).sum(0) < 0.9, noise, 0).astype(np.int16)


def hole_in(shape: tuple[int, ...] = SHAPE, share: float = 0.35) -> np.ndarray:
    hole = np.zeros(shape, dtype=np.uint8)
    hole[tuple(slice(round(n * share), max(round(n * share) + 1, round(n * (1 - share)))) for n in shape)] = 1
    return hole


@pytest.fixture(scope="module")
def pipeline():
    return inpainting()


CASES = [
    ("RAS", (2.0, 2.0, 2.0), SHAPE),
    ("LPS", (1.0, 1.0, 1.0), (37, 41, 29)),
    ("ASL", (0.8, 1.1, 2.3), (40, 33, 17)),
    ("IRP", (3.1, 2.0, 4.0), (11, 19, 9)),
    ("SAR", (2.0, 2.0, 2.0), (60, 50, 40)),
]


@pytest.mark.parametrize(("codes", "spacing", "shape"), CASES, ids=[c[0] for c in CASES])
def test_known_voxels_of_a_file_come_back_bit_for_bit(codes, spacing, shape, pipeline, tmp_path):
    image, hole = head(shape), hole_in(shape)
    own, affine = in_orientation(image, oblique_affine(spacing), codes)
    own_hole, _ = in_orientation(hole, oblique_affine(spacing), codes)
    source = save_nifti(tmp_path / "a.nii.gz", own, affine, sform=2, qform=1)
    mask = save_nifti(tmp_path / "m.nii.gz", own_hole, affine, sform=2, qform=1)
    result = pipeline(source, mask, num_inference_steps=STEPS, num_samples=2, generator=seeded())
    result.save(tmp_path / "filled.nii.gz")
    written, original = nib.load(tmp_path / "filled.nii.gz"), nib.load(source)
    assert written.shape == (*own.shape, 2) and written.get_data_dtype() == np.float32
    np.testing.assert_array_equal(written.affine, original.affine)
    filled = np.asarray(written.dataobj)
    known = own_hole == 0
    for sample in np.moveaxis(filled, -1, 0):
        assert sample[known].tobytes() == own[known].astype(np.float32).tobytes()
        assert np.isfinite(sample).all() and not np.array_equal(sample, own)
    description = bytes(written.header["descrip"]).decode()
    assert "Synthetic" in description and "not for clinical use" in description
    assert read_volume(source).array.shape == tuple(result.report["shape"])
    assert json.dumps(result.report, allow_nan=False) and result.report["seconds"] > 0


@pytest.mark.parametrize("shape", [SHAPE, (7, 30, 5), (1, 9, 9), (33, 25, 50)])
@pytest.mark.parametrize("feather", [0, 3])
def test_known_voxels_of_a_tensor_come_back_bit_for_bit(shape, feather, pipeline):
    image, hole = torch.rand(shape) * 1e4 - 77, torch.from_numpy(hole_in(shape))
    images = pipeline(image, hole, num_inference_steps=2, feather=feather, generator=seeded()).images
    assert images.shape == (1, 1, *shape) and images.dtype == torch.float32
    assert torch.equal(images[0, 0][hole == 0], image[hole == 0])
    assert not torch.equal(images[0, 0][hole == 1], image[hole == 1])


@pytest.mark.parametrize("spacing", [(2, 2, 2), (1.0, 1.3, 0.9)])
def test_what_the_hole_hides_is_never_looked_at(spacing, pipeline):
    image, hole = head((30, 28, 26)).astype(np.float32), hole_in((30, 28, 26))
    results = []
    for hidden in (image, np.zeros_like(image), np.full_like(image, 1e6), -5 * image):
        mixed = np.where(hole == 1, hidden, image)
        results.append(pipeline(mixed, hole, num_inference_steps=STEPS, generator=seeded(), spacing=spacing, feather=2))
    for result in results[1:]:
        assert torch.equal(result.images, results[0].images) and torch.equal(result.tokens, results[0].tokens)


def test_tokens_that_the_hole_touches_and_no_others(pipeline):
    reach, cell = pipeline.vqmodel.encoder_reach, pipeline.vqmodel.downsample
    rng = np.random.default_rng(0)
    for _ in range(5):
        hole = rng.random(SHAPE) < 0.002
        case = pipeline.prepare(head().astype(np.float32), hole, np.diag([2, 2, 2, 1.0]))
        touched = pipeline.touched(case).numpy()
        placed = case.network_hole
        for d, h, w in itertools.product(*map(range, GRID)):
            window = tuple(slice(max(0, p * cell - reach), (p + 1) * cell + reach) for p in (d, h, w))
            assert touched[d, h, w] == placed[window].any()
        # The reach is the encoder's: another content of the hole changes no other token.
        others = [pipeline.encode(torch.from_numpy(np.where(placed, v, 0.5)).float()[None, None]) for v in (0.0, 1.5)]
        differ = (others[0] != others[1]).any(1)[0].numpy()
        assert differ.any() and not (differ & ~touched).any()


def test_known_tokens_stay(pipeline):
    image, hole = head().astype(np.float32), hole_in()
    case = pipeline.prepare(image, hole == 1, np.diag([2, 2, 2, 1.0]))
    known = pipeline.encode(torch.from_numpy(case.network_image())[None, None])
    tokens = pipeline(image, hole, num_inference_steps=STEPS, generator=seeded()).tokens
    keep = ~pipeline.touched(case)
    assert keep.any() and not keep.all()
    assert torch.equal(tokens[0][:, keep].long(), known[0][:, keep])


@pytest.mark.parametrize("shape", [SHAPE, (31, 9, 23)])
def test_full_mask_equals_synthesis(shape, pipeline):
    made = synthesis()(num_inference_steps=STEPS, temperature=0.8, generator=seeded(5))
    result = pipeline(head(shape), np.ones(shape), num_inference_steps=STEPS, generator=seeded(5))
    assert torch.equal(result.tokens, made.tokens)
    if shape == SHAPE:
        assert torch.equal(result.images, made.images)
    else:
        # Another size: the middle of one lies on the middle of the other.
        start = [(a - b) // 2 for a, b in zip(shape, SHAPE, strict=True)]
        ours, theirs = ([slice(max(0, sign * s), None) for s in start] for sign in (1, -1))
        a, b = result.images[(0, 0, *ours)], made.images[(0, 0, *theirs)]
        size = tuple(slice(0, min(p, q)) for p, q in zip(a.shape, b.shape, strict=True))
        assert torch.equal(a[size], b[size])


def test_order_is_the_schedulers_unless_given():
    image, hole = head(), hole_in()

    def tokens(pipeline, selection):
        """After the first of five steps, which tells what was drawn first."""
        seen = []
        given = {"num_inference_steps": 5, "temperature": 1.0, "output_type": "tokens", "generator": seeded()}
        tell = lambda _, step, timestep, tensors: seen.append(tensors["tokens"].clone()) or {}  # noqa: E731
        pipeline(image, hole, selection=selection, callback_on_step_end=tell, **given)
        return seen[0]

    random, raster = inpainting(), inpainting(selection="raster")
    assert torch.equal(tokens(random, "raster"), tokens(raster, None))
    assert torch.equal(tokens(random, None), tokens(raster, "random"))
    assert not torch.equal(tokens(random, None), tokens(raster, None))
    confident = inpainting(selection="confidence")
    assert torch.equal(tokens(random, "confidence"), tokens(confident, None))
    with pytest.raises(ValueError, match="selection is 'best', expected one of random"):
        tokens(random, "best")


def test_empty_mask_returns_the_input_and_says_so(pipeline, monkeypatch):
    image = torch.rand(SHAPE)
    monkeypatch.setattr(pipeline.transformer, "forward", lambda *a, **o: pytest.fail("the network ran"))
    with pytest.warns(UserWarning, match="the mask is empty") as warned:
        result = pipeline(image, torch.zeros(SHAPE), num_samples=2)
    assert warned[0].filename == __file__
    assert torch.equal(result.images, image.expand(2, 1, *SHAPE))
    assert (result.std == 0).all()
    assert result.report["notes"] == [str(warned[0].message)] and result.report["steps"] == 0


def test_steps_that_change_nothing_skip_the_network(pipeline, monkeypatch):
    calls = []
    forward = pipeline.transformer.forward
    monkeypatch.setattr(pipeline.transformer, "forward", lambda t, **o: calls.append(1) or forward(t, **o))
    report = pipeline(head(), hole_in(), num_inference_steps=500, generator=seeded()).report
    assert len(calls) == report["steps"] == report["tokens_masked"][0] < np.prod(GRID)


def test_number_formats(pipeline):
    """Fewer digits may draw other tokens, and leave what is known alone."""
    image, hole = head(), hole_in()
    other = inpainting()
    other.set_autocast("bfloat16")
    low, full = (p(image, hole, num_inference_steps=2, temperature=0, generator=seeded()) for p in (other, pipeline))
    assert low.images.dtype == torch.float32 and low.report["notes"] == []
    keep = ~pipeline.touched(pipeline.prepare(image.astype(np.float32), hole == 1, np.diag([2, 2, 2, 1.0])))
    assert torch.equal(low.tokens[0][:, keep], full.tokens[0][:, keep])
    assert torch.equal(low.images[0, 0][hole == 0], full.images[0, 0][hole == 0])
    assert not torch.equal(low.decoded, full.decoded)
    other.to(torch.bfloat16)
    assert other(image, hole, num_inference_steps=2).images.dtype == torch.float32
    with pytest.raises(ValueError, match="dtype is int8, expected one of auto, float32, bfloat16, float16"):
        other.set_autocast("int8")


def test_a_checkpoint_without_a_voxel_size_keeps_the_images():
    pipeline = inpainting(spacing=None)
    case = pipeline.prepare(head().astype(np.float32), hole_in() == 1, np.diag([0.7, 3.0, 1.1, 1.0]))
    assert case.network_affine is case.affine
    np.testing.assert_array_equal(case.network_hole, hole_in() == 1)


def test_samples_and_their_deviation(pipeline):
    image, hole = torch.rand(SHAPE), torch.from_numpy(hole_in())
    options = {"num_inference_steps": STEPS, "temperature": 2.0}
    result = pipeline(image, hole, num_samples=3, generator=seeded(), **options)
    assert result.images.shape == (3, 1, *SHAPE) and result.decoded.shape == (3, 1, *SHAPE)
    assert not torch.equal(result.images[0], result.images[1])
    expected = result.images.double().std(0, unbiased=True)[None]
    torch.testing.assert_close(result.std.double(), expected, atol=1e-6, rtol=1e-5)
    assert (result.std[0, 0][hole == 0] == 0).all() and result.std.max() > 0
    torch.testing.assert_close(result.images[:, 0, hole == 1], result.decoded[:, 0, hole == 1])
    one = pipeline(image, hole, generator=seeded(), **options)
    assert torch.equal(one.images, result.images[:1]) and one.std is None
    again = pipeline(image, hole, num_samples=3, generator=seeded(), **options)
    assert torch.equal(again.images, result.images)


def test_a_batch_equals_its_images_one_by_one(pipeline):
    images = torch.rand(2, 1, *SHAPE) * torch.tensor([1.0, 900.0]).view(2, 1, 1, 1, 1)
    holes = torch.stack([torch.from_numpy(hole_in(share=s)) for s in (0.3, 0.42)])[:, None]
    generators = [seeded(s) for s in range(4)]
    batch = pipeline(images, holes, num_inference_steps=STEPS, num_samples=2, generator=generators)
    for index in range(2):
        own = [seeded(2 * index), seeded(2 * index + 1)]
        single = pipeline(images[index], holes[index], num_inference_steps=STEPS, num_samples=2, generator=own)
        assert torch.equal(batch.images[2 * index : 2 * index + 2], single.images)
        assert torch.equal(batch.std[index], single.std[0])
    one_mask = pipeline(images, holes[:1], num_inference_steps=STEPS, generator=[seeded(0), seeded(1)])
    assert torch.equal(one_mask.images[0], batch.images[0])
    assert torch.equal(one_mask.images[1][holes[0] == 0], images[1][holes[0] == 0])


def test_output_types(pipeline):
    image, hole = head(), hole_in()
    options = {"num_inference_steps": 2, "num_samples": 2}
    tensors, arrays, tokens = (
        pipeline(image, hole, output_type=kind, generator=seeded(), **options) for kind in ("pt", "np", "tokens")
    )
    for name in ("images", "std", "decoded"):
        assert isinstance(arrays[name], np.ndarray) and np.array_equal(arrays[name], tensors[name].numpy())
        assert getattr(tokens, name) is None
    assert tokens.tokens.dtype == torch.uint8 and tokens.tokens.max() < ENTRIES
    assert tokens.tokens.shape == (2, CODEBOOKS, *GRID) and torch.equal(tokens.tokens, tensors.tokens)
    returned = pipeline(image, hole, return_dict=False, generator=seeded(), **options)
    assert len(returned) == 4 and torch.equal(returned[0], tensors.images)
    with pytest.raises(VolumeError, match="the input was an array"):
        tensors.save("x.nii.gz")


NAN = torch.rand(SHAPE)
NAN[3, 4, 5] = float("nan")


@pytest.mark.parametrize(
    ("image", "mask", "options", "message"),
    [
        (torch.rand(SHAPE), torch.ones(20, 24, 15), {}, r"mask has shape \(1, 20, 24, 15\).*same grid: resample"),
        (torch.rand(2, 1, *SHAPE), torch.ones(3, 1, *SHAPE), {}, "mask has shape"),
        (NAN, hole_in(), {}, r"image has 1 NaN or infinite voxels of 7680, expected finite.*nan_to_num"),
        (torch.rand(SHAPE), NAN, {}, "mask_image has 1 NaN"),
        (torch.rand(2, *SHAPE), hole_in(), {}, r"image has shape \(2, 20, 24, 16\), expected \(I, J, K\)"),
        (torch.rand(SHAPE[:2]), hole_in(), {}, "image has shape"),
        (torch.ones(SHAPE), hole_in(), {}, "intensities are equal, expected an image with contrast"),
        (head(), hole_in(), {"num_samples": 0}, "num_samples is 0, expected at least 1"),
        (head(), hole_in(), {"feather": -1}, "feather is -1, expected at least 0"),
        (head(), hole_in(), {"output_type": "pil"}, "output_type is 'pil'"),
    ],
)
def test_bad_input_is_named(image, mask, options, message, pipeline):
    with pytest.raises(ValueError, match=message):
        pipeline(image, mask, **options)


def test_mask_of_a_file_on_another_grid(pipeline, tmp_path):
    image = save_nifti(tmp_path / "a.nii.gz", head(), np.diag([2, 2, 2, 1.0]))
    moved = np.diag([2, 2, 2, 1.0])
    moved[0, 3] = 4
    mask = save_nifti(tmp_path / "m.nii.gz", hole_in(), moved)
    with pytest.raises(VolumeError, match="expected the same grid: resample one onto the other"):
        pipeline(image, mask)


def test_hole_beyond_the_checkpoints_grid(pipeline):
    shape = (20, 60, 16)
    image = np.random.default_rng(0).uniform(200, 1000, shape)
    hole = np.zeros(shape)
    hole[8:12, 30:34, 6:10] = 1
    result = pipeline(image, hole, num_inference_steps=2)
    assert result.images.isfinite().all() and "beyond the checkpoint's grid" in result.report["notes"][0]
    hole[8:12, 2:6, 6:10] = 1
    with pytest.raises(VolumeError, match=r"along axis J the image spans 120 mm.*beyond the 48 mm.*crop the image"):
        pipeline(image, hole)


@pytest.mark.parametrize("dtype", [np.int32, np.float64])
def test_known_voxels_that_float32_cannot_hold_are_written_as_they_are(dtype, pipeline, tmp_path):
    image = head().astype(dtype) * 40_001
    image[image > 0] += 1 if dtype is np.int32 else 0.123456789
    hole = hole_in()
    source = save_nifti(tmp_path / "a.nii.gz", image, np.diag([2.0, 2.0, 2.0, 1.0]))
    mask = save_nifti(tmp_path / "m.nii.gz", hole, np.diag([2.0, 2.0, 2.0, 1.0]))
    pipeline(source, mask, num_inference_steps=STEPS, generator=seeded()).save(tmp_path / "filled.nii.gz")
    filled = np.asarray(nib.load(tmp_path / "filled.nii.gz").dataobj)
    np.testing.assert_array_equal(filled[hole == 0], image[hole == 0])
    assert (image.astype(np.float32) != image)[hole == 0].any() and (filled[hole != 0] != image[hole != 0]).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_hole_that_is_marked_by_nan_is_filled_as_any_other(bad, pipeline, tmp_path):
    image, hole, affine = head().astype(np.float32), hole_in(), np.diag([2.0, 2.0, 2.0, 1.0])
    mask = save_nifti(tmp_path / "m.nii.gz", hole, affine)
    clean = pipeline(
        save_nifti(tmp_path / "a.nii.gz", image, affine), mask, num_inference_steps=STEPS, generator=seeded()
    )
    marked = np.where(hole, bad, image).astype(np.float32)
    source = save_nifti(tmp_path / "b.nii.gz", marked, affine)
    found = pipeline(source, mask, num_inference_steps=STEPS, generator=seeded())
    torch.testing.assert_close(found.images, clean.images, rtol=0, atol=0)
    marked[0, 0, 0] = bad
    with pytest.raises(VolumeError, match="image has 1 NaN .*expected finite values outside the hole"):
        pipeline(save_nifti(tmp_path / "c.nii.gz", marked, affine), mask, num_inference_steps=STEPS)
