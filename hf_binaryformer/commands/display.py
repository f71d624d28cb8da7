"""What commands print: progress and notes on stderr, results as tables on stdout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from hf_binaryformer.commands import jobs

if TYPE_CHECKING:
    from hf_binaryformer.modeling.catalogue import KnownModel

out, err = Console(), Console(stderr=True)


def tell_error(message: str) -> None:
    """One red line on stderr."""
    err.print(f"error: {' '.join(message.split())}", style="red", markup=False, highlight=False, soft_wrap=True)


def tell(line: str) -> None:
    """One plain line on stdout, whatever its length."""
    out.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress_bar(text: str) -> Iterator[jobs.Progress]:
    """Show a temporary progress bar on stderr if that is a terminal; yields a function to call with (done, total)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def scans_bar() -> Iterator[Callable[[float, int], None]]:
    """The same for many scans, with the time that is left."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("scan {task.fields[scan]}"), BarColumn(), TextColumn("time left"), TimeRemainingColumn())
    # Scans take minutes, so the pace of the last ten counts.
    options: dict[str, Any] = {"transient": True, "disable": not err.is_terminal, "speed_estimate_period": 600}
    with Progress(*columns, console=err, **options) as bar:
        task = bar.add_task("", total=None, scan="")

        def step(done: float, total: int) -> None:
            bar.update(task, completed=done, total=total, scan=f"{min(int(done) + 1, total)} of {total}")

        yield step


def tell_address(url: str) -> None:
    """Say where the page is."""
    tell(f"the page is at {url}")


def tell_written(*paths: Path | None) -> None:
    """Name the files that were written."""
    for path in filter(None, paths):
        out.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


def tell_notes(content: dict[str, Any]) -> None:
    """Print what a result's reader has to know, on stderr."""
    for note in content["notes"]:
        err.print(f"note: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def show_generation(content: dict[str, Any]) -> None:
    """Print how much was generated, and how long it took."""
    size = f"{content['hole_ml'][0]:,.1f} ml filled" if "hole_ml" in content else "nothing given"
    out.print(
        f"{content['model']}: {content['samples']} sample(s), {size}, {content['steps']} steps, {content['seconds']:.1f} s. "
        f"{content['generated']} {content['notice']}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def show_scores(content: dict[str, Any]) -> None:
    """Print the scores of each label, averaged over cases, and their mean."""
    number_of_cases = len(content["cases"])
    table = Table(
        "label",
        "name",
        "Dice",
        f"NSD {content['tolerance_mm']:g} mm",
        "HD95 mm",
        "NaN",
        title=f"{number_of_cases} case(s)",
    )
    formats = {"dice": ".3f", "nsd": ".3f", "hd95": ".2f"}
    for row in (*content["labels"], content["mean"]):
        numbers = ["NaN" if row[metric] is None else format(row[metric], style) for metric, style in formats.items()]
        missing = "/".join(str(row["nan"][metric]) for metric in formats)
        if row is content["mean"]:
            table.add_section()
        table.add_row("" if row["label"] is None else str(row["label"]), row["name"], *numbers, missing)
    show(table)
    out.print(f"NaN: how many of Dice/NSD/HD95 are left out. {content['absent_labels']}", style="dim", highlight=False)


def show_volumes(content: dict[str, Any]) -> None:
    """Print the labels that were found and their volumes."""
    table = Table("label", "name", "volume ml", title=f"{content['model']}, {content['seconds']:.1f} s")
    for row in content["labels"]:
        if row["label"] == 0:
            continue
        table.add_row(str(row["label"]), row["name"], f"{row['volume_ml']:,.1f}")
    show(table)
    if score := content.get("quality", {}).get("score"):
        volume = content["intracranial_ml"]
        skull = "" if volume is None else f", intracranial volume about {volume:,.0f} ml"
        # Of a network without a table of score and Dice, the score is its own opinion.
        what = "" if content["quality"]["expected_dice"] is not None else " (how sure the network is, not how right)"
        out.print(f"quality {score:.2f}{what}{skull}", markup=False, highlight=False, soft_wrap=True)


def show_demo(content: dict[str, Any]) -> None:
    """Print the demo's volumes, and how well both jobs did."""
    show_volumes(content["segmentation"])
    table = Table("on MNI152, never seen in training", "Dice", title="agreement with the template's own tissue maps")
    for tissue, dice in content["segmentation"]["dice"].items():
        table.add_row(tissue, f"{dice:.3f}")
    show(table)
    table = Table("fill of the hole", "PSNR dB", title=f"inpainting, {content['inpainting']['seconds']:.1f} s")
    for name, value in content["inpainting"]["psnr_hole"].items():
        if name != "samples":
            table.add_row(name, f"{value:.2f}")
    show(table)


def show_info(libraries: Mapping[str, str], backends: Mapping[str, str], checkpoints: Mapping[str, Path]) -> None:
    """Print versions, states of backends, and sizes of packaged checkpoints, by name."""
    table = Table("library", "version")
    for name, version in libraries.items():
        table.add_row(name, version)
    show(table)
    out.print("attention backends:")
    for name, state in backends.items():
        tell(f"  {name:<10} {state}")
    out.print("packaged checkpoints:" if checkpoints else "packaged checkpoints: none")
    for name, folder in checkpoints.items():
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        tell(f"  {name:<30} {size / 1e6:.2f} MB")


def show_models(models: Mapping[str, tuple[KnownModel | None, Path | None]], packaged: Path) -> None:
    """Print what is known of models, by name: their descriptions, and the folders of those whose weights are here.

    Args:
        models: description and folder, each of which may be missing.
        packaged: folder of the checkpoints that come with the package.
    """
    for name, (known, folder) in models.items():
        lines = ["not described"]
        if known is not None:
            made_from = f"trained on {known.trained_on}" if folder else f"to be trained on {known.trained_on}"
            lines = [f"{known.does}; {made_from}", f"{known.parameters} parameters"]
        if folder is not None:
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            place = "in the package" if folder.parent == packaged else f"in {folder}"
            lines[-1] += f", {size / 1e6:.1f} MB, weights {place}"
        elif known is not None:
            lines[-1] += ", weights not here: on the Hub if they are published"
            lines += [f"train: {known.command}", f"data: {known.data}"]
        out.print(name, style="bold", markup=False, highlight=False)
        for line in lines:
            tell(f"    {line}")


def show(table: Table) -> None:
    """Print a table with numbers aligned to the right; names are not read as markup."""
    for column in table.columns[2:]:
        column.justify = "right"
    out.print(table, markup=False)
