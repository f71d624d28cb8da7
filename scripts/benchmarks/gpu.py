"""python scripts/benchmarks/gpu.py [--out FOLDER] [--quick]: 1-bit attention on a GPU, in eight minutes

First the tests of the kernels on this device, and each kind of problem against the reference. Then, interleaved, with torch's
flash and cuDNN attention in bfloat16 (d_v = d) as the measure: the operator with packed bits, with packing, and with
balancing and packing; forward and both passes; and peak memory. Then the ViT-S/8 encoder, a training step of the
segmentation network, and steps of the 3D sampler. ``--quick`` takes two minutes.

Nothing is timed whose result was not compared with the reference at that very size; what differs, fails or finds no time any
more is left out and named. ``gpu.json``, ``gpu.md`` and, with matplotlib, ``gpu.png`` are written anew after each group.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer
from torch import Tensor

from encoder import VARIANTS as ENCODERS
from encoder import Encoder
from figures import draw_plot
from hf_binaryformer import __version__
from hf_binaryformer.kernels import backend_report, hamming_attention, self_check, triton_balance
from hf_binaryformer.kernels.balance import balance, reference_balance, reference_balance_backward
from hf_binaryformer.kernels.self_check import TOLERANCES, BalanceKind, Kind
from hf_binaryformer.kernels.triton import run_backward, run_forward
from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from measure import DTYPES, Result, Subject, one_pass, time_interleaved
from subjects import HEADS, SEED, Hamming, Sdpa, make_inputs

ROOT = Path(__file__).parents[2]
OUT = ROOT / "model_cards" / "evidence" / "kernels"
# Sizes d and d_v, and lengths N; the first size is the paper's, and has one length more.
SIZES = ((64, 16), (64, 64), (128, 128), (256, 64))
TOKENS = (1601, 4096, 16384, 65536)
MORE_TOKENS = 8192
BASELINES = ("FLASH_ATTENTION", "CUDNN_ATTENTION")
GRADIENTS = ("none", "ste", "ternary")
SAMPLER_STEPS = 200
# Queries whose output and gradients are compared with the reference at the size that is timed.
ROWS = 256
TESTS = ("triton_on_gpu", "hamming_attention", "hamming_operator", "key_mask", "operator_inputs")
TEST_SECONDS = 120
WORKERS = 12


@dataclass(frozen=True, kw_only=True)
class Balanced(Subject):
    """Sign bits of balanced queries and keys, with the ternary gradient, from real numbers to real numbers."""

    def prepare(self) -> Callable[[], object]:
        """Centring, norm, packing, attention."""
        assert self.value_dim is not None
        x = make_inputs(self.tokens, HEADS, self.head_dim, self.value_dim, DTYPES[self.dtype], self.device)
        ones = torch.ones_like(x.query_weight, dtype=torch.float32)

        def forward() -> Tensor:
            (query, query_bits), (key, key_bits) = (balance(real, window=1.0) for real in (x.query, x.key))
            options: dict[str, Any] = {
                "bit_gradient": "ternary",
                "window": None,
                "seed": SEED,
                "head_dim": self.head_dim,
            }
            return hamming_attention(query_bits, key_bits, ones, ones, x.value, query=query, key=key, **options)

        return one_pass(forward, [x.query, x.key, x.value], self.step)


def attention(tokens: int, head_dim: int, value_dim: int, device: str) -> Iterator[Subject]:
    """All contestants at one size, forward and both passes."""
    for step in (False, True):
        common: dict[str, Any] = {"family": f"attention, d {head_dim}", "tokens": tokens, "head_dim": head_dim}
        common |= {"dtype": "bfloat16", "step": step, "device": device}
        for kernel in BASELINES:
            whole: dict[str, Any] = {"value_dim": head_dim, "is_baseline": True, "is_float": True, "kernel": kernel}
            yield Sdpa(name=f"sdpa, {kernel.split('_')[0].lower()}", **whole, **common)
        triton_kernel: dict[str, Any] = {"backend": "triton", "value_dim": value_dim, **common}
        yield Hamming(name="hamming", **triton_kernel)
        yield Hamming(name="hamming + packing", packing=True, **triton_kernel)
        if step:
            bits = ("value", "query", "key")
            yield Hamming(
                name="sign, ternary + packing", packing=True, bit_gradient="ternary", leaves=bits, **triton_kernel
            )
        yield Balanced(name="sign, ternary, balanced", value_dim=value_dim, **common)


def models(device: str, steps: int) -> list[Subject]:
    """Encoder, training step and sampler in bfloat16; those whose packages are missing are left out with a note."""
    config = BinaryFormerConfig()
    found: list[Subject] = [
        Encoder(
            name=f"encoder, {name}",
            family="encoder",
            tokens=1601,
            head_dim=config.head_dim,
            value_dim=config.value_head_dim if reduced else config.head_dim,
            dtype="bfloat16",
            step=step,
            is_baseline=kind == "softmax",
            is_float=kind == "softmax",
            attention_type=kind,
            bit_gradient=gradient,
            backend="triton",
            blocks=config.num_hidden_layers,
            device=device,
        )
        for step in (False, True)
        for name, kind, gradient, reduced in ENCODERS
    ]
    try:
        from training_step import subjects

        found += [replace(one, name=f"training step, {one.name}") for one in subjects("amos", 2, device)]
        from sampler import sampler_subjects

        found += [
            replace(one, device=device) for one in sampler_subjects("triton", 12, steps) if one.dtype == "bfloat16"
        ]
    except ImportError as error:
        typer.echo(f"left out: training step or sampler: {error}")
    return found


def run_tests() -> dict[str, Any]:
    """The tests of the kernels on this device: whether they passed, and the end of what they printed."""
    files = [f"tests/kernels/test_{name}.py" for name in TESTS]
    words = [sys.executable, "-m", "pytest", "-q", "-k", "triton and not reference", "-W", "default", *files]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    try:
        done = subprocess.run(
            words, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=TEST_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {"passed": False, "said": f"not finished after {TEST_SECONDS} s"}
    return {"passed": done.returncode == 0, "said": (done.stdout + done.stderr)[-2000:]}


def kinds(device: str, sizes: Iterable[tuple[int, int]]) -> Iterator[Kind | BalanceKind]:
    """What the kernels are compiled for, in bfloat16; the first size in all other ways too."""
    where = torch.device(device)
    for place, (head_dim, value_dim) in enumerate(sizes):
        for gradient in GRADIENTS:
            one = Kind(where, head_dim, value_dim, 1, torch.bfloat16, gradient, True, False)
            yield one
            if not place:
                yield from (replace(one, dtype=dtype) for dtype in TOLERANCES if dtype != one.dtype)
                yield from (replace(one, masked=True), replace(one, weight_gradient=False))
                if gradient == "none":  # two planes learn by their weights alone
                    yield replace(one, planes=2)
        yield BalanceKind(where, torch.bfloat16, head_dim, True, True)


def check_kind(kind: Kind | BalanceKind) -> str | None:
    """Where a kind of problem differs from the reference on a small one, or why it cannot run; None if it agrees."""
    try:
        if isinstance(kind, BalanceKind):
            ways = triton_balance.run_balance, triton_balance.run_balance_backward
            formulas = reference_balance, reference_balance_backward
            return self_check.balance_difference(*ways, formulas, kind)
        return self_check.difference(run_forward, run_backward, kind)
    except Exception as error:  # the compiler's and the driver's errors have no common class
        return f"{type(error).__name__}: {error}"


def check(wanted: Iterable[Kind | BalanceKind], workers: int) -> list[dict[str, Any]]:
    """Each kind of problem against the reference; the processes leave what they compiled in Triton's cache."""
    asked = list(wanted)
    if workers == 1:
        found = [check_kind(kind) for kind in asked]
    else:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(check_kind, asked))
    return [
        {**{k: str(v).removeprefix("torch.") if k in ("dtype", "device") else v for k, v in asdict(kind).items()}}
        | {"differs": difference}
        for kind, difference in zip(asked, found, strict=True)
    ]


def verify(tokens: int, head_dim: int, value_dim: int, device: str) -> str | None:
    """Where the operator differs from the reference at a size that is to be timed, in its first ROWS queries; None: nowhere.

    Gradients are those of a loss that reads these queries alone, so that the reference need not compute the others.
    """
    x = make_inputs(tokens, HEADS, head_dim, value_dim, DTYPES["bfloat16"], device)
    names = ("query_weight", "key_weight", "value", "query", "key")
    grad = torch.randn(1, HEADS, min(ROWS, tokens), value_dim, device=device).to(x.value.dtype)
    for gradient in ("none", "ternary"):
        results = []
        for backend, last in (("triton", None), ("reference", ROWS)):
            part = {name: getattr(x, name).detach() for name in (*names, "query_bits", "key_bits")}
            part |= {name: part[name][:, :, :last] for name in ("query_weight", "query", "query_bits")}
            leaves = [part[name].requires_grad_() for name in (names if gradient == "ternary" else names[:3])]
            output = hamming_attention(**part, head_dim=head_dim, bit_gradient=gradient, seed=SEED, backend=backend)
            output = output[:, :, :ROWS]
            results.append((output.detach(), *torch.autograd.grad(output, leaves, grad)))
        close, drawn = TOLERANCES[torch.bfloat16]
        for name, found, expected in zip(("output", *names), *results, strict=False):
            found = found[:, :, : expected.shape[2]].float()
            error = float((found - expected.float()).norm() / expected.float().norm())
            if not error <= (drawn if gradient == "ternary" and name in ("query", "key") else close):
                return f"{name} with the gradient '{gradient}' is off by {error:.2g} of its size"
    return None


def peak_bytes(subject: Subject) -> int:
    """Memory of one call beyond its inputs."""
    action = subject.prepare()
    action()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@dataclass
class Record:
    """What was found so far, written after each group."""

    out: Path
    command: str
    checked: list[dict[str, Any]]
    tests: dict[str, Any]
    until: float
    results: list[Result] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, label: str, subjects: list[Subject], rounds: int, turn_seconds: float) -> None:
        """Verify, time, measure memory, write."""
        if time.monotonic() > self.until:
            return self.leave(f"{label}: no time left")
        device = subjects[0].device
        refused: dict[tuple[int, int, int], str | None] = {}
        able = []
        for subject in subjects:
            try:
                if not subject.is_float:
                    assert subject.value_dim is not None
                    size = subject.tokens, subject.head_dim, subject.value_dim
                    if size not in refused:
                        refused[size] = verify(*size, device)
                    if refused[size] is not None:
                        raise ArithmeticError(refused[size])
                # A fall-back to the reference warns, and would be timed under the kernel's name.
                with warnings.catch_warnings():
                    warnings.simplefilter("error", RuntimeWarning)
                    subject.prepare()()
                able.append(subject)
            except Exception as error:  # the compiler's and the driver's errors have no common class
                self.leave(f"{label}: {subject.name}, {subject.pass_name}: {str(error).splitlines()[0]}")
        found = time_interleaved(able, rounds, turn_seconds, label)
        for result in found:
            result.peak_bytes = peak_bytes(result.subject)
        self.results += found
        return self.write()

    def leave(self, what: str) -> None:
        """Note what is not timed, and why."""
        typer.echo(f"left out: {what}")
        self.left_out.append(what)

    def content(self) -> dict[str, Any]:
        """The JSON."""
        return {
            "device": {"cpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"},
            "versions": {"torch": torch.__version__, "triton": triton.__version__, "hf_binaryformer": __version__},
            "command": self.command,
            "tests": self.tests,
            "checked": self.checked,
            "left_out": self.left_out,
            "rows": [result.row() for result in self.results],
            "samples": [[round(ms, 5) for ms in result.samples] for result in self.results],
        }

    def table(self) -> str:
        """Markdown; the ratio is to the fastest float attention with d_v = d."""
        lines = [
            "| what | N | d | d_v | pass | ms | times as fast as SDPA | MiB |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for result in self.results:
            s = result.subject
            memory = "" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:.0f}"
            ratio = "" if result.ratio_to_sdpa is None else f"{result.ratio_to_sdpa:.2f}"
            cells = (
                s.name,
                s.tokens,
                s.head_dim,
                s.value_dim,
                s.pass_name,
                f"{result.milliseconds:.3f}",
                ratio,
                memory,
            )
            lines.append(f"| {' | '.join(map(str, cells))} |")
        return "\n".join(lines) + "\n"

    def write(self) -> None:
        """All files anew."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "gpu.json").write_text(json.dumps(self.content(), indent=1) + "\n", encoding="utf-8")
        (self.out / "gpu.md").write_text(self.table(), encoding="utf-8")
        if not any(result.ratio_to_sdpa for result in self.results):
            return
        try:
            draw_plot(self.out / "gpu.png", self.content())
        except ImportError as error:
            typer.echo(f"no picture: {error}")


def main(
    out: Annotated[Path, typer.Option(help="Folder of gpu.json, gpu.md and gpu.png.")] = OUT,
    quick: Annotated[bool, typer.Option("--quick", help="Two sizes and lengths, few rounds.")] = False,
    minutes: Annotated[float, typer.Option(min=0, help="No new group is begun after so many minutes.")] = 7,
) -> None:
    """Test, check, time."""
    if not torch.cuda.is_available():
        typer.echo(f"no GPU: {backend_report()['triton']}", err=True)
        raise typer.Exit(2)
    until = time.monotonic() + 60 * minutes
    device = "cuda"
    sizes, lengths = (SIZES[:2], TOKENS[:2]) if quick else (SIZES, TOKENS)
    checked = check(kinds(device, sizes), WORKERS)
    tests = run_tests()
    typer.echo(tests["said"])
    for row in checked:
        if row["differs"]:
            typer.echo(f"differs from the reference: {row}")
    record = Record(out, f"python scripts/benchmarks/gpu.py{' --quick' if quick else ''}", checked, tests, until)
    rounds, turn = (3, 0.02) if quick else (5, 0.04)
    groups = list(itertools.product(sizes, lengths))
    if not quick:
        groups.insert(2, (SIZES[0], MORE_TOKENS))
    for place, ((head_dim, value_dim), tokens) in enumerate(groups):
        label = f"N = {tokens}, d = {head_dim}, d_v = {value_dim}"
        record.add(label, list(attention(tokens, head_dim, value_dim, device)), rounds, turn)
        if groups[place + 1 : place + 2] and groups[place + 1][0] != SIZES[0] and (head_dim, value_dim) == SIZES[0]:
            record.add("models", models(device, 20 if quick else SAMPLER_STEPS), min(rounds, 3), 0.0)
    typer.echo(record.table())


if __name__ == "__main__":
    typer.run(main)
