"""python scripts/benchmarks/balance.py --json balance.json: what balanced bits cost, alone and in a network

Three ways side by side in one process: without balance (signs are packed, no more), with the compiled pass of
``hf_binaryformer.kernels.balance``, and with the formula in PyTorch. Rows are the pass alone on queries of ViT-S/8, and the
encoder of ViT-S/8 with sign bits and the ternary gradient. Nothing is timed if the compiled pass disagrees with the formula in
float64.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from encoder import Encoder
from hf_binaryformer import __version__
from hf_binaryformer.kernels import backends, pack_sign_bits
from hf_binaryformer.kernels.balance import EPSILON, balance
from hf_binaryformer.modeling.configuration import BinaryFormerConfig
from measure import DTYPES, Result, Subject, describe_device, time_interleaved
from subjects import SEED

WAYS = ("without", "compiled", "formula")
WINDOW = 1.0
# Of output and gradient, relative to the largest number.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def without_compiled_pass(action: Callable[[], object]) -> Callable[[], object]:
    """The same, with the formula in PyTorch in place of the compiled pass."""

    def run() -> object:
        before = backends.get_backend("cpu")
        backends.register_backend(replace(before, balance=None, balance_backward=None))
        try:
            return action()
        finally:
            backends.register_backend(before)

    return run


def queries(tokens: int, dtype: str) -> Tensor:
    """Queries (1, 6, N, 64) as a projection of all heads lays them out."""
    torch.manual_seed(SEED)
    return torch.randn(1, tokens, 3 * 384).to(DTYPES[dtype])[..., :384].unflatten(-1, (6, 64)).transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class Pass(Subject):
    """Queries to bits, and the gradient back to them."""

    way: str

    def prepare(self) -> Callable[[], object]:
        """Forward, or forward and backward."""
        x = queries(self.tokens, self.dtype).requires_grad_(self.step)
        cotangent = torch.randn(x.shape).to(x.dtype)

        def action() -> object:
            if self.way == "without":
                bits = pack_sign_bits(x)
                # What the operator does on the way back.
                return torch.ops.aten.hardtanh_backward(cotangent, x, -WINDOW, WINDOW) if self.step else bits
            y, bits = balance(x, window=WINDOW)
            return torch.autograd.grad(y, x, cotangent) if self.step else bits

        return without_compiled_pass(action) if self.way == "formula" else action


@dataclass(frozen=True, kw_only=True)
class BalancedEncoder(Encoder):
    """The encoder with sign bits, balanced or not."""

    way: str

    def fields(self) -> dict[str, Any]:
        """Those of the balance."""
        return {} if self.way == "without" else {"query_key_centering": "tokens", "query_key_norm": "rms"}

    def prepare(self) -> Callable[[], object]:
        """As the encoder's."""
        action = super().prepare()
        return without_compiled_pass(action) if self.way == "formula" else action


def check(tokens: int, dtype: str) -> dict[str, Any]:
    """Errors of the compiled pass against the formula in float64, relative to the largest number."""
    x = queries(tokens, dtype).requires_grad_()
    cotangent = torch.randn(x.shape).to(x.dtype)
    y, _ = balance(x, window=WINDOW)
    exact = x.detach().double().requires_grad_()
    centred = exact - exact.mean(2, keepdim=True)
    wanted = centred / (centred.square().mean(-1, keepdim=True) + EPSILON).sqrt()
    inside = cotangent.double() * (y.detach().double().abs() <= WINDOW)
    (got,), (grad,) = torch.autograd.grad(y, x, cotangent), torch.autograd.grad(wanted, exact, inside)
    errors = {
        name: float((one.detach().double() - other.detach()).abs().max() / other.detach().abs().max())
        for name, one, other in (("output", y, wanted), ("gradient", got, grad))
    }
    return {"tokens": tokens, "dtype": dtype, "tolerance": TOLERANCE[dtype], **errors}


def subjects_of(tokens: int, dtype: str, blocks: int, backend: str) -> list[list[Subject]]:
    """Groups that are timed together: the pass and the encoder, forward and both ways."""
    config = BinaryFormerConfig()
    sizes: dict[str, Any] = {"tokens": tokens, "head_dim": config.head_dim, "dtype": dtype}
    groups: list[list[Subject]] = []
    for step in (False, True):
        groups.append([Pass(name=way, family="pass", value_dim=None, step=step, way=way, **sizes) for way in WAYS])
    for step in (False, True):
        own: dict[str, Any] = {
            "attention_type": "sign",
            "bit_gradient": "ternary",
            "backend": backend,
            "blocks": blocks,
        }
        groups.append(
            [
                BalancedEncoder(
                    name=way, family="encoder", value_dim=config.value_head_dim, step=step, way=way, **own, **sizes
                )
                for way in WAYS
            ]
        )
    return groups


def row(result: Result, without: Result) -> dict[str, Any]:
    """A row of the record; ``to_without`` is the median over rounds of the time's ratio to that without balance.

    Both times of a ratio are neighbours in time, so that slow phases of a shared machine cancel.
    """
    ratio = statistics.median(mine / theirs for mine, theirs in zip(result.samples, without.samples, strict=True))
    spread = (max(result.samples) - min(result.samples)) / result.milliseconds
    return {**result.row(), "family": result.subject.family, "to_without": round(ratio, 3), "spread": round(spread, 3)}


def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="Write every figure here.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Sequence length N.")] = 1601,
    dtypes: Annotated[str, typer.Option(help="float32,bfloat16")] = "float32,bfloat16",
    blocks: Annotated[int, typer.Option(min=1, help="Of the encoder; ViT-S/8 has 12.")] = 12,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each; the median counts.")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch; default: as many as torch takes.")] = None,
) -> None:
    """Correctness, then what balanced bits cost."""
    torch.set_num_threads(threads or torch.get_num_threads())
    names, device, backend = dtypes.split(","), describe_device(), backends.select_backend(None, "cpu").name
    errors = [check(n, dtype) for dtype in names for n in (33, tokens)]
    wrong = [e for e in errors if not max(e["output"], e["gradient"]) <= e["tolerance"]]
    if wrong or not math.isfinite(sum(e["gradient"] for e in errors)):
        typer.echo(f"Error: the compiled pass disagrees with the formula, nothing was timed: {wrong}", err=True)
        raise typer.Exit(1)
    rows = []
    for dtype in names:
        for group in subjects_of(tokens, dtype, blocks, backend):
            results = time_interleaved(group, rounds, 0.02, f"{group[0].family}, {dtype}")
            rows += [row(result, results[0]) for result in results]
    options = f"--tokens {tokens} --dtypes {dtypes} --blocks {blocks} --rounds {rounds}"
    record = {
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "hf_binaryformer": __version__},
        "backend": backends.backend_report()[backend],
        "command": f"python scripts/benchmarks/balance.py {options}",
        "errors": errors,
        "rows": rows,
    }
    for one in rows:
        Console().print(
            f"{one['family']:<8} {one['dtype']:<9} {one['pass']:<17} {one['name']:<9} {one['milliseconds']:9.3f} ms  "
            f"{one['to_without']:.3f} of the time without",
            highlight=False,
            soft_wrap=True,
        )
    if json_path is not None:
        json_path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
