"""python scripts/experiments/draw_curves.py model_cards/evidence/bits --out model_cards/evidence/bits/balance.png

Draws curves over the training from a table's recorded series, one panel a series, with the mean over the seeds that are there.
A table whose runs are not all finished can be drawn too.
"""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#999999")
TITLES = {
    "loss": "training loss",
    "bit_entropy": "entropy of a bit over the tokens (1: balanced)",
    "gradient": "gradient of queries and keys",
    "entropy": "entropy of attention, nats",
}

# Series -> form -> iteration -> mean over seeds.
Curves = dict[str, dict[str, dict[float, float]]]


def read_curves(record: Path) -> Curves:
    """The series of a record's ``series.csv``."""
    found: dict[tuple[str, str, float], list[float]] = defaultdict(list)
    with record.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found[row["series"], row["form"], float(row["x"])].append(float(row["value"]))
    curves: Curves = defaultdict(lambda: defaultdict(dict))
    for (series, form, x), values in sorted(found.items()):
        curves[series][form][x] = statistics.mean(values)
    return curves


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of a table in the evidence, with series.csv.")],
    out: Annotated[Path, typer.Option(help="Picture to write: .png.")],
    series: Annotated[str, typer.Option(help="Names of series, with commas between.")] = "loss,bit_entropy",
    forms: Annotated[str | None, typer.Option(help="Names of forms.  [default: all]")] = None,
    first: Annotated[int, typer.Option(help="First iteration that is drawn.")] = 0,
) -> None:
    """Draw."""
    curves, names = read_curves(folder / "series.csv"), series.split(",")
    chosen = forms.split(",") if forms else list(dict.fromkeys(form for one in curves.values() for form in one))
    figure = Figure(figsize=(5 * len(names), 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for number, form in enumerate(chosen):
            points = {x: value for x, value in curves[name][form].items() if x >= first}
            axes.plot(list(points), list(points.values()), color=COLOURS[number % len(COLOURS)], label=form, lw=1.8)
        axes.set(xlabel="iteration", title=TITLES.get(name, name))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=130)
    typer.echo(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
