"""python scripts/benchmarks/assembly.py --record model_cards/evidence/kernels/triton_assembly.json

Compiles the Triton kernels for GPUs that need not be there, and reads from the assembly what decides their speed: registers,
what is spilled to memory, shared memory, and the instructions of the inner loop. No figure is measured.
"""

from __future__ import annotations

import itertools
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
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_binaryformer.kernels import triton_balance
from hf_binaryformer.kernels import triton_kernels as kernels
from hf_binaryformer.kernels.triton_tiles import Sizes, Tiles, padded

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
VALUES = ("value", "output", "grad_output", "grad_value", "x", "y", "grad", "grad_x")
WHOLE = {"signs": "*i8", "query_signs": "*i8", "key_signs": "*i8", "hashes": "*i32", "lengths": "*i64", "bits": "*i64"}
WHOLE |= dict.fromkeys(("scale", "epsilon", "window"), "fp32")
NUMBERS = ("query_weight", "key_weight", "largest", "logsumexp", "delta", "sums", "means", "inverse_rms")
GRADIENTS = ("grad_query_weight", "grad_key_weight", "grad_query", "grad_key")
STRIDES = re.compile("(value|output|grad_value)_[bhn]$")


@dataclass(frozen=True)
class Target:
    """A kind of GPU.

    Args:
        gpu: for the compiler.
        unit: of :class:`~hf_binaryformer.kernels.triton_tiles.Sizes`.
        shared: bytes of shared memory that a program may have.
        products: pattern of the matrix instructions for int8, and for the products of values and of ternary numbers.
    """

    gpu: GPUTarget
    unit: str
    shared: int
    products: tuple[str, str]


MMA = (r"mma\.sync\S*\.s32\.s8\.s8", r"mma\.sync\S*\.f32\.\w+")
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), "mma", 163 * 1024, MMA),
    "sm_90": Target(GPUTarget("cuda", 90, 32), "wgmma", 227 * 1024, (r"wgmma\S*s32\.s8\.s8", r"wgmma\S*\.f32\.\w+")),
    "sm_100": Target(GPUTarget("cuda", 100, 32), "tcgen05", 227 * 1024, (r"tcgen05\.mma|mma\.sync\S*s8", r"tcgen05\.mma")),
    "sm_120": Target(GPUTarget("cuda", 120, 32), "mma", 99 * 1024, MMA),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), "mfma", 64 * 1024, (r"v_mfma_i32\S*i8", r"v_mfma_f32\S*")),
}  # fmt: skip
KERNELS = ("attend", "backward_of_keys", "backward_of_queries")


@dataclass(frozen=True)
class Built:
    """A compiled kernel: its tiles and resources, its assembly, and NVIDIA's machine code (AMD: empty)."""

    tiles: Tiles
    registers: int
    spilled: int
    shared: int
    text: str
    cubin: bytes


def tiles_of(name: str, sizes: Sizes) -> Tiles:
    """The tiles that the backend takes."""
    chosen = {
        "attend": sizes.forward_tiles,
        "backward_of_keys": sizes.key_tiles,
        "backward_of_queries": sizes.query_tiles,
    }
    return chosen[name]()


def build(name: str, sizes: Sizes, target: Target, tiles: Tiles | None = None, masked: bool = False) -> Built:
    """Compile a kernel, with or without a number of keys for each sample; no GPU is needed."""
    tiles = tiles or tiles_of(name, sizes)
    constants = sizes.constants(tiles, backward=name != "attend")
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion")}
    if not masked:
        constants["lengths"] = None
    return compile_for(target, getattr(kernels, name), sizes.dtype, constants, options, tiles)


def build_balance(name: str, head_dim: int, dtype: torch.dtype, target: Target) -> Built:
    """Compile a kernel of balanced bits, with centring and norm."""
    function = getattr(triton_balance, name)
    constants: dict[str, Any] = {"DIM": head_dim, "D": padded(head_dim, 64), "WORDS": -(-head_dim // 64), "SUMS": False}
    constants |= {"R": min(64, triton_balance.TILE // constants["D"]), "CENTERING": True, "NORM": True}
    known = {parameter.name for parameter in function.params}
    chosen = {key: value for key, value in constants.items() if key in known}
    return compile_for(target, function, dtype, chosen, {"num_warps": 4}, Tiles(constants["R"], 0, 4, 1))


def compile_for(
    target: Target, function: Any, dtype: torch.dtype, constants: dict[str, Any], options: dict[str, Any], tiles: Tiles
) -> Built:
    """Compile device code, as :func:`triton.compile` does for a GPU that is not there.

    Args:
        target: the kind of GPU.
        function: device code; what its parameters are follows from their names.
        dtype: of the values.
        constants: compile-time arguments.
        options: of the compiler.
        tiles: for the result.
    """
    names = [parameter.name for parameter in function.params]
    signature, aligned = {}, {}
    for place, parameter in enumerate(names):
        if parameter in VALUES:
            kind = "*" + TYPES[dtype]
        elif parameter in NUMBERS + GRADIENTS:
            kind = "*fp32"
        else:
            kind = WHOLE.get(parameter, "i32")
        signature[parameter] = "constexpr" if parameter in constants else kind
        if kind.startswith("*") or STRIDES.match(parameter):
            aligned[(place,)] = [["tt.divisibility", 16]]
    fixed = {(names.index(key),): value for key, value in constants.items()}
    source = ASTSource(function, signature, constexprs=fixed, attrs=aligned)
    compiled = triton.compile(source, target=target.gpu, options=options)
    if target.gpu.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, spilled = (
            int(re.findall(rf"\.{key}:\s*(\d+)", text)[0]) for key in ("vgpr_count", "vgpr_spill_count")
        )
    else:
        text = compiled.asm["ptx"]
        registers, spilled = resources(compiled.asm["cubin"])
    return Built(tiles, registers, spilled, compiled.metadata.shared, text, compiled.asm.get("cubin", b""))


def tool(name: str) -> str:
    """A program that Triton brings along."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of it that live in memory because they found no register."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", shown.stdout)[0]
    return int(registers), int(stack)


def instructions(text: str) -> dict[str, int]:
    """How often each instruction is in the assembly, the most frequent first; types and modifiers left out."""
    found = re.findall(r"^\s+(?:@!?%\w+ )?([a-z][\w.]+)[ \t]", text, re.MULTILINE)
    return dict(Counter(found).most_common(40))


def main(
    target: Annotated[list[str] | None, typer.Option(help=f"{', '.join(TARGETS)}.  [default: all]")] = None,
    sizes: Annotated[str, typer.Option(help="d:d_v, with commas between.")] = "64:16,64:64,128:128,256:64,512:256",
    dtype: Annotated[list[str] | None, typer.Option(help="Of the values.  [default: bfloat16, float32]")] = None,
    record: Annotated[Path | None, typer.Option(help="Figures to write: .json.")] = None,
) -> None:
    """Compile, and print what was found."""
    rows: list[dict[str, Any]] = []
    pairs = [(int(d), int(v)) for d, v in (pair.split(":") for pair in sizes.split(","))]
    for name, pair, kind in itertools.product(target or TARGETS, pairs, dtype or ["bfloat16", "float32"]):
        one = TARGETS[name]
        for kernel in KERNELS:
            for gradient in ("none",) if kernel == "attend" else ("none", "ste", "ternary"):
                wanted = Sizes(*pair, 1, getattr(torch, kind), gradient, True, one.unit)
                built = build(kernel, wanted, one)
                row = {
                    "target": name,
                    "d": pair[0],
                    "d_v": pair[1],
                    "dtype": kind,
                    "kernel": kernel,
                    "bit_gradient": gradient,
                    "tiles": built.tiles._asdict(),
                    "registers": built.registers,
                    "spilled": built.spilled,
                    "shared": built.shared,
                }
                typer.echo(row)
                rows.append(row)
    if record is not None:
        from hf_binaryformer.commands.outputs import write_json

        write_json(
            record, {"command": "python scripts/benchmarks/assembly.py", "triton": triton.__version__, "kernels": rows}
        )


if __name__ == "__main__":
    typer.run(main)
