"""python scripts/benchmarks/cost_model.py --record model_cards/evidence/kernels/cost_model.json

A cost model of the Triton kernels, derived and not measured: counts the machine instructions of the inner loop that the
compiler made, and divides them by what each unit of a GPU takes in a clock. The slowest unit is the bound.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import triton
import typer

import assembly
from hf_binaryformer.commands.outputs import write_json
from hf_binaryformer.kernels.triton_tiles import Sizes

# Machine instructions by the unit that executes them; addresses, loads and control flow are only issued.
UNITS = {
    "fma": ("FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2"),
    "alu": ("LOP3", "IADD3", "VIADD", "SEL", "FSEL", "SHF", "PRMT", "FMNMX", "FSETP", "ISETP", "LEA", "F2FP", "MOV", "IMAD"),
    "convert": ("I2FP", "I2F", "F2I", "F2F"),
    "exponential": ("MUFU",),
    "memory": ("LDS", "LDSM", "STS", "LDG", "LDGSTS", "STG", "SHFL"),
}  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    """What one multiprocessor does in a clock.

    Rates of instructions: CUDA C++ Programming Guide, table of arithmetic throughput, in lanes, divided by 32. Products:
    peak rates of the data sheets, divided by multiprocessors and boost clock.

    Args:
        target: of :mod:`assembly`.
        rates: instructions of a warp for each unit of ``UNITS``; "issue" is all together.
        int8, half: multiply-adds of matrix units, of int8 and of 16-bit numbers.
        processors: number of multiprocessors.
        clock: boost clock in GHz.
    """

    target: str
    rates: dict[str, float]
    int8: int
    half: int
    processors: int
    clock: float


GPUS = {
    "H100 / H200 (SXM)": Gpu(
        "sm_90",
        {"fma": 4, "alu": 2, "convert": 2, "exponential": 0.5, "memory": 1, "issue": 4},
        4096,
        2048,
        132,
        1.83,
    ),
    "A100 (SXM)": Gpu(
        "sm_80",
        {"fma": 2, "alu": 2, "convert": 0.5, "exponential": 0.5, "memory": 1, "issue": 4},
        2048,
        1024,
        108,
        1.41,
    ),
}
# Kernel, gradient of the bits, and products of a pair of tokens, each with its channels: int8, 16-bit.
PASSES = [
    ("attend", "none", ("d",), ("v",)),
    ("backward_of_keys", "none", ("d",), ("v", "v")),
    ("backward_of_queries", "none", ("d",), ("v",)),
    ("backward_of_keys", "ste", ("d",), ("v", "v", "d")),
    ("backward_of_queries", "ste", ("d",), ("v", "d")),
    ("backward_of_keys", "ternary", ("d",), ("v", "v", "d")),
    ("backward_of_queries", "ternary", ("d",), ("v", "d")),
]


def listing(cubin: bytes) -> list[str]:
    """Machine code as text, one instruction or label a line."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        words = [assembly.tool("nvdisasm"), "-c", file.name]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()


def loops(lines: list[str]) -> list[list[str]]:
    """Names of the instructions in each loop: from a label to the branch that goes back to it."""
    labels = {line.strip().rstrip(":"): n for n, line in enumerate(lines) if re.match(r"\s*\.L\w+:", line)}
    found = []
    for n, line in enumerate(lines):
        goal = re.search(r"BRA `\((\.L\w+)\)", line)
        if goal and (start := labels.get(goal[1], n)) < n:
            body = (
                re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]+)", text) for text in lines[start:n]
            )
            found.append([match[1] for match in body if match])
    return found


def inner_loop(lines: list[str]) -> list[str]:
    """The loop over tiles: that with matrix products; of two, the one without a running maximum, which is shorter."""
    products = [one for one in loops(lines) if any("MMA" in name for name in one)]
    return min(products, key=len)


def clocks(kernel: str, gradient: str, whole: tuple[str, ...], half: tuple[str, ...], sizes: Sizes, gpu: Gpu) -> Any:
    """Clocks of each unit for a tile of the inner loop, and the largest for a pair of tokens."""
    built = assembly.build(kernel, sizes, assembly.TARGETS[gpu.target])
    names = Counter(inner_loop(listing(built.cubin)))
    warps, pairs = built.tiles.warps, built.tiles.M * built.tiles.N
    counts = {unit: sum(names[name] for name in known) for unit, known in UNITS.items()}
    counts["issue"] = names.total()
    channels = {"d": sizes.d, "v": sizes.v}
    found = {unit: count * warps / gpu.rates[unit] for unit, count in counts.items()}
    found["matrix"] = pairs * (
        sum(channels[one] for one in whole) / gpu.int8 + sum(channels[one] for one in half) / gpu.half
    )
    bound = max(found, key=lambda unit: found[unit])
    return {
        "kernel": kernel,
        "bit_gradient": gradient,
        "tile": [built.tiles.M, built.tiles.N],
        "warps": warps,
        "instructions": counts,
        "clocks": {unit: round(value) for unit, value in found.items()},
        "bound": bound,
        "clocks_per_pair": round(found[bound] / pairs, 4),
    }


def main(
    head_dim: Annotated[int, typer.Option(help="Channels of queries and keys.")] = 64,
    value_dim: Annotated[int, typer.Option(help="Channels of values.")] = 16,
    record: Annotated[Path | None, typer.Option(help="Figures to write: .json.")] = None,
) -> None:
    """Print the model as a Markdown table."""
    rows = []
    typer.echo(
        "| GPU | kernel | gradient of bits | tile | instructions | fma | alu | convert | exp | matrix | issue | clocks a pair |"
    )
    typer.echo("| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, gpu in GPUS.items():
        for kernel, gradient, whole, half in PASSES:
            unit = assembly.TARGETS[gpu.target].unit
            sizes = Sizes(head_dim, value_dim, 1, torch.bfloat16, gradient, True, unit)
            row = {"gpu": name, **clocks(kernel, gradient, whole, half, sizes, gpu)}
            rows.append(row)
            cells = [row["clocks"][unit] for unit in ("fma", "alu", "convert", "exponential", "matrix", "issue")]
            tile = "x".join(map(str, row["tile"]))
            first = [name, kernel, gradient, tile, row["instructions"]["issue"]]
            typer.echo(f"| {' | '.join(map(str, [*first, *cells, row['clocks_per_pair']]))} |")
    if record is not None:
        words = "derived from machine code and data sheets, not measured"
        write_json(record, {"what": words, "triton": triton.__version__, "d": head_dim, "d_v": value_dim, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
