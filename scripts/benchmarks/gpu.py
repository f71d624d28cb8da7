"""python scripts/benchmarks/gpu.py --json gpu.json --table gpu.md [--quick]: 1-bit attention on a GPU, in eight minutes

First the tests of the kernels on this device, then each kind of problem against the reference; nothing is timed if one of
them fails. Then, interleaved, with torch's flash and cuDNN attention in bfloat16 (d_v = d) as the measure: the operator with
packed bits, with packing, and with balancing and packing; forward and both passes; and peak memory. At the end the ViT-S/8
encoder, a training step of the segmentation network, and steps of the 3D sampler. ``--quick`` takes two minutes.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer
from torch import Tensor

from encoder import VARIANTS as ENCODERS
from encoder import Encoder
from hf_binaryformer import __version__
from hf_binaryformer.kernels import backend_report, hamming_attention
from hf_binaryformer.kernels.balance import balance
from hf_binaryformer.kernels.self_check import TOLERANCES, difference
from hf_binaryformer.kernels.triton import run_backward, run_forward
from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from measure import DTYPES, Result, Subject, one_pass, time_interleaved
from sampler import sampler_subjects
from subjects import HEADS, SEED, Hamming, Sdpa, make_inputs
from training_step import subjects as training_subjects

ROOT = Path(__file__).parents[2]
SIZES = ((64, 16), (64, 64), (128, 128), (256, 64))
TOKENS = (1601, 4096, 16384, 65536)
BASELINES = ("FLASH_ATTENTION", "CUDNN_ATTENTION")
GRADIENTS = ("none", "ste", "ternary")
SAMPLER_STEPS = 200


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
    """Encoder, training step and sampler in bfloat16."""
    config = BinaryFormerConfig()
    encoders: list[Subject] = [
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
    samplers = [replace(one, device=device) for one in sampler_subjects("triton", 12, steps) if one.dtype == "bfloat16"]
    return [*encoders, *training_subjects("amos", 2, device), *samplers]


def run_tests() -> None:
    """The tests of the kernels on this device.

    Raises:
        typer.Exit: one fails.
    """
    words = [sys.executable, "-m", "pytest", "-q", "tests/kernels", "-k", "triton", "-x"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    typer.echo(done.stdout[-2000:])
    if done.returncode:
        raise typer.Exit(done.returncode)


def check(device: str) -> list[dict[str, Any]]:
    """Each kind of problem against the reference.

    Raises:
        typer.Exit: they disagree.
    """
    rows = []
    kinds = itertools.product(SIZES, GRADIENTS, TOLERANCES, (False, True))
    for (head_dim, value_dim), gradient, dtype, masked in kinds:
        kind: dict[str, Any] = {
            "head_dim": head_dim,
            "value_dim": value_dim,
            "bit_gradient": gradient,
            "masked": masked,
        }
        found = difference(run_forward, run_backward, planes=1, dtype=dtype, device=torch.device(device), **kind)
        rows.append({**kind, "dtype": str(dtype).removeprefix("torch."), "passed": found is None})
        if found is not None:
            typer.echo(f"not timed: with {rows[-1]}, {found}")
            raise typer.Exit(1)
    return rows


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


def measure(subjects: list[Subject], label: str, rounds: int, turn_seconds: float) -> list[Result]:
    """Time and memory; a subject that cannot run here (no flash kernel for a size) is left out with a note."""
    able = []
    for subject in subjects:
        try:
            subject.prepare()()
            able.append(subject)
        except RuntimeError as error:
            typer.echo(f"left out: {subject.name}, N = {subject.tokens}: {str(error).splitlines()[0]}")
    results = time_interleaved(able, rounds, turn_seconds, label)
    for result in results:
        result.peak_bytes = peak_bytes(result.subject)
    return results


def table(results: list[Result]) -> str:
    """Markdown; the ratio is to the fastest float attention with d_v = d."""
    lines = [
        "| what | N | d | d_v | pass | ms | times as fast as SDPA | MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        s = result.subject
        memory = "" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:.0f}"
        ratio = "" if result.ratio_to_sdpa is None else f"{result.ratio_to_sdpa:.2f}"
        name = f"{s.family.split(',')[0]}: {s.name}"
        cells = (name, s.tokens, s.head_dim, s.value_dim, s.pass_name, f"{result.milliseconds:.3f}", ratio, memory)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="Write every figure here.")] = None,
    table_path: Annotated[Path | None, typer.Option("--table", help="Write a Markdown table here.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two sizes and lengths, few rounds.")] = False,
) -> None:
    """Test, check, time."""
    if not torch.cuda.is_available():
        typer.echo(f"no GPU: {backend_report()['triton']}", err=True)
        raise typer.Exit(2)
    device = "cuda"
    run_tests()
    checked = check(device)
    rounds, turn = (3, 0.02) if quick else (7, 0.1)
    results: list[Result] = []
    for (head_dim, value_dim), tokens in itertools.product(
        SIZES[: 2 if quick else None], TOKENS[: 2 if quick else None]
    ):
        subjects = list(attention(tokens, head_dim, value_dim, device))
        results += measure(subjects, f"N = {tokens}, d = {head_dim}", rounds, turn)
    results += measure(models(device, 20 if quick else SAMPLER_STEPS), "models", min(rounds, 3), 0.0)
    text = table(results)
    typer.echo(text)
    record = {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "hf_binaryformer": __version__},
        "command": f"python scripts/benchmarks/gpu.py{' --quick' if quick else ''}",
        "checked": checked,
        "rows": [result.row() for result in results],
        "samples": [[round(ms, 5) for ms in result.samples] for result in results],
    }
    if json_path is not None:
        json_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if table_path is not None:
        table_path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
