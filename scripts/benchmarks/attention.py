"""python scripts/benchmarks/attention.py --json attention.json --plot attention.png --tokens 1601,7680 --threads 2

Times Hamming attention against torch's SDPA and NumPy, and the ViT-S/8 encoder with either, on this processor. The kernel
is first compared with the formulas in float64; if an error exceeds its tolerance, nothing is timed. Then, in one
process:

- attention of 6 heads, d = 64, d_v = 16 and 64, float32 and bfloat16, forward and forward + backward (Hamming:
  gradients of both weights and the values, and in separate rows those of q and k by the ternary bit gradient; SDPA:
  those of q, k and v). Packed bits are inputs; in the rows "+ packing" the time includes packing q and k. SDPA at
  d_v = 16 runs with unchanged V and with V padded to 64 by zeros; "same d_v" compares with the faster of the two;
- one head, forward: SDPA, Hamming attention, and NumPy's bitwise_count as in the paper's Fig. 6;
- the paper's Fig. 2b (operations and bytes of a block, by formulas), Fig. 4 left (SDPA with channels / 32), Fig. 6 left
  (the product alone, in NumPy);
- the whole encoder, forward and training step without the optimizer, float32 and under bf16 autocast.

In every round each contestant has one turn; a row is the median over rounds. ``ratio_to_sdpa`` is the time of SDPA at
the same dtype and pass with d_v = 64 (one head against one head, encoder against the encoder with SDPA) divided by the
row's. ``--threads`` is the number of torch's threads. NumPy's matmul uses those of its BLAS (e.g.
OPENBLAS_NUM_THREADS); the rest of NumPy runs on one.
"""

from __future__ import annotations

import json
import platform
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
import torch
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from check import measure_errors
from figures import (
    FIGURE_2_BATCH,
    FIGURE_2_TOKENS,
    draw_plot,
    figure_2b,
    figure_2b_table,
    figure_6,
    figure_6_table,
    figure_class,
)
from hf_binaryformer import __version__
from hf_binaryformer.kernels import BackendUnavailableError, backend_report
from hf_binaryformer.kernels.backends import select_backend
from measure import Result, describe_device, measure_peaks, memory_method, time_interleaved
from subjects import attention_subjects, numpy_counts_bits, one_head_subjects, product_subjects

# Defaults of the options, for a full run and with --quick.
DEFAULTS = {
    False: {
        "tokens": "1601,7680",
        "check_tokens": "401,1601",
        "product_tokens": "256,512,1024,2048,4096",
        "rounds": 7,
        "seconds": 90.0,
    },
    True: {"tokens": "256", "check_tokens": "256", "product_tokens": "256,512", "rounds": 3, "seconds": 0.0},
}
# Width of tables if the output is not a terminal, or a narrower one.
TABLE_WIDTH = 110


def fail(message: str, code: int) -> NoReturn:
    """Print an error message and exit with a code."""
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(code)


def parse_numbers(text: str) -> list[int]:
    """The numbers of a list like 1601,7680."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(f"expected positive numbers like 1601,7680, not {text!r}")
    return numbers


def check_correctness(tokens: list[int], backend: str, console: Console) -> list[dict[str, Any]]:
    """Print and return errors against float64; ends the program if one exceeds its tolerance."""
    errors = list(measure_errors(tokens, backend))
    quantities = list(dict.fromkeys(e["quantity"] for e in errors))
    headings = [q.replace("gradient of ", "d ") for q in quantities]
    table = Table("", "N", "d_v", "dtype", *headings, title="norm(x - exact) / norm(exact)", box=SIMPLE)
    settings = ("backend", "tokens", "value_dim", "dtype")
    for setting in dict.fromkeys(tuple(e[key] for key in settings) for e in errors):
        found = {e["quantity"]: e for e in errors if tuple(e[key] for key in settings) == setting}
        cells = [f"{found[q]['error']:.1e}" if q in found else "-" for q in quantities]
        table.add_row(*map(str, setting), *cells, style=None if all(e["passed"] for e in found.values()) else "red")
    console.print(table)
    wrong = [e for e in errors if not e["passed"]]
    if wrong:
        e = wrong[0]
        fail(
            f"backend '{e['backend']}' is wrong, nothing was timed: {e['quantity']} at N = {e['tokens']}, "
            f"d_v = {e['value_dim']}, {e['dtype']} has error {e['error']}, allowed is {e['tolerance']} "
            f"({len(wrong)} of {len(errors)} figures are beyond tolerance)",
            1,
        )
    return errors


def result_table(results: list[Result], title: str) -> Table:
    """Median, range over rounds, both ratios and memory of each subject."""
    table = Table(title=title, box=SIMPLE)
    table.add_column("", no_wrap=True)
    for heading in ("d_v", "ms", "range %", "x SDPA", "x same d_v", "MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    settings = None
    for r in results:
        s = r.subject
        if settings != (s.tokens, s.dtype, s.step):
            settings = s.tokens, s.dtype, s.step
            table.add_section()
            table.add_row(f"N = {s.tokens}, {s.dtype}, {s.pass_name.replace('_', ' + ')}", style="bold")
        table.add_row(
            f"  {s.name}",
            str(s.value_dim),
            f"{r.milliseconds:.3f}",
            f"{100 * (max(r.samples) - min(r.samples)) / r.milliseconds:.0f}",
            *("-" if x is None else f"{x:.2f}" for x in (r.ratio_to_sdpa, r.ratio_to_same_value_dim)),
            "-" if r.peak_bytes is None else f"{r.peak_bytes / 1e6:.1f}",
        )
    return table


def command_line(options: dict[str, Any]) -> str:
    """The command that repeats a run, without the paths of its results."""
    words = ["python", "scripts/benchmarks/attention.py"]
    for name, value in options.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", str(value)]
    return shlex.join(words)


def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="Write every figure here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the ratios into this image (needs matplotlib).")] = None,
    redraw: Annotated[
        Path | None, typer.Option(help="Measure nothing; draw --plot from this record of --json.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Sequence lengths N.  [1601,7680]")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch; default: as many as torch takes.")] = None,
    backend: Annotated[str | None, typer.Option(help="Of the kernel; default: the fastest that is here.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Turns of each contestant; the median counts.  [7]")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="Go on with turns of a group for at least so long.  [90]")
    ] = None,
    turn: Annotated[float, typer.Option(min=0, help="Milliseconds to fill with calls in each turn.")] = 20.0,
    quick: Annotated[bool, typer.Option("--quick", help="For CI: --tokens 256, --rounds 3, few products.")] = False,
    encoder: Annotated[bool, typer.Option(help="Time the whole encoder too.")] = True,
    encoder_blocks: Annotated[int | None, typer.Option(min=1, help="Its blocks; default: ViT-S/8's 12.")] = None,
    encoder_step_limit: Annotated[int, typer.Option(help="Longest N for its training step.")] = 2048,
    sampler: Annotated[bool, typer.Option(help="Time the paper's 3D sampler (1 680 tokens) too.")] = True,
    sampler_blocks: Annotated[int, typer.Option(min=1, help="Its blocks.")] = 8,
    sampler_steps: Annotated[int, typer.Option(min=1, max=200, help="How many of its 200 equal steps to time.")] = 4,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, each in a new process (seconds each).")] = True,
    dense_limit: Annotated[
        int, typer.Option(help="Longest N for the backward of SDPA with V unpadded, which holds N x N scores a head.")
    ] = 4096,
    check_tokens: Annotated[str | None, typer.Option(help="N of the correctness check.  [401,1601]")] = None,
    product_tokens: Annotated[str | None, typer.Option(help="N of Fig. 6.  [256,512,1024,2048,4096]")] = None,
) -> None:
    """Correctness, then speed and memory of Hamming attention beside SDPA and NumPy."""
    if redraw is not None:
        if plot is None:
            fail("--redraw wants --plot: the image to write", 2)
        draw_plot(plot, json.loads(redraw.read_text()))
        return
    default = DEFAULTS[quick]
    options: dict[str, Any] = {
        "tokens": tokens or default["tokens"],
        "threads": threads or torch.get_num_threads(),
        "rounds": rounds or default["rounds"],
        "seconds": default["seconds"] if seconds is None else seconds,
        "turn": turn,
        "encoder": encoder,
        **({"encoder_blocks": encoder_blocks} if encoder_blocks else {}),
        "encoder_step_limit": encoder_step_limit,
        "sampler": sampler,
        **({"sampler_blocks": sampler_blocks, "sampler_steps": sampler_steps} if sampler else {}),
        "memory": memory,
        "dense_limit": dense_limit,
        "check_tokens": check_tokens or default["check_tokens"],
        "product_tokens": product_tokens or default["product_tokens"],
    }
    lengths, checked, products = (parse_numbers(options[k]) for k in ("tokens", "check_tokens", "product_tokens"))
    options["backend"] = kernel = usable_backend(backend, json_path, plot)
    torch.set_num_threads(options["threads"])
    console = Console(width=max(Console().width, TABLE_WIDTH))
    device, report = describe_device(), backend_report()[kernel]
    console.print(f"{device['cpu']}, {device['cores']} cores, {options['threads']} threads, torch {torch.__version__}")
    console.print(f"backend '{kernel}', {report}")
    errors = check_correctness(checked, kernel, console)
    results = measure(options, lengths, products)
    record = record_of(options, lengths, results, errors)
    if json_path is not None:
        json_path.write_text(json.dumps(record, indent=1) + "\n")
    if plot is not None:
        draw_plot(plot, record)
    show(results, kernel, console)


def record_of(
    options: dict[str, Any], lengths: list[int], results: list[Result], errors: list[dict[str, Any]]
) -> dict[str, Any]:
    """All results of a run, in machine-readable form."""
    kernel = options["backend"]
    return {
        "device": describe_device(),
        "threads": options["threads"],
        "versions": {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "hf_binaryformer": __version__,
            "python": platform.python_version(),
        },
        "backend": {"name": kernel, "report": backend_report()[kernel]},
        "command": command_line(options),
        "memory_method": memory_method() if options["memory"] else None,
        "errors": errors,
        "rows": [r.row() for r in results],
        "samples": [[round(ms, 5) for ms in r.samples] for r in results],
        "figure_2b": [
            asdict(c)
            for b, n in [(FIGURE_2_BATCH, FIGURE_2_TOKENS), *((1, n) for n in lengths)]
            for c in figure_2b(b, n)
        ],
        "figure_6": figure_6(results),
    }


def usable_backend(backend: str | None, json_path: Path | None, plot: Path | None) -> str:
    """Name of the kernel's backend; ends the program if something is missing that would fail only after minutes."""
    for path in (json_path, plot):
        if path is not None and not path.parent.is_dir():
            fail(f"{path} cannot be written: there is no folder {path.parent}", 2)
    try:
        if plot is not None:
            figure_class()
        return select_backend(backend, "cpu").name
    except (BackendUnavailableError, ImportError) as error:
        fail(str(error), 2)


def measure(options: dict[str, Any], lengths: list[int], products: list[int]) -> list[Result]:
    """Times (and memory) of everything that the options ask for."""
    kernel = options["backend"]

    def timed(subjects: list[Any], label: str) -> list[Result]:
        return time_interleaved(subjects, options["rounds"], options["turn"] / 1e3, label, options["seconds"])

    results: list[Result] = []
    for n in lengths:
        attention = timed(attention_subjects(n, kernel, options["dense_limit"]), f"attention, N = {n}")
        if options["memory"]:
            measure_peaks(attention, options["threads"])
        results += attention
        results += timed(one_head_subjects(n, kernel), f"one head, N = {n}")
    results += timed(product_subjects(products), "product alone")
    # Imported here because each child process of measure_peaks imports this file and needs neither timm nor
    # transformers.
    if options["encoder"]:
        from encoder import encoder_subjects

        for n in lengths:
            subjects = encoder_subjects(n, kernel, options.get("encoder_blocks"), options["encoder_step_limit"])
            results += timed(subjects, f"encoder, N = {n}")
    if options["sampler"]:
        from sampler import sampler_subjects

        results += timed(sampler_subjects(kernel, options["sampler_blocks"], options["sampler_steps"]), "sampler")
    return results


def show(results: list[Result], kernel: str, console: Console) -> None:
    """Print the tables."""
    console.print(figure_2b_table())
    if not numpy_counts_bits():
        console.print(f"NumPy {np.__version__} has no bitwise_count (2.0 and later): its rows are left out")
    console.print(figure_6_table(figure_6(results)))
    console.print("The kernel is fused: it has no product of its own that could be timed.")
    titles = {
        "attention": f"Attention, backend '{kernel}'",
        "one head": "One head",
        "encoder": "Whole encoder, ViT-S/8",
        "sampler": "Absorbing diffusion, paper size",
    }
    for family, title in titles.items():
        chosen = [r for r in results if r.subject.family == family]
        if chosen:
            console.print(result_table(chosen, title))


if __name__ == "__main__":
    typer.run(main)
