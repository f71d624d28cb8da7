"""The benchmark at toy size: what is compared is equal, what is wrong is not timed, what is written is complete."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer

import attention as benchmark_attention
import check as benchmark_check
import measure as benchmark_measure
from check import exact_attention, tolerance_of
from encoder import image_of
from figures import block_costs, figure_2b
from hf_binaryformer.kernels import unpack_sign_bits
from hf_binaryformer.kernels.cpu_library import LIBRARY
from measure import Result, Subject, extra_bytes, measure_peaks, time_interleaved, with_ratios
from subjects import (
    SCORE_LIMIT,
    SECOND_SET,
    Hamming,
    NumpyBits,
    Sdpa,
    attention_subjects,
    make_inputs,
    numpy_attention,
    plain_numpy_attention,
)

TOKENS = 33
ROW_KEYS = ["name", "tokens", "head_dim", "value_dim", "dtype", "pass", "milliseconds", "ratio_to_sdpa", "peak_bytes"]
TOY = {
    "tokens": str(TOKENS),
    "threads": 1,
    "backend": "reference",
    "rounds": 2,
    "seconds": 0.0,
    "turn": 0.0,
    "encoder_blocks": 1,
    "sampler_blocks": 1,
    "sampler_steps": 1,
    "memory": False,
    "check_tokens": "70",
    "product_tokens": "16,32",
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No rest between turns, and torch's threads as they were."""
    monkeypatch.setattr(benchmark_measure, "REST_SECONDS", 0.0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True, kw_only=True)
class Noted(Subject):
    """Writes down each call, or takes memory."""

    calls: tuple[list[str], ...] = ()
    megabytes: int = 0

    def prepare(self):
        def action():
            for calls in self.calls:
                calls.append(self.name)
            return torch.ones(self.megabytes, 1_000_000, dtype=torch.uint8)

        return action


def noted(name: str, **options) -> Noted:  # type: ignore[no-untyped-def]
    return Noted(**{"name": name, "family": "f", "tokens": 1, "head_dim": 64, "value_dim": 64} | options)


def test_a_record_is_drawn_without_measuring(tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "out.svg"
    record = Path(__file__).parents[2] / "model_cards" / "evidence" / "kernels" / "cpu.json"
    benchmark_attention.main(redraw=record, plot=plot)
    shown = plot.read_text()
    panels = ("attention, 6 heads", "one head", "encoder", "sampler")
    assert all(f"<!-- {text} -->" in shown for text in (*panels, "hamming (cpu), d_v 16", "26.6", "1680 tokens"))
    with pytest.raises(typer.Exit) as ended:
        benchmark_attention.main(redraw=record)
    assert ended.value.exit_code == 2


@pytest.mark.slow
def test_everything_is_measured_and_written(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, plot = tmp_path / "out.json", tmp_path / "out.png"
    benchmark_attention.main(json_path=path, plot=plot, **TOY)
    record = json.loads(path.read_text())
    assert record["threads"] == 1 and record["device"]["cpu"] and record["device"]["cores"] >= 1
    assert record["versions"]["torch"] == torch.__version__
    assert record["backend"] == {
        "name": "reference",
        "report": "available: readable PyTorch, any device, O(N) memory",
    }
    rows = record["rows"]
    assert all(list(row) == ROW_KEYS for row in rows)
    assert len(record["samples"]) == len(rows) and all(len(samples) == 2 for samples in record["samples"])
    assert all(row["milliseconds"] > 0 for row in rows)
    settings = {(row["name"], row["value_dim"], row["dtype"], row["pass"]) for row in rows}
    assert len(settings) == len(rows) - 2, "only the products have one row for each of their own N"
    for dtype in ("float32", "bfloat16"):
        for step in ("forward", "forward_backward"):
            assert {("sdpa", 64, dtype, step), ("sdpa, V padded", 16, dtype, step)} <= settings
            for value_dim in (16, 64):
                assert ("hamming (reference)", value_dim, dtype, step) in settings
                assert ("hamming (reference) + packing", value_dim, dtype, step) in settings
            for name, value_dim in (("softmax (sdpa)", 64), ("hamming", 16), ("sign, ternary", 16)):
                assert (f"encoder, {name}", value_dim, dtype, step) in settings
        assert ("sampler, 1 of 200 steps, hamming", 16, dtype, "forward") in settings
    assert ("hamming (reference), ternary q k", 16, "float32", "forward_backward") in settings
    assert ("numpy bitwise_count, 1 head", 16, "float32", "forward") in settings
    assert {row["head_dim"] for row in rows if "channels / 32" in row["name"]} == {2}
    by_setting = {(r["name"], r["value_dim"], r["dtype"], r["pass"]): r for r in rows if r["tokens"] == TOKENS}
    kernel = by_setting["hamming (reference)", 16, "bfloat16", "forward"]
    sdpa = by_setting["sdpa", 64, "bfloat16", "forward"]
    assert kernel["ratio_to_sdpa"] == pytest.approx(sdpa["milliseconds"] / kernel["milliseconds"], rel=0.02, abs=1e-3)
    assert [row["tokens"] for row in record["figure_6"]] == [16, 32]
    assert {cost["tokens"] for cost in record["figure_2b"]} == {2048, TOKENS}
    assert record["errors"] and all(error["passed"] for error in record["errors"])
    assert plot.stat().st_size > 10_000

    command = shlex.split(record["command"])
    assert command[:2] == ["python", "scripts/benchmarks/attention.py"]
    assert command[command.index("--encoder-blocks") + 1] == "1" and "--no-memory" in command
    assert str(tmp_path) not in record["command"]
    shown = capsys.readouterr().out
    assert "x SDPA" in shown and "hamming (reference), ternary q k + weights" in shown


def test_a_wrong_kernel_is_not_timed(monkeypatch, tmp_path, capsys):
    right = benchmark_check.hamming_attention
    monkeypatch.setattr(benchmark_check, "hamming_attention", lambda *a, **k: 1.0001 * right(*a, **k))
    monkeypatch.setattr(benchmark_attention, "time_interleaved", None)
    with pytest.raises(typer.Exit) as stopped:
        benchmark_attention.main(json_path=tmp_path / "out.json", **TOY)
    assert stopped.value.exit_code == 1
    assert "nothing was timed: output at N = 70, d_v = 16, float32 has error 0.0001" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_backend_that_is_missing(capsys):
    with pytest.raises(typer.Exit) as stopped:
        benchmark_attention.main(**TOY | {"backend": "nothing"})
    assert stopped.value.exit_code == 2
    assert "'nothing' is not available" in capsys.readouterr().err


def test_output_folders_are_looked_at_first(tmp_path, capsys):
    with pytest.raises(typer.Exit) as stopped:
        benchmark_attention.main(json_path=tmp_path / "nowhere" / "out.json", **TOY)
    assert stopped.value.exit_code == 2
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "0", "12,x", "1.5"])
def test_lists_that_are_none(text):
    with pytest.raises(typer.BadParameter, match="expected positive numbers"):
        benchmark_attention.parse_numbers(text)


def test_not_a_number_does_not_pass():
    record = benchmark_check._record("reference", 1, 16, "float32", "output", float("nan"))
    assert not record["passed"]
    assert [tolerance_of("output", d) for d in ("float32", "bfloat16")] == [5e-6, 5e-3]
    assert [tolerance_of("value", d) for d in ("float32", "bfloat16")] == [1e-5, 1e-2]


def test_the_exact_formulas_are_those_of_autograd():
    x = make_inputs(21, 2, 64, 5, torch.float64)
    leaves = [x.query_weight, x.key_weight, x.value]
    for leaf in leaves:
        leaf.requires_grad_()
    signs = [unpack_sign_bits(bits, 64, torch.float64) for bits in (x.query_bits, x.key_bits)]
    scores = (signs[0] * x.query_weight[..., None]) @ (signs[1] * x.key_weight[..., None]).mT / 8
    output = scores.softmax(-1) @ x.value
    grad_output = torch.randn_like(output)
    wanted = [output, *torch.autograd.grad(output, leaves, grad_output)]
    exact = exact_attention(x, grad_output)
    for name, tensor in zip(("output", "query_weight", "key_weight", "value"), wanted, strict=True):
        torch.testing.assert_close(exact[name], tensor, rtol=1e-10, atol=1e-12)
    assert float(exact["largest score"].max()) == pytest.approx(SCORE_LIMIT)


def test_rivals_compute_the_same():
    common = {"family": "f", "tokens": 70, "head_dim": 64, "value_dim": 16}
    padded, unpadded = (Sdpa(name="", padding=p, **common).prepare()() for p in (True, False))
    torch.testing.assert_close(padded, unpadded)
    kernel = Hamming(name="", heads=1, backend="reference", **common).prepare()()
    packed = Hamming(name="", heads=1, backend="reference", packing=True, **common).prepare()()
    for attention in (numpy_attention, plain_numpy_attention):
        counted = NumpyBits(name="", attention=attention, **common).prepare()()
        torch.testing.assert_close(kernel[0, 0], torch.from_numpy(counted).float())
    assert torch.equal(kernel, packed)


@pytest.mark.skipif(LIBRARY is None or SECOND_SET not in LIBRARY.runnable, reason="this processor has no second set")
def test_a_second_instruction_set_runs_and_is_left_again():
    assert LIBRARY is not None
    before = LIBRARY.instruction_set
    subjects = [s for s in attention_subjects(70, "cpu", 0) if SECOND_SET in s.name and s.value_dim == 16]
    assert {(s.dtype, s.step) for s in subjects} == {(d, s) for d in ("float32", "bfloat16") for s in (False, True)}
    forward = next(s for s in subjects if not s.step and s.dtype == "float32")
    expected = Hamming(name="", family="f", tokens=70, head_dim=64, value_dim=16, backend="reference").prepare()()
    torch.testing.assert_close(forward.prepare()(), expected)
    assert LIBRARY.instruction_set == before


def test_the_dense_backward_has_a_limit():
    def dense(limit: int) -> list[str]:
        return [s.pass_name for s in attention_subjects(100, "reference", limit) if s.name == "sdpa, V unpadded"]

    assert dense(100) == ["forward", "forward_backward"] * 2
    assert dense(99) == ["forward"] * 2


def test_rounds_are_interleaved():
    calls: list[str] = []
    results = time_interleaved([noted(n, calls=(calls,)) for n in "abc"], rounds=3, turn_seconds=0, label="")
    assert "".join(calls).endswith("abc" * 3)
    assert [len(result.samples) for result in results] == [3, 3, 3]


def test_rounds_go_on_until_the_wanted_time_has_passed():
    started = time.perf_counter()
    results = time_interleaved([noted("a"), noted("b")], rounds=2, turn_seconds=0, label="", least_seconds=0.2)
    assert 0.2 <= time.perf_counter() - started < 5
    counts = [len(result.samples) for result in results]
    assert counts[0] == counts[1] > 2


def test_short_calls_fill_their_turn(monkeypatch):
    monkeypatch.setattr(Noted, "prepare", lambda self: lambda: time.sleep(0.002))
    started = time.perf_counter()
    (result,) = time_interleaved([noted("a")], rounds=2, turn_seconds=0.02, label="")
    assert time.perf_counter() - started > 0.03
    assert 2 <= result.milliseconds < 15


def test_ratios_stay_within_family_type_and_pass():
    def result(milliseconds: float, **options) -> Result:  # type: ignore[no-untyped-def]
        return Result(noted("", **options), [milliseconds])

    baseline = result(8.0, is_baseline=True, is_float=True)
    kernel = result(2.0, value_dim=16)
    rival, slow_rival = (result(ms, value_dim=16, is_float=True) for ms in (10.0, 12.0))
    strangers = [result(2.0, **o) for o in ({"dtype": "bfloat16"}, {"step": True}, {"tokens": 2}, {"family": "g"})]
    with_ratios([baseline, kernel, rival, slow_rival, *strangers])
    assert (kernel.ratio_to_sdpa, kernel.ratio_to_same_value_dim) == (4.0, 5.0)
    assert rival.ratio_to_sdpa == 0.8
    assert all(s.ratio_to_sdpa is None and s.ratio_to_same_value_dim is None for s in strangers)


def test_peak_memory():
    taken = extra_bytes(noted("", megabytes=200), torch.get_num_threads())
    assert taken is None or taken == pytest.approx(200e6, rel=0.05)


def test_peak_memory_of_a_child():
    common = {"family": "f", "tokens": 64, "head_dim": 64, "value_dim": 16, "backend": "reference"}
    results = [Result(Hamming(name="", step=step, **common), [1.0]) for step in (False, True)]
    measure_peaks(results, threads=1)
    assert results[0].peak_bytes is None
    assert results[1].peak_bytes is None or 0 <= results[1].peak_bytes < 50e6


def test_figure_2b():
    base, hamming = (
        {c.part: c for c in block_costs(name, name == "hamming", value_dim, 6, 2048)}
        for name, value_dim in (("softmax", 64), ("hamming", 16))
    )
    assert base["scores"].macs == base["P V"].macs == 6 * 2048**2 * 384
    assert base["query, key, value"].macs == 6 * 2048 * 384 * 3 * 384
    assert base["MLP"].macs == hamming["MLP"].macs == 6 * 2048 * 8 * 384**2
    assert hamming["scores"].bit_operations == base["scores"].macs
    assert base["P V"].macs == 4 * hamming["P V"].macs
    assert hamming["theta"].macs == 2 * 6 * 2048 * (768 * 192 + 192 * 6)
    parts = [c for name, c in hamming.items() if name != "block"]
    assert max(parts, key=lambda c: c.macs).part == "MLP", "as the paper says"
    assert hamming["block"].macs == sum(c.macs for c in parts)
    assert {c.batch for c in figure_2b(1, 10)} == {1}


@pytest.mark.parametrize(
    ("tokens", "image"), [(1601, (320, 320, True)), (7680, (640, 768, False)), (1, (8, 8, False)), (5, (16, 16, True))]
)
def test_image_that_makes_the_tokens(tokens, image):
    assert image_of(tokens, 8) == image
