"""The paper's own figures on cost: Fig. 2b counted by formulas, Fig. 6 left from timings, and a plot of the benchmark."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from measure import Result
from subjects import HEAD_DIM, HEADS, PRODUCT_DIM, REDUCED_VALUE_DIM

# Paper Fig. 2: batch, tokens; hidden size is HEADS x HEAD_DIM = 384.
FIGURE_2_BATCH = 6
FIGURE_2_TOKENS = 2048
MLP_RATIO = 4
FLOAT_BYTES = 4
# Name, 1-bit scores, value channels of each head.
BLOCKS = (
    ("softmax", False, HEAD_DIM),
    ("softmax", False, REDUCED_VALUE_DIM),
    ("hamming", True, REDUCED_VALUE_DIM),
)
# A row of panels in the plot, and the part of a name that tells its subjects from those of the rows above.
KINDS = {
    f"attention, {HEADS} heads": "",
    "one head": ", 1 head",
    "encoder": "encoder, ",
    "training step": "training step, ",
    "sampler": "sampler, ",
}


@dataclass
class Cost:
    """What one part of a transformer block costs: float multiply-accumulates, XOR-and-count of bit pairs, bytes moved."""

    name: str
    batch: int
    tokens: int
    head_dim: int
    value_dim: int
    part: str
    macs: int = 0
    bit_operations: int = 0
    bytes: int = 0


def block_costs(name: str, hamming: bool, value_dim: int, batch: int, tokens: int) -> list[Cost]:
    """Cost of each part of one block (paper Fig. 2b), forward, float32.

    With D = H d, and theta the two networks 2 D -> D / 2 -> H that make the weights:

        query, key, value   B N D (2 D + H d_v)      scores   B N^2 D       (1-bit: bit operations; 2 B N^2 H MACs for the
        theta               2 B N (D^2 + D H / 2)             weights w_q w_k)
        P V                 B N^2 H d_v              projection   B N H d_v D       MLP   2 B N D ratio D

    Bytes: every operand read once and every result written once; scores stay in the cache (fused), exponentials are not
    counted.
    """
    width, values, rows = HEADS * HEAD_DIM, HEADS * value_dim, batch * tokens
    pairs = batch * tokens**2

    def linear(*sizes: int) -> tuple[int, int]:
        """MACs and bytes of a chain of linear layers."""
        layers = list(pairwise(sizes))
        macs = sum(rows * i * o for i, o in layers)
        return macs, FLOAT_BYTES * sum(rows * i + i * o + rows * o for i, o in layers)

    def cost(part: str, macs: int, moved: int, bit_operations: int = 0) -> Cost:
        return Cost(name, batch, tokens, HEAD_DIM, value_dim, part, macs, bit_operations, moved)

    costs = [cost("query, key, value", *linear(width, 2 * width + values))]
    if hamming:
        macs, moved = linear(2 * width, width // 2, HEADS)
        costs.append(cost("theta", 2 * macs, 2 * moved))
        bits_and_weights = 2 * rows * (width // 8 + HEADS * FLOAT_BYTES)
        costs.append(cost("scores", 2 * pairs * HEADS, bits_and_weights, bit_operations=pairs * width))
    else:
        costs.append(cost("scores", pairs * width, 2 * rows * width * FLOAT_BYTES))
    costs.append(cost("P V", pairs * values, 2 * rows * values * FLOAT_BYTES))
    costs.append(cost("projection", *linear(values, width)))
    costs.append(cost("MLP", *linear(width, MLP_RATIO * width, width)))
    return [*costs, _total(costs)]


def _total(costs: list[Cost]) -> Cost:
    first = asdict(costs[0]) | {"part": "block"}
    sums = {key: sum(getattr(c, key) for c in costs) for key in ("macs", "bit_operations", "bytes")}
    return Cost(**(first | sums))


def figure_2b(batch: int, tokens: int) -> list[Cost]:
    """Every part of every kind of block."""
    return [
        cost for name, hamming, value_dim in BLOCKS for cost in block_costs(name, hamming, value_dim, batch, tokens)
    ]


def figure_2b_table() -> Table:
    """The table of Fig. 2b at the paper's sizes."""
    title = (
        f"One block by formulas (paper Fig. 2b): B = {FIGURE_2_BATCH}, N = {FIGURE_2_TOKENS}, D = {HEADS * HEAD_DIM}"
    )
    table = Table("", title=title, box=SIMPLE)
    kinds = [block_costs(*kind, FIGURE_2_BATCH, FIGURE_2_TOKENS) for kind in BLOCKS]
    # Float attention has no bit operations to show.
    units = [("GMAC", "macs", 1e9), ("G bit op.", "bit_operations", 1e9), ("MB", "bytes", 1e6)]
    columns = [(kind, unit) for kind in kinds for unit in units if any(getattr(c, unit[1]) for c in kind)]
    for kind, (unit, _, _) in columns:
        table.add_column(f"{kind[0].name}\nd_v {kind[0].value_dim}\n{unit}", justify="right")
    for part in [cost.part for cost in kinds[-1]]:
        cells = [
            next((f"{getattr(c, field) / size:.2f}" for c in kind if c.part == part and getattr(c, field)), "-")
            for kind, (_, field, size) in columns
        ]
        table.add_row(part, *cells, style="bold" if part == "block" else None)
    return table


def figure_6(results: list[Result]) -> list[dict[str, float | int]]:
    """Throughput of the product alone: G-MAC/s by bits and by floats, for each N where both were timed."""
    rows: list[dict[str, float | int]] = []
    products = [r for r in results if r.subject.family == "product"]
    for tokens in dict.fromkeys(r.subject.tokens for r in products):
        speed = {
            r.subject.is_float: tokens**2 * r.subject.head_dim / (r.milliseconds * 1e6)
            for r in products
            if r.subject.tokens == tokens
        }
        if len(speed) == 2:
            both = {"bits_gmacs_per_second": speed[False], "float_gmacs_per_second": speed[True]}
            rows.append({"tokens": tokens, **both, "ratio": speed[False] / speed[True]})
    return rows


def figure_6_table(rows: list[dict[str, float | int]]) -> Table:
    """One line for each N."""
    title = f"Product alone, NumPy, d = {PRODUCT_DIM}, G-MAC/s (paper Fig. 6 left)"
    table = Table("N", "xor + bitwise_count", "matmul float32", "ratio", title=title, box=SIMPLE, min_width=72)
    for row in rows:
        bits, floats = row["bits_gmacs_per_second"], row["float_gmacs_per_second"]
        table.add_row(str(row["tokens"]), f"{bits:.1f}", f"{floats:.1f}", f"{row['ratio']:.2f}")
    return table


def figure_class() -> Any:
    """Matplotlib's Figure.

    Raises:
        ImportError: without matplotlib; says how to get it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('--plot needs matplotlib, which is missing: pip install "hf-binaryformer[demo]"') from error
    return Figure


def draw_plot(path: Path, record: dict[str, Any]) -> None:
    """Ratios to SDPA in a record of ``attention.py``, as an image: a panel for each pass and type, a row for each kind.

    Args:
        path: image to write; its ending is the format.
        record: what ``--json`` writes.
    """
    rows = [row for row in record["rows"] if row["ratio_to_sdpa"] not in (None, 1)]
    kinds = {title: [row for row in rows if _kind(row) == title] for title in KINDS}
    kinds = {title: shown for title, shown in kinds.items() if shown}
    columns = list(dict.fromkeys((row["pass"], row["dtype"]) for row in rows))
    lengths = sorted({row["tokens"] for row in rows})
    colours = {n: f"C{place}" for place, n in enumerate(lengths)}
    names = {title: list(dict.fromkeys(_label(row) for row in shown)) for title, shown in kinds.items()}
    heights = [1 + len(names[title]) for title in kinds]
    figure = figure_class()(figsize=(4 + 2.2 * len(columns), 1.5 + 0.28 * sum(heights)), layout="constrained")
    grid = figure.subplots(len(kinds), len(columns), squeeze=False, sharey="row", sharex="row", height_ratios=heights)
    for panels, (title, shown) in zip(grid, kinds.items(), strict=True):
        for axis, column in zip(panels, columns, strict=True):
            here = [row for row in shown if (row["pass"], row["dtype"]) == column]
            axis.axvline(1, color="0.3", linewidth=0.8)
            for row in here:
                kind = [r["tokens"] for r in here if _label(r) == _label(row)]
                place = names[title].index(_label(row)) + 0.36 * (kind.index(row["tokens"]) - (len(kind) - 1) / 2)
                bar = axis.barh(place, row["ratio_to_sdpa"], 0.34, color=colours[row["tokens"]])
                axis.bar_label(bar, fmt="%.1f", padding=2, fontsize=7)
            axis.set_title(f"{column[0].replace('_', ' + ')}, {column[1]}" if here else "", fontsize=9)
            axis.set_visible(bool(here) or axis is panels[0])
            axis.margins(x=0.18)
            axis.spines[["top", "right"]].set_visible(False)
        panels[0].set_yticks(range(len(names[title])), names[title], fontsize=8)
        panels[0].invert_yaxis()
        panels[0].set_ylabel(title, fontsize=9)
    patches = [grid[0, 0].barh(0, 0, color=colours[n], label=f"{n} tokens") for n in lengths]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(lengths), fontsize=9, frameon=False)
    threads = f", {record['threads']} threads" if "threads" in record else ""
    figure.suptitle(f"Times as fast as SDPA with d_v = d: {record['device']['cpu']}{threads}", fontsize=10)
    figure.savefig(path, dpi=150)


def _kind(row: dict[str, Any]) -> str:
    """Where a row of the record belongs in the plot."""
    return next(title for title, mark in reversed(KINDS.items()) if mark in row["name"])


def _label(row: dict[str, Any]) -> str:
    """Name of a row of the record without its kind, and its channels."""
    channels = "" if row["head_dim"] == HEAD_DIM else f"d {row['head_dim']}, "
    return f"{row['name'].replace(KINDS[_kind(row)], '')}, {channels}d_v {row['value_dim']}"
