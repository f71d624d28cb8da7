"""The command line, `binaryformer`: what is typed, shown and refused; :mod:`hf_binaryformer.commands` does the work."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec

import typer
from rich.console import Console
from rich.table import Table

# Everything heavy (torch, monai, transformers) is imported inside the commands, so that --help answers at once.
from hf_binaryformer.commands import generation_jobs, jobs
from hf_binaryformer.pipelines.provenance import versions

P = ParamSpec("P")
TRACEBACK_VARIABLE = "BINARYFORMER_TRACEBACK"

app = typer.Typer(
    name="binaryformer",
    help="1-bit vision transformers for medical volumes. Research only, not for clinical use.",
    epilog=f"An error is told in one line; with {TRACEBACK_VARIABLE}=1 in the environment, with its traceback.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
out, err = Console(), Console(stderr=True)


class DType(str, Enum):
    """Number formats that a network can run in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Selection(str, Enum):
    """Orders in which tokens are drawn."""

    random = "random"
    halton = "halton"
    confidence = "confidence"
    raster = "raster"


# For commands that pass their arguments on to another program; that program is imported only then.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
# Options that mean the same in several commands.
Samples = Annotated[int, typer.Option(min=1, help="How many results; more than one become a 4D NIfTI.")]
Seed = Annotated[
    int, typer.Option(help="The same seed gives the same bytes, on one machine with one number of threads.")
]
Steps = Annotated[int, typer.Option(min=1, help="Steps that share the tokens to be drawn.")]
Temperature = Annotated[float, typer.Option(min=0, help="Of the draws; 0 takes the likeliest token.")]
Model = Annotated[str, typer.Option(help="Short name, folder or Hub id.")]
Backend = Annotated[str | None, typer.Option(help="Code that computes 1-bit attention; see `info`.")]
NumberFormat = Annotated[DType, typer.Option(help="Number format of the network.")]
Device = Annotated[str | None, typer.Option(help="torch device, such as cpu or cuda:0.  [default: best]")]


def one_line_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turn errors that a user can fix into one red line and exit code 1; others are bugs and keep their traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, OSError, ImportError) as error:
            _fail(error)
        except MemoryError as error:
            # A small file can ask for much memory, for example where it is packed and holds one value throughout.
            _fail(
                MemoryError(
                    f"memory is not enough ({error or 'for this job'}): check what the file holds, or use a larger machine"
                )
            )
        except RuntimeError as error:
            from hf_binaryformer.kernels import BackendUnavailableError

            if not isinstance(error, BackendUnavailableError):
                raise
            _fail(error)

    return run


def _fail(error: Exception) -> NoReturn:
    if os.environ.get(TRACEBACK_VARIABLE):
        raise error
    message = " ".join(str(error).split())
    err.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1) from None


@contextmanager
def progress_bar(text: str) -> Iterator[jobs.Progress]:
    """Show a temporary progress bar on stderr if that is a terminal; yields a function to call with (done, total)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@app.command()
@one_line_errors
def segment(
    source: Annotated[Path, typer.Argument(metavar="IN", help="NIfTI, .mha, .mhd or .nrrd file, or a DICOM folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Label volume to write: .nii.gz, .nii or .mha.")],
    overlay: Annotated[Path | None, typer.Option(help="Picture of the labels on the image to write: .png.")] = None,
    report: Annotated[Path | None, typer.Option(help="Label volumes, settings, versions to write: .json.")] = None,
    probabilities: Annotated[Path | None, typer.Option(help="4D volume of probabilities to write: .nii.gz.")] = None,
    model: Model = jobs.DEFAULT_MODEL,
    backend: Backend = None,
    dtype: NumberFormat = DType.float32,
    device: Device = None,
) -> None:
    """Segment a volume; labels come back on its own grid."""
    with progress_bar("segmenting") as progress:
        content = jobs.segment_file(
            source,
            output,
            overlay=overlay,
            report=report,
            probabilities=probabilities,
            model=model,
            backend=backend,
            dtype=dtype.value,
            device=device,
            progress=progress,
        )
    tell_notes(content)
    show_volumes(content)
    tell_written(output, probabilities, overlay, report)


@app.command()
@one_line_errors
def inpaint(
    source: Annotated[Path, typer.Argument(metavar="IN", help="NIfTI, .mha, .mhd or .nrrd file, or a DICOM folder.")],
    mask: Annotated[Path, typer.Option(help="Volume on the same grid; not 0 is the hole.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Volume to write: .nii.gz, .nii or .mha.")],
    std_map: Annotated[Path | None, typer.Option(help="Standard deviation over samples to write: .nii.gz.")] = None,
    overlay: Annotated[Path | None, typer.Option(help="Picture of hole and result to write: .png.")] = None,
    report: Annotated[Path | None, typer.Option(help="Seconds, settings, versions to write: .json.")] = None,
    samples: Samples = 1,
    seed: Seed = 0,
    steps: Steps = generation_jobs.DEFAULT_STEPS,
    temperature: Temperature = generation_jobs.DEFAULT_TEMPERATURE,
    feather: Annotated[int, typer.Option(min=0, help="Voxels inside the hole over which a seam is faded.")] = 0,
    selection: Annotated[
        Selection | None, typer.Option(help="Order in which tokens are drawn.  [default: the checkpoint's]")
    ] = None,
    model: Model = generation_jobs.DEFAULT_MODEL,
    backend: Backend = None,
    dtype: NumberFormat = DType.float32,
    device: Device = None,
) -> None:
    """Fill the hole of a volume; voxels outside the hole do not change."""
    with progress_bar("filling") as progress:
        content = generation_jobs.inpaint_file(
            source,
            mask,
            output,
            std_map=std_map,
            overlay=overlay,
            report=report,
            samples=samples,
            seed=seed,
            steps=steps,
            temperature=temperature,
            feather=feather,
            selection=selection.value if selection else None,
            model=model,
            backend=backend,
            dtype=dtype.value,
            device=device,
            progress=progress,
        )
    tell_notes(content)
    show_generation(content)
    tell_written(output, std_map, overlay, report)


@app.command()
@one_line_errors
def synthesize(
    output: Annotated[Path, typer.Option("--output", "-o", help="Volume to write: .nii.gz, .nii or .mha.")],
    overlay: Annotated[Path | None, typer.Option(help="Picture of the volumes to write: .png.")] = None,
    report: Annotated[Path | None, typer.Option(help="Seconds, settings, versions to write: .json.")] = None,
    samples: Samples = 1,
    seed: Seed = 0,
    steps: Steps = generation_jobs.DEFAULT_STEPS,
    temperature: Temperature = generation_jobs.DEFAULT_TEMPERATURE,
    model: Model = generation_jobs.DEFAULT_MODEL,
    backend: Backend = None,
    dtype: NumberFormat = DType.float32,
    device: Device = None,
) -> None:
    """Synthesise new volumes."""
    with progress_bar("sampling") as progress:
        content = generation_jobs.synthesize_file(
            output,
            overlay=overlay,
            report=report,
            samples=samples,
            seed=seed,
            steps=steps,
            temperature=temperature,
            model=model,
            backend=backend,
            dtype=dtype.value,
            device=device,
            progress=progress,
        )
    show_generation(content)
    tell_written(output, overlay, report)


@app.command()
@one_line_errors
def evaluate(
    pred: Annotated[Path, typer.Option(help="Predicted label volume, or a folder of them.")],
    truth: Annotated[Path, typer.Option(help="True label volume, or a folder with the same names, subfolders too.")],
    report: Annotated[Path | None, typer.Option(help="All scores to write: .json.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Label names, or the report of `segment`: .json.")] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Distance up to which a surface is right, mm.")] = 1.0,
) -> None:
    """Score labels against the truth: Dice, NSD and HD95."""
    with progress_bar("scoring") as progress:
        content = jobs.evaluate_files(pred, truth, report=report, labels=labels, tolerance=tolerance, progress=progress)
    tell_notes(content)
    show_scores(content)


@app.command(context_settings=PASSED_ON, add_help_option=False, options_metavar="SOURCE [OPTIONS]")
@one_line_errors
def prepare(context: typer.Context) -> None:
    """Make a data folder to train on, from a public data set, your own volumes or label maps."""
    from hf_binaryformer.commands.prepare import app as program

    program(context.args, prog_name="binaryformer prepare")


@app.command(context_settings=PASSED_ON, add_help_option=False, options_metavar="--recipe NAME [OPTIONS]")
@one_line_errors
def train(context: typer.Context) -> None:
    """Train a network by a recipe; --help lists the recipes."""
    from hf_binaryformer.commands.train import train as run

    run(context.args)


@app.command()
@one_line_errors
def info() -> None:
    """Show versions, attention backends (and why one is missing), and checkpoints."""
    from hf_binaryformer.kernels import backend_report
    from hf_binaryformer.modeling.pretrained import known_checkpoints, resolve_checkpoint

    table = Table("library", "version")
    for name, version in versions().items():
        table.add_row(name, version)
    show(table)
    out.print("attention backends:")
    for name, state in backend_report().items():
        out.print(f"  {name:<10} {state}", markup=False, highlight=False, soft_wrap=True)
    out.print("packaged checkpoints:" if known_checkpoints() else "packaged checkpoints: none")
    for name in known_checkpoints():
        size = sum(path.stat().st_size for path in resolve_checkpoint(name).rglob("*") if path.is_file())
        out.print(f"  {name:<30} {size / 1e6:.2f} MB", markup=False, highlight=False)


@app.command()
@one_line_errors
def models() -> None:
    """List every known model: what it is for, what it was trained on, its size, and where its weights are."""
    from hf_binaryformer.modeling.catalogue import KNOWN_MODELS
    from hf_binaryformer.modeling.pretrained import PACKAGED, known_checkpoints, local_checkpoint, published_checkpoints

    for name in sorted({*KNOWN_MODELS, *known_checkpoints(), *published_checkpoints()}):
        folder, known = local_checkpoint(name), KNOWN_MODELS.get(name)
        lines = ["not described"]
        if known is not None:
            lines = [f"{known.does}; trained on {known.trained_on}", f"{known.parameters} parameters"]
        if folder is not None:
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            place = "in the package" if folder.parent == PACKAGED else f"in {folder}"
            lines[-1] += f", {size / 1e6:.1f} MB, weights {place}"
        elif known is not None:
            lines[-1] += ", weights not here: on the Hub if they are published"
            lines += [f"train: {known.command}", f"data: {known.data}"]
        out.print(name, style="bold", markup=False, highlight=False)
        for line in lines:
            out.print(f"    {line}", markup=False, highlight=False, soft_wrap=True)


@app.command()
@one_line_errors
def demo(folder: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path("demo")) -> None:
    """Try it on the MNI152 template, an average of real brains."""
    from hf_binaryformer.commands.demo import run_demo

    with progress_bar("segmenting and filling MNI152") as progress:
        content = run_demo(folder, progress=progress)
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
    for name in content["files"]:
        out.print(f"wrote {folder / name}", markup=False, highlight=False, soft_wrap=True)


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


def show(table: Table) -> None:
    """Print a table with numbers aligned to the right; names are not read as markup."""
    for column in table.columns[2:]:
        column.justify = "right"
    out.print(table, markup=False)


def main() -> None:
    """Entry point of the `binaryformer` command."""
    app(prog_name="binaryformer")


if __name__ == "__main__":
    main()
