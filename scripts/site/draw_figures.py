"""python scripts/site/draw_figures.py: draws docs/figures/*.svg, from committed records and from the package's own functions

With ``--check`` it draws nothing and fails if a figure was drawn by another version of this script or of the records.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import torch
import typer

from hf_binaryformer.kernels import pack_sign_bits, unpack_sign_bits
from hf_binaryformer.kernels.balance import balance
from hf_binaryformer.kernels.draws import ternary

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "figures"
RECORD = ROOT / "model_cards" / "evidence" / "kernels" / "cpu.json"
# Okabe and Ito's colours, which readers with any kind of colour vision can tell apart.
BLUE, ORANGE, GREEN, GREY, DARK = "#0072B2", "#E69F00", "#009E73", "#B0B0B0", "#333333"
HEADS, MIB = 6, 2**20
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "hf-binaryformer",
    "legend.frameon": False,
    "figure.facecolor": "white",
}


def bits() -> Figure:
    """A query and a key of eight channels: numbers, signs, XOR, score."""
    query = np.array([0.9, -0.4, 0.2, 1.3, -1.1, 0.1, -0.7, 0.5])
    key = np.array([0.3, -0.8, -0.6, 0.7, -0.2, 0.9, 0.4, 1.2])
    signs = [unpack_sign_bits(pack_sign_bits(torch.tensor(x)), 8).numpy() > 0 for x in (query, key)]
    differ = signs[0] != signs[1]
    figure, axes = plt.subplots(figsize=(7.2, 3.3))
    rows = (
        ("query", [f"{x:+.1f}" for x in query], None),
        ("its bits", [str(int(bit)) for bit in signs[0]], signs[0]),
        ("key", [f"{x:+.1f}" for x in key], None),
        ("its bits", [str(int(bit)) for bit in signs[1]], signs[1]),
        ("XOR", [str(int(bit)) for bit in differ], differ),
    )
    for row, (name, texts, filled) in enumerate(rows):
        y, colour = -row * 1.15, ORANGE if name == "XOR" else BLUE
        axes.text(-0.3, y + 0.5, name, ha="right", va="center")
        for column, text in enumerate(texts):
            on = filled is not None and filled[column]
            axes.add_patch(Rectangle((column, y), 1, 1, facecolor=colour if on else "white", edgecolor=DARK, lw=0.8))
            axes.text(
                column + 0.5, y + 0.5, text, ha="center", va="center", color="white" if on and colour == BLUE else DARK
            )
    distance = int(differ.sum())
    axes.text(8.35, -4.6 + 0.5, f"Hamming distance {distance}", va="center", color=DARK)
    axes.text(8.35, -4.6 - 0.45, f"score 8 − 2·{distance} = {8 - 2 * distance}", va="center", color=DARK)  # noqa: RUF001
    axes.set(xlim=(-1.8, 12), ylim=(-5.4, 1.1), aspect="equal")
    axes.axis("off")
    return figure


def angle() -> Figure:
    """How many bits differ, by the angle between two vectors of 64 channels."""
    generator = np.random.default_rng(0)
    pairs = generator.standard_normal((2, 600, 64))
    # Mixed by random shares, or all pairs would be at right angles.
    share = generator.uniform(-1, 1, (600, 1))
    pairs[1] = share * pairs[0] + np.sqrt(1 - share**2) * pairs[1]
    product = (pairs[0] * pairs[1]).sum(-1)
    degrees = np.degrees(np.arccos(product / np.linalg.norm(pairs[0], axis=1) / np.linalg.norm(pairs[1], axis=1)))
    differ = ((pairs[0] >= 0) != (pairs[1] >= 0)).sum(-1)
    figure, axes = plt.subplots(figsize=(5.2, 3.3))
    axes.scatter(degrees, differ, s=7, color=BLUE, alpha=0.5, linewidths=0, label="600 random pairs")
    axes.plot([0, 180], [0, 64], color=ORANGE, lw=2, label="64 · angle / 180°")
    axes.set(xlabel="angle between query and key (degrees)", ylabel="bits that differ, of 64", xticks=range(0, 181, 45))
    axes.legend()
    return figure


def ternary_gradient() -> Figure:
    """A gradient, two ternary draws of it, and the mean of many."""
    generator = torch.Generator().manual_seed(2)
    gradient = torch.randn(24, generator=generator) * torch.rand(24, generator=generator)
    draws = torch.stack([ternary(gradient, torch.rand(24, generator=generator), 0) for _ in range(400)])
    panels = (
        ("gradient of 24 scores", gradient, BLUE),
        ("one ternary draw", draws[0], ORANGE),
        ("another draw", draws[1], ORANGE),
        ("mean of 400 draws", draws.mean(0), GREEN),
    )
    figure, axes = plt.subplots(2, 2, figsize=(7.2, 3.8), sharex=True, sharey=True, layout="constrained")
    for one, (title, values, colour) in zip(axes.flat, panels, strict=True):
        one.bar(range(24), values, color=colour)
        one.axhline(0, color=DARK, lw=0.8)
        one.set_title(title, fontsize=10)
        one.set(xticks=[])
    limit = float(gradient.abs().max())
    axes[0, 0].set(yticks=[-limit, 0, limit], yticklabels=["−s", "0", "s"])  # noqa: RUF001
    return figure


def balanced() -> Figure:
    """Bits of 96 tokens before and after the balancing."""
    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(24, generator=generator) * 1.5
    x = (torch.randn(96, 24, generator=generator) + shift)[None, None]
    figure, axes = plt.subplots(
        2, 2, figsize=(7.2, 4), sharex=True, height_ratios=[2, 1], sharey="row", layout="constrained"
    )
    for column, (title, numbers) in enumerate((("as they are", x), ("balanced", balance(x)[0]))):
        signs = (numbers[0, 0] >= 0).numpy()
        axes[0, column].imshow(
            signs, cmap=matplotlib.colors.ListedColormap(["white", BLUE]), aspect="auto", interpolation="nearest"
        )
        axes[0, column].set_title(title, fontsize=10)
        axes[0, column].set(yticks=[])
        for side in ("top", "right"):
            axes[0, column].spines[side].set_visible(True)
        axes[1, column].bar(range(24), signs.mean(0), color=BLUE)
        axes[1, column].axhline(0.5, color=ORANGE, lw=1.5)
        axes[1, column].set(xlabel="channel", ylim=(0, 1), xticks=[0, 8, 16, 23])
    axes[0, 0].set_ylabel("96 tokens")
    axes[1, 0].set_ylabel("share of ones")
    return figure


def read_rows() -> list[dict[str, Any]]:
    """Rows of the benchmark's record."""
    rows: list[dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8"))["rows"]
    return rows


def find(name: str, **fields: Any) -> dict[str, Any]:
    """The row of the record with this name and these fields."""
    (row,) = [r for r in read_rows() if r["name"] == name and all(r[key] == value for key, value in fields.items())]
    return row


def memory() -> Figure:
    """Peak memory of forward and backward pass, measured, beside the size of one N x N table, computed."""
    tokens = np.geomspace(200, 20000, 50)
    figure, axes = plt.subplots(figsize=(5.6, 3.6))
    axes.plot(
        tokens,
        HEADS * tokens**2 * 4 / MIB,
        color=GREY,
        ls="--",
        label="one N by N table for each of 6 heads (computed)",
    )
    both = {"dtype": "float32", "pass": "forward_backward"}
    for name, label, dim, colour, sign in (
        ("sdpa", "PyTorch's attention, 64 value channels", 64, DARK, "s"),
        ("hamming (cpu), ternary q k", "1-bit, ternary gradient, 16 value channels", 16, ORANGE, "^"),
        ("hamming (cpu)", "1-bit, gradient of weights, 16 value channels", 16, BLUE, "o"),
    ):
        sizes = [find(name, tokens=n, value_dim=dim, **both)["peak_bytes"] / MIB for n in (1601, 7680)]
        axes.plot((1601, 7680), sizes, color=colour, marker=sign, label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens N", ylabel="MiB", xlim=(200, 20000), ylim=(0.5, 60000))
    axes.set_xticks([200, 1601, 7680, 20000], ["200", "1 601", "7 680", "20 000"])
    axes.set_xticks([], minor=True)
    axes.set_yticks([1, 10, 100, 1000, 10000], ["1", "10", "100", "1 000", "10 000"])
    axes.legend(fontsize=7.5, loc="upper left")
    return figure


def speed() -> Figure:
    """How many times as fast as PyTorch's attention, at two lengths."""
    forward, both = {"pass": "forward", "value_dim": 16}, {"pass": "forward_backward", "value_dim": 16}
    bars: tuple[tuple[str, str, dict[str, Any], str], ...] = (
        ("forward, bfloat16", "hamming (cpu)", {**forward, "dtype": "bfloat16"}, BLUE),
        ("forward, float32", "hamming (cpu)", {**forward, "dtype": "float32"}, BLUE),
        ("forward + backward, bfloat16", "hamming (cpu)", {**both, "dtype": "bfloat16"}, BLUE),
        ("forward + backward, float32", "hamming (cpu)", {**both, "dtype": "float32"}, BLUE),
        ("the same, ternary gradient", "hamming (cpu), ternary q k", {**both, "dtype": "float32"}, ORANGE),
        (
            "whole ViT-S/8 encoder,\nforward, bfloat16, sign bits",
            "encoder, sign, ternary",
            {**forward, "dtype": "bfloat16"},
            GREEN,
        ),
    )
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 3), sharex=True, sharey=True, layout="constrained")
    for one, tokens in zip(axes, (1601, 7680), strict=True):
        for place, (_, name, fields, colour) in enumerate(bars):
            ratio = find(name, tokens=tokens, **fields)["ratio_to_sdpa"]
            one.barh(-place, ratio, color=colour)
            one.text(ratio + 0.4, -place, f"{ratio:.1f}", va="center", fontsize=9)
        one.axvline(1, color=DARK, lw=1)
        one.set_title(f"{tokens:,} tokens".replace(",", " "), fontsize=10)
        one.set(xlabel="times as fast as PyTorch", xlim=(0, 32), xticks=[1, 10, 20, 30])
    axes[0].set_yticks([-place for place in range(len(bars))], [text for text, *_ in bars])
    return figure


def pipeline() -> Figure:
    """Which key each of the kernel's three stages works on, step by step."""
    stages = (("score: XOR and count", 2, BLUE), ("exponential", 1, ORANGE), ("P · V", 0, GREEN))
    figure, axes = plt.subplots(figsize=(7.2, 2))
    for row, (name, ahead, colour) in enumerate(stages):
        axes.text(-0.15, -row + 0.4, name, ha="right", va="center")
        for step in range(7):
            key = step - 2 + ahead
            if 0 <= key < 5:
                axes.add_patch(Rectangle((step, -row), 0.94, 0.8, color=colour))
                axes.text(
                    step + 0.47,
                    -row + 0.4,
                    f"key {key}",
                    ha="center",
                    va="center",
                    color=DARK if row == 1 else "white",
                    fontsize=9,
                )
    axes.annotate("", (7, -2.35), (0, -2.35), arrowprops={"arrowstyle": "->", "color": DARK})
    axes.text(7.05, -2.35, "time", va="center")
    axes.set(xlim=(-2.6, 7.7), ylim=(-2.6, 1))
    axes.axis("off")
    return figure


DRAWN: dict[str, Callable[[], Figure]] = {
    "bits": bits,
    "angle": angle,
    "ternary": ternary_gradient,
    "balanced": balanced,
    "memory": memory,
    "speed": speed,
    "pipeline": pipeline,
}


def origin() -> str:
    """A fingerprint of what the figures are drawn from."""
    content = Path(__file__).read_bytes() + json.dumps(read_rows()).encode()
    return f"drawn by scripts/site/draw_figures.py, {hashlib.sha256(content).hexdigest()[:16]}"


def main(check: Annotated[bool, typer.Option(help="Draw nothing; fail if a figure is out of date.")] = False) -> None:
    """Draw all figures, or check them."""
    mark = origin()
    if check:
        old = [
            name
            for name in DRAWN
            if not (FIGURES / f"{name}.svg").is_file() or mark not in (FIGURES / f"{name}.svg").read_text()
        ]
        if old:
            sys.exit(f"out of date: {', '.join(old)}; run python scripts/site/draw_figures.py and look at them")
        return
    FIGURES.mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        for name, draw in DRAWN.items():
            figure = draw()
            figure.savefig(FIGURES / f"{name}.svg", bbox_inches="tight", metadata={"Date": None, "Description": mark})
            plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
