"""The autoencoder: shuffles, how far tokens see and reach, tiles, patches, sizes, files."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch

from hf_binaryformer.modeling.vq_autoencoder import BinaryVQModel
from hf_binaryformer.modeling.vq_networks import pixel_shuffle_3d, pixel_unshuffle_3d

TINY = {
    "num_codebooks": 2,
    "codebook_size": 16,
    "codebook_dim": 4,
    "encoder_channels": [8, 12, 16],
    "decoder_channels": [16, 16, 16, 8],
}


def tiny(**options) -> BinaryVQModel:
    return BinaryVQModel(**{**TINY, **options}).eval()


def random_tokens(model: BinaryVQModel, *size: int) -> torch.Tensor:
    return torch.randint(model.config.codebook_size, (1, model.config.num_codebooks, *size))


def test_unshuffle_is_shuffles_inverse_and_puts_each_voxel_where_it_says():
    x = torch.randn(2, 3, 4, 6, 2)
    y = pixel_unshuffle_3d(x, 2)
    assert y.shape == (2, 24, 2, 3, 1)
    for c, d, h, w in product(range(3), range(4), range(6), range(2)):
        offset = 4 * (d % 2) + 2 * (h % 2) + w % 2
        assert torch.equal(y[:, 3 * offset + c, d // 2, h // 2, w // 2], x[:, c, d, h, w])
    assert torch.equal(pixel_shuffle_3d(y, 2), x)
    z = torch.randn(1, 54, 2, 1, 3)
    assert torch.equal(pixel_unshuffle_3d(pixel_shuffle_3d(z, 3), 3), z)


def extent(changed: torch.Tensor) -> list[tuple[int, int]]:
    """First and last changed index along each of three axes."""
    return [(int(i.min()), int(i.max())) for i in changed.nonzero().T]


@pytest.mark.parametrize("convs", [(2, 2), (1, 3), (0, 0)])
def test_a_latent_changes_its_cell_and_exactly_the_decoder_reach_beyond(convs):
    model = tiny(decoder_num_convs=convs).double()
    latents = torch.randn(1, 8, 3, 3, 3, dtype=torch.float64)
    changed = latents.clone()
    changed[:, :, 1, 1, 1] += 1
    with torch.no_grad():
        difference = model.decode_latents(changed).sample - model.decode_latents(latents).sample
    reach = model.decoder_reach
    assert reach == 2 * convs[0] + convs[1]
    assert extent(difference[0, 0] != 0) == [(8 - reach, 15 + reach)] * 3


@pytest.mark.parametrize("convs", [0, 1, 2])
def test_a_latent_sees_its_cell_and_exactly_the_encoder_reach_beyond(convs):
    model = tiny(encoder_num_convs=convs).double()
    x = torch.rand(1, 1, 24, 24, 24, dtype=torch.float64, requires_grad=True)
    model.encode(x).latents[0, :, 1, 1, 1].square().sum().backward()
    reach = model.encoder_reach
    assert reach == 2 * convs
    assert extent(x.grad[0, 0] != 0) == [(8 - reach, 15 + reach)] * 3


def test_the_default_is_the_papers_size():
    with torch.device("meta"):
        model = BinaryVQModel()
    assert model.downsample == 16 and model.decoder_reach == 6
    assert sum(p.numel() for p in model.decoder.parameters()) == pytest.approx(12e6, rel=0.05)
    assert model.quantizer.codebook.shape == (8, 64, 32)


@pytest.mark.parametrize("edge", [1, 2, 4])
def test_tiles_equal_the_whole(edge):
    model = tiny()
    tokens = random_tokens(model, 3, 5, 4)
    with torch.no_grad():
        whole, tiled = model.decode(tokens).sample, model.tiled_decode(tokens, edge).sample
    assert whole.shape == (1, 1, 24, 40, 32)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)


def test_tiles_need_their_halo(monkeypatch):
    model = tiny(tile_size=2)
    tokens = random_tokens(model, 4, 2, 2)
    whole = model.decode(tokens).sample
    torch.testing.assert_close(model.tiled_decode(tokens).sample, whole, rtol=0, atol=1e-5)
    monkeypatch.setattr(BinaryVQModel, "decoder_reach", 0)
    assert (model.tiled_decode(tokens).sample - whole).abs().max() > 1e-3


def test_patchwise_runs_on_each_patch_alone():
    model = tiny(patchwise=True)
    alone = tiny()
    alone.load_state_dict(model.state_dict())
    x = torch.rand(2, 1, 32, 16, 48)
    tokens = model.encode(x).tokens
    sample = model.decode(tokens).sample
    assert tokens.shape == (2, 2, 4, 2, 6)
    for i, k in product(range(2), range(3)):
        cell, voxels = (slice(2 * i, 2 * i + 2), slice(None), slice(2 * k, 2 * k + 2)), slice(None)
        box = (slice(16 * i, 16 * i + 16), voxels, slice(16 * k, 16 * k + 16))
        assert torch.equal(alone.encode(x[(..., *box)]).tokens, tokens[(..., *cell)])
        torch.testing.assert_close(alone.decode(tokens[(..., *cell)]).sample, sample[(..., *box)], rtol=0, atol=1e-5)
    torch.testing.assert_close(model.tiled_decode(tokens, 2).sample, sample, rtol=0, atol=1e-5)
    assert (alone.decode(tokens).sample - sample).abs().max() > 1e-3


def test_forward_is_encode_then_decode():
    model, x = tiny(), torch.rand(2, 1, 16, 8, 24)
    result, encoded = model(x), model.encode(x)
    assert torch.equal(result.tokens, encoded.tokens)
    torch.testing.assert_close(result.sample, model.decode(encoded.tokens).sample)
    entries = model.quantizer.decode(encoded.tokens)
    torch.testing.assert_close(result.commitment_loss, (encoded.latents - entries).square().mean())


def test_without_quantisation_the_codebooks_stay_and_every_weight_learns():
    model, x = tiny().train(), torch.rand(1, 1, 16, 16, 16)
    before = model.quantizer.codebook.clone()
    result = model(x, quantize=False)
    assert result.tokens is None and result.commitment_loss == 0
    result.sample.square().mean().backward()
    assert torch.equal(before, model.quantizer.codebook)
    model(x).sample.square().mean().backward()
    assert not torch.equal(before, model.quantizer.codebook)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("quantize", [True, False])
def test_only_the_first_codebooks_are_decoded_where_that_is_asked(quantize, monkeypatch):
    model, x = tiny(num_codebooks=3).train(), torch.rand(4, 1, 16, 16, 16)
    seen = []
    monkeypatch.setattr(model, "_decode", lambda latents: seen.append(latents) or latents)
    model(x)  # starts the codebooks
    model.eval()
    part = model(x, quantize, torch.tensor([1, 3, 2, 1])).sample.unflatten(1, (3, -1))
    present = part.flatten(2).ne(0).any(2)
    assert present.int().tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]]
    whole = model(x, quantize).sample.unflatten(1, (3, -1))
    assert torch.equal(part, whole * present[:, :, None, None, None, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_it_does_the_same(tmp_path, dtype):
    model = tiny(spacing=None).train()
    model(torch.rand(1, 1, 32, 32, 32))  # starts the codebooks
    model.eval().to(dtype).save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    loaded = BinaryVQModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert not loaded.training and loaded.config.spacing is None
    x = torch.rand(1, 1, 16, 24, 8, dtype=dtype)
    assert torch.equal(loaded.quantizer.codebook, model.quantizer.codebook)
    assert loaded.quantizer.codebook.dtype == torch.float32
    tokens = model.encode(x).tokens
    assert torch.equal(loaded.encode(x).tokens, tokens)
    assert torch.equal(loaded.decode(tokens).sample, model.decode(tokens).sample)
    assert loaded.decode(tokens).sample.dtype == dtype
    # Unless asked for, half precision is one of files only.
    assert BinaryVQModel.from_pretrained(tmp_path).dtype == torch.float32
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["encoder_channels"] == TINY["encoder_channels"]


@pytest.mark.parametrize(
    ("options", "shape", "match"),
    [
        ({}, (1, 1, 16, 16, 20), "multiples of 8: pad it"),
        ({}, (1, 1, 16, 16), "expected \\(batch, 1, D, H, W\\)"),
        ({}, (1, 2, 16, 16, 16), "expected \\(batch, 1, D, H, W\\)"),
        ({"patchwise": True}, (1, 1, 16, 16, 24), "multiples of 16: pad it"),
    ],
)
def test_volumes_that_do_not_fit(options, shape, match):
    with pytest.raises(ValueError, match=match):
        tiny(**options).encode(torch.rand(shape))


def test_tokens_and_tiles_that_do_not_fit():
    model = tiny(patchwise=True)
    with pytest.raises(ValueError, match="multiples of patch_size 2"):
        model.decode(random_tokens(model, 2, 2, 3))
    with pytest.raises(ValueError, match="tile_size is 3, expected at least 1 and a multiple of patch_size 2"):
        model.tiled_decode(random_tokens(model, 2, 2, 2), 3)
    with pytest.raises(ValueError, match="none empty"):
        model.tiled_decode(random_tokens(model, 2, 0, 2))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"decoder_channels": [16, 8, 8]}, "has 3 stages .* 2; expected the same number"),
        ({"encoder_channels": [8], "decoder_channels": [8, 8]}, "at least 2"),
        ({"decoder_channels": [16, 12, 16, 8]}, "12 channels; a 3D pixel shuffle needs a multiple of 8"),
    ],
)
def test_stages_that_do_not_fit(options, match):
    with pytest.raises(ValueError, match=match):
        tiny(**options)
