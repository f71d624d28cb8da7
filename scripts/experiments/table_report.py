"""The report of a table's finished runs: text with paired differences, and pictures."""

from __future__ import annotations

import math
import statistics
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from scipy import stats

if TYPE_CHECKING:
    from table_file import Table
    from table_record import Finished

# Differences are given with their interval at this confidence.
CONFIDENCE = 0.95
# Measure -> form -> one value per seed.
Figures = dict[str, dict[str, list[float]]]


def deviation(values: list[float]) -> float:
    """The standard deviation; NaN for a single value, or if a training gave no finite number."""
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


def paired(values: list[float], reference: list[float]) -> tuple[float, float]:
    """Mean difference from the reference by seed, and the half-width of its t-interval (NaN where there is none)."""
    differences = [a - b for a, b in zip(values, reference, strict=True)]
    mean = statistics.mean(differences)
    error = deviation(differences) / math.sqrt(len(differences))
    return mean, float(stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)) * error


def ties(table: Table, figures: Figures) -> list[str]:
    """Controls that are not clearly worse than the reference by the first measure."""
    name, per_form = next(iter(figures.items()))
    reference, tied = per_form[table.words["reference"]], []
    for control in table.words["controls"]:
        mean, width = paired(per_form[control], reference)
        clearly = math.isfinite(width) and abs(mean) > width
        if not clearly or table.better(name, mean, 0.0):
            tied.append(control)
    return tied


def constants(figures: Figures) -> dict[str, float]:
    """The measures, except the first, that are the same in every run."""
    seen = {name: {value for one in per_form.values() for value in one} for name, per_form in figures.items()}
    return {name: values.pop() for name, values in list(seen.items())[1:] if len(values) == 1}


def difference(values: list[float], reference: list[float]) -> str:
    """The paired difference with its interval, for a cell."""
    mean, width = paired(values, reference)
    return f"{mean:+.4g} ± {width:.2g}"


def titled(table: Table, name: str) -> str:
    """A measure's name with the direction that is better, if it has one."""
    better = table.words["measures"][name].get("better")
    return f"{name} ({better} is better)" if better else name


def markdown(
    table: Table,
    figures: Figures,
    rates: dict[str, float],
    command: str,
    more: list[str],
) -> str:
    """The table in words: ``figures`` are measure -> form -> one value per seed; ``more``: lines that follow."""
    reference, lines = table.words["reference"], [f"# {table.words['title']}", ""]
    tied = ties(table, figures)
    if tied:
        they = f"{' and '.join(tied)} {'is' if len(tied) == 1 else 'are'}"
        lines += [f"**No evidence about attention: {they} not clearly worse than {reference}.**", ""]
    lines += [table.words["question"].strip(), ""]
    if answer := table.words.get("answer"):
        lines += [answer.strip(), ""]
    seeds, tried = (", ".join(map(str, numbers)) for numbers in (table.seeds, table.tuning["rates"]))
    lines += [
        f"Seeds {seeds}, scale `{table.scale}`; mean ± standard deviation over seeds; differences are paired by seed, with "
        f"their {CONFIDENCE:.0%} t-interval. Runs of one seed see the same data in the same order, and start from the same "
        "weights where shapes are the same; intervals are those of training again, not of other data.",
        "",
    ]
    if len(table.tuning["rates"]) > 1:
        bracketed = len(table.tuning["rates"]) > 2
        lines[-1:] = [
            "",
            f"Each form tried the learning rates {tried}, in trials of {table.tuning['share']:.0%} of the iterations with one "
            f"other seed and other data; {'* is the end of the range' if bracketed else 'two do not bracket the best'}.",
            "",
        ]
    constant = constants(figures)
    for name, value in constant.items():
        lines += [f"{name}: {value:.4g}.", ""]
    for name, per_form in figures.items():
        if name in constant:
            continue
        lines += [
            f"## {titled(table, name)}",
            "",
            f"| form | rate | mean ± sd | minus {reference} |",
            "| --- | ---: | ---: | ---: |",
        ]
        for form, values in per_form.items():
            cell = "" if form == reference else difference(values, per_form[reference])
            tried_rates = table.tuning["rates"]
            ends = "*" if len(tried_rates) > 2 and rates[form] in (min(tried_rates), max(tried_rates)) else ""
            label = f"{form} (control)" if form in table.words["controls"] else form
            lines.append(
                f"| {label} | {rates[form]:g}{ends} | {statistics.mean(values):.4g} ± {deviation(values):.2g} | {cell} |"
            )
        lines.append("")
        if table.pairs:
            lines += ["| also | difference |", "| --- | ---: |"]
            lines += [f"| {a} minus {b} | {difference(per_form[a], per_form[b])} |" for a, b in table.pairs]
            lines.append("")
    return "\n".join([*lines, *more, "```", command, "```", ""])


def draw(table: Table, figures: Figures, path: Path) -> None:
    """Draw one panel per measure, with a dot per seed and a bar at the mean."""
    from matplotlib.figure import Figure

    constant = constants(figures)
    figures = {name: per_form for name, per_form in figures.items() if name not in constant}
    figure = Figure(figsize=(1.5 + 4 * len(figures), 0.5 + 0.35 * len(table.forms)), layout="constrained")
    for axes, (name, per_form) in zip(figure.subplots(1, len(figures), squeeze=False)[0], figures.items(), strict=True):
        for row, values in enumerate(per_form.values()):
            axes.plot(values, [row] * len(values), "o", color="tab:blue", alpha=0.6)
            axes.plot([statistics.mean(values)], [row], "|", color="black", markersize=14)
        axes.set_yticks(range(len(per_form)), list(per_form))
        axes.invert_yaxis()
        axes.set_xlabel(textwrap.fill(titled(table, name), 36))
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)


def draw_curves(table: Table, ended: dict[str, list[Finished]], path: Path) -> None:
    """Draw one panel per key of the logs, with the mean over seeds of each form, over the iterations."""
    from matplotlib.figure import Figure

    keys = table.words["curves"]
    figure = Figure(figsize=(4.5 * len(keys), 4), layout="constrained")
    panels = figure.subplots(1, len(keys), squeeze=False)[0]
    for number, (form, of_form) in enumerate(ended.items()):
        for axes, key in zip(panels, keys, strict=True):
            means = means_by_x([one.series[key] for one in of_form])
            style = dict(color=f"C{number % 10}", linestyle="-" if number < 10 else "--")
            axes.plot([float(x) for x in means], list(means.values()), label=form, **style)
    for axes, key in zip(panels, keys, strict=True):
        axes.set_xlabel("iteration")
        axes.set_title(key)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    panels[-1].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def means_by_x(found: list[dict[str, float]]) -> dict[str, float]:
    """The mean of several series at each x that all have."""
    return {x: statistics.mean(one[x] for one in found) for x in found[0] if all(x in one for one in found)}


def profile(table: Table, ended: dict[str, list[Finished]], path: Path) -> list[str]:
    """Draw the profiles of each form's runs with mean and standard deviation; returns the lines of their table."""
    from matplotlib.figure import Figure

    wanted = table.words["profile"]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    lines: list[str] = []
    for number, (form, of_form) in enumerate(ended.items()):
        found = [one.series[wanted["key"]] for one in of_form]
        means = means_by_x(found)
        spread = [deviation([one[x] for one in found]) for x in means]
        style = "-" if number < 10 else "--"
        axes.errorbar(
            [float(x) for x in means], list(means.values()), spread, ls=style, color=f"C{number % 10}", label=form
        )
        if not lines:
            lines = [f"| {wanted['x']} | {' | '.join(means)} |", "| --- |" + " ---: |" * len(means)]
        lines.append(f"| {form} | {' | '.join(f'{value:.3g}' for value in means.values())} |")
    axes.set_xlabel(wanted["x"])
    axes.set_ylabel(wanted["y"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    return [f"## {wanted['y']} by {wanted['x']}", "", *lines, ""]
