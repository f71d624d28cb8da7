"""The product quantiser against loops in float64: assignment, moving averages, start, revival, two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hf_binaryformer.modeling.vq_quantizer import ProductQuantizer, kmeans

ROOT = Path(__file__).parent.parent.parent
BOOKS, SIZE, DIM = 3, 8, 4


def quantizer(**options) -> ProductQuantizer:
    made = ProductQuantizer(BOOKS, SIZE, DIM, **options)
    made.initialized.fill_(True)
    made.cluster_size.fill_(5.0)
    made.cluster_sum.copy_(made.codebook * 5)
    return made


def latents(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, BOOKS * DIM, 2, 3, 1)


def cells(x: torch.Tensor) -> np.ndarray:
    """Vectors (K, N, c) in float64, in the order of the positions."""
    n = x.double().numpy()
    return np.array(
        [
            [n[b, k * DIM : (k + 1) * DIM, i, j, m] for b in range(n.shape[0]) for i, j, m in np.ndindex(n.shape[2:])]
            for k in range(BOOKS)
        ]
    )


def nearest(x: torch.Tensor, codebook: torch.Tensor) -> np.ndarray:
    """Tokens (K, N) by comparing with every entry."""
    book = codebook.double().numpy()
    return np.array([[((book[k] - v) ** 2).sum(1).argmin() for v in vectors] for k, vectors in enumerate(cells(x))])


def test_every_group_takes_the_nearest_entry_of_its_codebook():
    q, x = quantizer().eval(), latents()
    quantized, tokens, commitment = q(x)
    assert tokens.shape == (2, BOOKS, 2, 3, 1) and tokens.dtype == torch.int64
    np.testing.assert_array_equal(tokens.transpose(0, 1).flatten(1).numpy(), nearest(x, q.codebook))
    torch.testing.assert_close(q.decode(tokens), quantized)
    entries = np.array([q.codebook[k].double().numpy()[t] for k, t in enumerate(nearest(x, q.codebook))])
    np.testing.assert_allclose(cells(quantized), entries, rtol=1e-5, atol=1e-6)
    assert commitment.item() == pytest.approx(((cells(x) - entries) ** 2).mean(), rel=1e-5)
    torch.testing.assert_close(q.encode(x), tokens)


def test_gradient_goes_straight_through_and_commitment_pulls_to_the_entry():
    q, x = quantizer(), latents().requires_grad_()
    entries = q.decode(q.encode(x)).detach()
    quantized, _, commitment = q(x)
    weight = torch.randn_like(x)
    (through,) = torch.autograd.grad((quantized * weight).sum(), x, retain_graph=True)
    torch.testing.assert_close(through, weight)
    (pull,) = torch.autograd.grad(commitment, x)
    torch.testing.assert_close(pull, 2 * (x.detach() - entries) / x.numel())


def test_moving_averages():
    q, x = quantizer(ema_decay=0.9, revival_threshold=0.0), latents(4)
    before = {name: buffer.double().numpy().copy() for name, buffer in q.named_buffers()}
    tokens = nearest(x, q.codebook)
    q(x)
    for k in range(BOOKS):
        for v in range(SIZE):
            mine = cells(x)[k][tokens[k] == v]
            size = 0.9 * before["cluster_size"][k, v] + 0.1 * len(mine)
            total = 0.9 * before["cluster_sum"][k, v] + 0.1 * mine.sum(0)
            assert q.cluster_size[k, v].item() == pytest.approx(size, rel=1e-5)
            np.testing.assert_allclose(q.codebook[k, v], total / size, rtol=1e-4, atol=1e-6)
    unused = [(k, v) for k in range(BOOKS) for v in range(SIZE) if v not in tokens[k]]
    assert unused  # and an unused entry stays where it is, instead of running off
    for k, v in unused:
        np.testing.assert_allclose(q.codebook[k, v], before["codebook"][k, v], rtol=1e-5)


def test_nothing_moves_in_evaluation():
    q = ProductQuantizer(BOOKS, SIZE, DIM).eval()
    before = {name: buffer.clone() for name, buffer in q.named_buffers()}
    q(latents())
    assert all(torch.equal(before[name], buffer) for name, buffer in q.named_buffers())


def clustered(count: int) -> torch.Tensor:
    """Latents in SIZE tight clusters for each group."""
    centres = 10 * torch.randn(BOOKS, SIZE, DIM)
    pick = torch.arange(count) % SIZE
    vectors = centres[:, pick] + 0.01 * torch.randn(BOOKS, count, DIM)
    return vectors.permute(0, 2, 1).reshape(1, BOOKS * DIM, count, 1, 1)


def test_kmeans_starts_the_codebooks_with_all_entries_used():
    q = ProductQuantizer(BOOKS, SIZE, DIM)
    _, _, commitment = q(clustered(64))
    assert bool(q.initialized)
    assert commitment.item() < 1e-3
    assert q.usage.tolist() == [1.0] * BOOKS
    np.testing.assert_allclose(q.perplexity, SIZE, rtol=1e-5)


def test_kmeans_with_fewer_vectors_than_centres():
    centres = kmeans(torch.ones(2, 3, DIM), SIZE, 5)
    torch.testing.assert_close(centres, torch.ones(2, SIZE, DIM))


def test_the_start_counts_every_entry_as_if_all_had_equal_shares():
    made = ProductQuantizer(BOOKS, SIZE, DIM)
    x = torch.randn(3, BOOKS * DIM, 4, 3, 2)
    made._start(x)
    # 3 samples of 24 positions, shared by 8 entries.
    assert bool(made.initialized) and torch.equal(made.cluster_size, torch.full((BOOKS, SIZE), 72 / 8))
    torch.testing.assert_close(made.cluster_sum, made.codebook * 9)
    before = made.codebook.clone()
    made._start(x + 5)
    assert torch.equal(made.codebook, before), "only the first batch starts the codebooks"


def test_revived_entries_are_drawn_in_proportion_to_their_squared_error():
    """All but the first two of many entries are dead; a tenth of the error is at 1, the rest at -3, none at 0."""
    size = 4000
    made = ProductQuantizer(1, size, 1)
    made.codebook.fill_(100.0)
    made.codebook[0, :2] = torch.tensor([[0.0], [0.0]])
    made.cluster_size.zero_()
    made.cluster_size[0, :2] = 50.0
    vectors = torch.tensor([0.0] * 500 + [1.0] * 5 + [-3.0] * 5)[None, :, None]
    made._revive(vectors, 1)
    revived = made.codebook[0, 2:, 0]
    shares = {value: float((revived == value).float().mean()) for value in (0.0, 1.0, -3.0)}
    assert shares[0.0] == 0 and shares[1.0] == pytest.approx(0.1, abs=0.02) and sum(shares.values()) == pytest.approx(1)
    fair = 100 / size
    assert torch.equal(made.cluster_size[0, 2:], torch.full((size - 2,), fair))
    torch.testing.assert_close(made.cluster_sum[0, 2:, 0], revived * fair)
    assert made.codebook[0, :2].eq(0).all() and made.cluster_size[0, :2].eq(50).all()


def test_entries_are_revived_where_no_latent_has_an_error():
    made = ProductQuantizer(1, 3, 1)
    made.codebook.copy_(torch.tensor([[[0.0], [7.0], [8.0]]]))
    made.cluster_size.copy_(torch.tensor([[9.0, 0.0, 0.0]]))
    made._revive(torch.zeros(1, 4, 1), 1)
    assert made.codebook.eq(0).all() and made.cluster_size.eq(torch.tensor([[9.0, 3.0, 3.0]])).all()


def test_dead_entries_come_back_with_fresh_statistics():
    q, x = quantizer(revival_threshold=0.1), clustered(64)
    q.codebook[:, 1:] = 1e3  # one entry near the data, all others out of reach and as good as unused
    q.cluster_size[:, 1:] = 1e-3
    q.cluster_sum.copy_(q.codebook * q.cluster_size[..., None])
    for _ in range(40):
        q(x)
    assert q.codebook.abs().max() < 100
    q.reset_usage()
    _, _, commitment = q(x)
    assert (q.usage > 0.8).all() and commitment < 0.2 * x.var(), (q.usage, commitment)
    settled = quantizer(revival_threshold=0.0)
    settled.codebook[:, 1:] = 1e3
    settled.ema_decay = 0.5
    settled.cluster_sum.copy_(settled.codebook * settled.cluster_size[..., None])
    for _ in range(60):
        settled(x)
    # Without revival they stay dead, and where they are: their averages are long below any precision.
    assert settled.usage.max() == 1 / SIZE
    torch.testing.assert_close(settled.codebook[:, 1:], torch.full((BOOKS, SIZE - 1, DIM), 1e3), rtol=1e-3, atol=0)


def test_no_collapse_where_half_of_all_latents_are_alike():
    # The classic update ends here with few entries: background is half of every volume.
    q = ProductQuantizer(BOOKS, SIZE, DIM, ema_decay=0.9)
    for _ in range(30):
        x = torch.randn(4, BOOKS * DIM, 4, 4, 4)
        x[:, :, :2] = 0.3
        q.reset_usage()
        q(x)
    assert q.usage.tolist() == [1.0] * BOOKS


def test_usage_and_perplexity_count_an_epoch():
    q = quantizer(ema_decay=0.99, revival_threshold=0.0)
    q.codebook.zero_()
    q.codebook[:, 1] = 5.0
    q.codebook[:, 2:] = -100.0
    q.cluster_sum.copy_(q.codebook * q.cluster_size[..., None])
    x = torch.zeros(1, BOOKS * DIM, 4, 1, 1)
    q(x)
    assert q.usage.tolist() == [1 / SIZE] * BOOKS and q.perplexity.tolist() == [1.0] * BOOKS
    x[:, :, 3] = 5.0
    q(x)
    # Seven tokens of one entry, one of another.
    expected = np.exp(-(7 / 8 * np.log(7 / 8) + 1 / 8 * np.log(1 / 8)))
    np.testing.assert_allclose(q.perplexity, expected, rtol=1e-5)
    assert q.usage.tolist() == [2 / SIZE] * BOOKS
    q.reset_usage()
    assert q.usage.tolist() == [0.0] * BOOKS


def test_codebooks_stay_float32_in_half_precision_and_autocast():
    q, x = quantizer(), latents()
    entries = q.codebook.clone()
    q.to(torch.bfloat16)
    assert all(b.dtype == torch.float32 for name, b in q.named_buffers() if name != "initialized")
    assert torch.equal(q.codebook, entries)
    expected = q.encode(x.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        quantized, tokens, _ = q(x.bfloat16())
    assert quantized.dtype == torch.float32
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        (torch.zeros(1, BOOKS + 1, 1, 1, 1, dtype=torch.long), "expected \\(batch, 3, d, h, w\\)"),
        (torch.zeros(1, BOOKS, 1, 1, dtype=torch.long), "expected \\(batch, 3, d, h, w\\)"),
        (torch.full((1, BOOKS, 1, 1, 1), SIZE), "range from 8 to 8, expected 0 to 7: replace mask tokens"),
        (torch.full((1, BOOKS, 1, 1, 1), -1), "range from -1"),
    ],
)
def test_tokens_that_cannot_be_decoded(tokens, match):
    with pytest.raises(ValueError, match=match):
        quantizer().decode(tokens)


@pytest.mark.parametrize("options", [{"ema_decay": 1.0}, {"revival_threshold": 1.0}, {"ema_decay": -0.1}])
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is .*, expected at least 0 and below 1"):
        ProductQuantizer(BOOKS, SIZE, DIM, **options)


PROCESS = """
import sys, torch, torch.distributed as dist
from safetensors.torch import save_file
from hf_binaryformer.modeling.vq_quantizer import ProductQuantizer

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
x = torch.randn(4, 12, 2, 2, 2)
q = ProductQuantizer(3, 8, 4, revival_threshold=0.0)
q.initialized.fill_(True)
q(x[rank::2])
averages = {"averages": q.codebook.clone(), "perplexity": q.perplexity}
torch.manual_seed(rank)  # from here on the processes draw different numbers, and the main one's count
q = ProductQuantizer(3, 8, 4, revival_threshold=0.9, ema_decay=0.5)
q(x[rank::2])
started = q.codebook.clone()
for step in range(5):
    torch.manual_seed(10 * step + rank)
    q(x[rank::2] * (step + 2))
save_file({**averages, "started": started, "revived": q.codebook}, f"{sys.argv[1]}/{rank}.safetensors")
dist.destroy_process_group()
"""


def test_two_processes_hold_what_one_would(tmp_path):
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, script, tmp_path], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)

    torch.manual_seed(0)
    x = torch.randn(4, 12, 2, 2, 2)
    q = ProductQuantizer(3, 8, 4, revival_threshold=0.0)
    q.initialized.fill_(True)
    q(x)
    torch.testing.assert_close(first["averages"], q.codebook)
    torch.testing.assert_close(first["perplexity"], q.perplexity)
    torch.manual_seed(0)
    q = ProductQuantizer(3, 8, 4, revival_threshold=0.9, ema_decay=0.5)
    q(x)
    torch.testing.assert_close(first["started"], q.codebook)
    for step in range(5):
        torch.manual_seed(10 * step)
        q(x * (step + 2))
    torch.testing.assert_close(first["revived"], q.codebook)
