"""The token transformer: layout against loops, other grids, every attention type, loss, files."""

from __future__ import annotations

import math

import pytest
import torch

import hf_binaryformer as bf
from hf_binaryformer.kernels import available_backends
from hf_binaryformer.kernels.backends import BackendUnavailableError
from hf_binaryformer.modeling import attention_forms as attention_module
from hf_binaryformer.modeling.vq_transformer import BinaryVQTransformer3DModel, elbo_loss

SIZES = {
    "grid_size": (2, 3, 4),
    "num_codebooks": 3,
    "codebook_size": 5,
    "embedding_dim": 8,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "value_head_dim": 4,
    "initializer_range": 0.2,
}
TYPES = ["softmax", "sign", "sign_stopgrad", "hamming", "hamming_grouped", "hamming_bernoulli", "uniform"]


def build(**options) -> BinaryVQTransformer3DModel:
    return BinaryVQTransformer3DModel(**{**SIZES, **options})


def some_tokens(model, batch=2, grid=(2, 3, 4)) -> torch.Tensor:
    return torch.randint(model.mask_token_id + 1, (batch, model.config.num_codebooks, *grid))


def block_input(model, tokens) -> torch.Tensor:
    """What enters the first block, (B, N, D)."""
    seen = []
    handle = model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(tokens)
    handle.remove()
    return seen[0]


def test_defaults_are_the_paper():
    model = BinaryVQTransformer3DModel()
    assert model.norm.normalized_shape == (384,) and len(model.blocks) == 8 and model.mask_token_id == 64
    assert math.prod(model.config.grid_size) == 1680 and model.config.mask_granularity == "position"
    assert all(block.attn.config.attention_type == "hamming" for block in model.blocks)
    assert all((block.attn.head_dim, block.attn.value_head_dim) == (64, 16) for block in model.blocks)
    assert bf.BinaryVQTransformer3DModel is BinaryVQTransformer3DModel


@pytest.mark.parametrize("position_embedding", ["learned", "axial"])
def test_each_position_is_its_embeddings_side_by_side_plus_its_place(position_embedding):
    model = build(position_embedding=position_embedding)
    for table in model.pos_embed:
        torch.nn.init.normal_(table)
    tokens = some_tokens(model)
    x = block_input(model, tokens)
    tables = model.pos_embed
    for b, n, (i, j, k) in ((0, 0, (0, 0, 0)), (1, 7, (0, 1, 3)), (1, 23, (1, 2, 3))):
        parts = [model.token_embed.weight[codebook * 6 + int(tokens[b, codebook, i, j, k])] for codebook in range(3)]
        if position_embedding == "learned":
            place = tables[0][0, :, i, j, k]
        else:
            place = tables[0][0, :, i, 0, 0] + tables[1][0, :, 0, j, 0] + tables[2][0, :, 0, 0, k]
        torch.testing.assert_close(x[b, n], torch.cat(parts) + place)


def test_logits_lie_where_their_tokens_lie():
    model = build().eval()
    rows = []
    model.head.register_forward_hook(lambda module, args, out: rows.append(out))
    logits = model(some_tokens(model)).logits
    assert logits.shape == (2, 3, 5, 2, 3, 4)
    for b, codebook, v, i, j, k in ((0, 0, 0, 0, 0, 0), (1, 2, 4, 1, 2, 3), (1, 1, 3, 0, 2, 1)):
        assert logits[b, codebook, v, i, j, k] == rows[0][b, (i * 3 + j) * 4 + k, codebook * 5 + v]


def test_start_tells_all_positions_apart_and_neighbours_are_alike():
    place = build(embedding_dim=16)._positions((2, 3, 4))[0].view(2, 3, 4, -1)
    flat = place.flatten(0, 2)
    distance = torch.cdist(flat, flat)
    assert distance.fill_diagonal_(9).min() > 0.5
    assert (place[0, 0, 0] - place[0, 0, 1]).norm() < (place[0, 0, 0] - place[1, 2, 3]).norm()


def test_axial_start_is_sines_and_cosines_from_two_positions_to_four_grids():
    grid, dim = (3, 5, 4), 20
    model = build(grid_size=grid, num_codebooks=1, embedding_dim=dim, position_embedding="axial")
    for axis, (side, low, high) in enumerate(zip(grid, (0, 6, 13), (6, 13, 20), strict=True)):
        table = model.pos_embed[axis].detach().movedim(2 + axis, 2).flatten(2)[0]
        count = math.ceil((high - low) / 2)
        lengths = [2 * (4 * side / 2) ** (n / (count - 1)) for n in range(count)]
        waves = [[f(2 * math.pi * x / length) for x in range(side)] for f in (math.sin, math.cos) for length in lengths]
        expected = torch.zeros(dim, side)
        expected[low:high] = torch.tensor(waves)[: high - low]
        torch.testing.assert_close(table, expected, atol=1e-5, rtol=1e-5)


def test_dropout_is_that_of_the_blocks_two_outputs():
    block = build(dropout=0.3).blocks[0]
    assert (block.attn.proj_drop.p, block.mlp.drop1.p, block.mlp.drop2.p) == (0.3, 0.3, 0.3)
    assert block.attn.attn_drop == 0.0 or block.attn.attn_drop.p == 0.0
    model, tokens = build(dropout=0.3), torch.zeros(1, 3, 2, 3, 4, dtype=torch.long)
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
    model.eval()
    assert torch.equal(model(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("position_embedding", ["learned", "axial"])
def test_other_grids_resize_the_position_embedding(position_embedding):
    model = build(position_embedding=position_embedding).eval()
    grid = (3, 2, 6)
    assert model(some_tokens(model, grid=grid)).logits.shape == (2, 3, 5, *grid)
    # A table that is linear along an axis stays so inside; half-pixel centres: 8 samples of 0 ... 3.
    for table in model.pos_embed:
        torch.nn.init.zeros_(table)
    with torch.no_grad():
        model.pos_embed[-1 if position_embedding == "axial" else 0] += torch.arange(4.0)
    place = model._positions((2, 3, 8))[0].view(2, 3, 8, -1)
    expected = ((torch.arange(8) + 0.5) / 2 - 0.5).clamp(0, 3)
    torch.testing.assert_close(place, expected[:, None].expand_as(place).detach())


@pytest.mark.parametrize("attention_type", TYPES)
def test_every_attention_type_learns(attention_type):
    model = build(attention_type=attention_type)
    assert {block.attn.config.attention_type for block in model.blocks} == {attention_type}
    tokens = some_tokens(model)
    logits = model(tokens).logits
    loss = elbo_loss(logits, tokens.clamp_max(4), tokens == 5, torch.tensor([3, 4]), 8)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or "sign_stopgrad" in attention_type, name


def test_shared_attention_is_one_module():
    apart, shared = build(), build(share_attention=True)
    attention = sum(p.numel() for p in apart.blocks[1].attn.parameters())
    count = {model: sum(p.numel() for p in model.parameters()) for model in (apart, shared)}
    assert count[apart] - count[shared] == attention
    assert not any(name.startswith("blocks.1.attn") for name in shared.state_dict())
    shared(some_tokens(shared)).logits.sum().backward()


@pytest.mark.parametrize("options", [{}, {"attention_type": "sign", "bit_gradient": "ternary", "dropout": 0.2}])
def test_gradient_checkpointing_changes_no_gradient(options):
    model = build(**options)
    tokens = some_tokens(model)
    gradients = []
    for enable in (False, True):
        if enable:
            model.enable_gradient_checkpointing()
        calls: list[int] = []
        handle = model.blocks[0].register_forward_pre_hook(lambda *args, seen=calls: seen.append(1))
        model.zero_grad()
        torch.manual_seed(3)
        model.train()(tokens).logits.square().sum().backward()
        handle.remove()
        assert len(calls) == 1 + enable
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("attention_type", ["sign", "hamming"])
def test_autocast_reaches_the_kernel_in_bfloat16(attention_type, monkeypatch):
    seen = []
    real = attention_module.hamming_attention

    def spy(query_bits, key_bits, query_weight, key_weight, value, **options):
        seen.append((value.dtype, query_weight.dtype))
        return real(query_bits, key_bits, query_weight, key_weight, value, **options)

    monkeypatch.setattr(attention_module, "hamming_attention", spy)
    model = build(attention_type=attention_type)
    tokens = some_tokens(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens).logits
    assert seen == [(torch.bfloat16, torch.bfloat16)] * 2 and logits.dtype == torch.bfloat16
    tolerance = 0.15 * float(logits.detach().abs().max())
    torch.testing.assert_close(model(tokens).logits, logits.float(), rtol=0, atol=tolerance)
    seen.clear()
    assert model.bfloat16()(tokens).logits.dtype == torch.bfloat16 and seen[0][0] == torch.bfloat16


def test_backends_agree_and_a_missing_one_says_so():
    model = build(grid_size=(4, 4, 5), num_heads=1, embedding_dim=16, value_head_dim=16).eval()
    tokens = some_tokens(model, grid=(4, 4, 5))
    results = {}
    for backend in [name for name in available_backends() if name in ("reference", "cpu")]:
        model.set_attention_backend(backend)
        assert all(block.attn.backend == backend for block in model.blocks)
        results[backend] = model(tokens).logits
    for backend, logits in results.items():
        torch.testing.assert_close(logits, results["reference"], rtol=1e-4, atol=1e-4, msg=backend)
    with pytest.raises(BackendUnavailableError, match="abacus"):
        model.set_attention_backend("abacus")


def test_bernoulli_samples_come_from_the_generator():
    model = build(attention_type="hamming_bernoulli").eval()
    tokens = some_tokens(model)

    def run(seed):
        model.set_attention_generator(torch.Generator().manual_seed(seed))
        return model(tokens).logits

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


def test_save_and_load_gives_the_same_output(tmp_path):
    model = build(position_embedding="axial", mask_granularity="codebook", train_block_sizes=(1, 3)).eval()
    tokens = some_tokens(model)
    model.save_pretrained(tmp_path / "full")
    loaded = BinaryVQTransformer3DModel.from_pretrained(tmp_path / "full")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits) and not loaded.training
    assert loaded.config.mask_granularity == "codebook" and list(loaded.config.train_block_sizes) == [1, 3]
    half = build(position_embedding="axial")
    torch.nn.Module.to(half, torch.float16).save_pretrained(tmp_path / "half")
    assert BinaryVQTransformer3DModel.from_pretrained(tmp_path / "half").dtype == torch.float32


@pytest.mark.parametrize(
    "options, message",
    [
        ({"grid_size": (2, 3)}, "expected three numbers"),
        ({"position_embedding": "rotary"}, "expected 'learned' or 'axial'"),
        ({"mask_granularity": "voxel"}, "expected 'position' or 'codebook'"),
        ({"num_heads": 5}, "hidden_size 24 must be divisible by num_heads 5"),
        ({"attention_type": "softmax", "bit_gradient": "ternary"}, "does not fit attention_type 'softmax'"),
        ({"attention_type": "linear"}, "linear"),
    ],
)
def test_fields_that_do_not_fit(options, message):
    with pytest.raises(Exception, match=message):
        build(**options)


def test_tokens_that_do_not_fit():
    model = build()
    tokens = some_tokens(model)
    with pytest.raises(ValueError, match=r"expected \(batch, 3 codebooks, d, h, w\)"):
        model(tokens[:, :2])
    with pytest.raises(ValueError, match="float32, expected integers from 0 to 5"):
        model(tokens.float())
    for wrong in (6, -1):
        tokens[0, 0, 0, 0, 0] = wrong
        with pytest.raises(ValueError, match="expected 0 to 4, or 5 where masked"):
            model(tokens)
    assert torch.equal(*(model.eval()(some.clamp(0, 5)).logits for some in (tokens, tokens.clamp(0, 5).byte())))


# The loss


def loop_loss(logits, tokens, masked, times, total, factor) -> list[float]:
    losses = []
    for n in range(len(tokens)):
        bits = 0.0
        for index in masked[n].nonzero().tolist():
            codebook, *place = index
            row = logits[(n, codebook, slice(None), *place)].double()
            bits -= float(row.log_softmax(0)[tokens[(n, *index)]]) / math.log(2)
        losses.append(factor(int(times[n]), total) * bits / tokens[n].numel())
    return losses


@pytest.mark.parametrize(
    "weighting, factor",
    [
        ("paper", lambda t, total: 1 - t / total),
        ("bond_taylor", lambda t, total: (total - t + 1) / total),
        ("elbo", lambda t, total: total / t),
    ],
)
def test_loss_equals_the_loop(weighting, factor):
    logits = torch.randn(3, 2, 5, 2, 1, 3, requires_grad=True)
    tokens = torch.randint(5, (3, 2, 2, 1, 3))
    masked = torch.rand(tokens.shape) < 0.5
    masked[1] = False
    times = torch.tensor([1, 4, 8])
    expected = loop_loss(logits.detach(), tokens, masked, times, 8, factor)
    losses = elbo_loss(logits, tokens, masked, times, 8, weighting, "none")
    torch.testing.assert_close(losses, torch.tensor(expected))
    mean = elbo_loss(logits, tokens, masked, times, 8, weighting)
    torch.testing.assert_close(mean, losses.mean())
    mean.backward()
    assert not logits.grad.movedim(2, -1)[~masked].any()
    trained = logits.grad.movedim(2, -1)[masked].abs().sum(-1)
    # At t = T the paper's weight is 0 and nothing is learned.
    assert (trained > 0).sum() == (masked[0].sum() if weighting == "paper" else masked.sum())


def test_loss_of_ignorance_is_the_bits_of_the_codebook():
    tokens = torch.randint(8, (2, 3, 2, 2, 2))
    logits, masked = torch.zeros(2, 3, 8, 2, 2, 2, dtype=torch.bfloat16), torch.ones_like(tokens, dtype=torch.bool)
    assert float(elbo_loss(logits, tokens, masked, torch.tensor([4, 4]), 4, "elbo")) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="expected one of paper, bond_taylor, elbo"):
        elbo_loss(logits, tokens, masked, torch.tensor([4, 4]), 4, "equal")


def test_loss_of_a_hole_is_that_of_the_hole_alone():
    tokens = torch.randint(5, (2, 3, 2, 4, 2))
    logits = torch.randn(2, 3, 5, 2, 4, 2)
    hole = torch.zeros(2, 1, 2, 4, 2, dtype=torch.bool)
    hole[0, :, :, 1:3] = True
    hole[1, :, :, 3:] = True
    masked = (torch.rand(tokens.shape) < 0.5) & hole
    times = torch.tensor([3, 7])
    losses = elbo_loss(logits, tokens, masked, times, 8, "elbo", "none", hole)
    for n, rows in enumerate((slice(1, 3), slice(3, 4))):
        cut = [t[n : n + 1, ..., rows, :] for t in (logits, tokens, masked)]
        torch.testing.assert_close(losses[n : n + 1], elbo_loss(*cut, times[n : n + 1], 8, "elbo", "none"))
