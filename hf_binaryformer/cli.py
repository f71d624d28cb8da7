"""The command line, `binaryformer`: what is typed, shown and refused; :mod:`hf_binaryformer.commands` does the work."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from glob import has_magic
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec

import typer

# Everything heavy (torch, monai, transformers) is imported inside the commands, so that --help answers at once.
from hf_binaryformer.commands import generation_jobs, jobs
from hf_binaryformer.commands.choices import (
    Backend,
    Device,
    DType,
    HeadOnly,
    KeepLargest,
    Mirror,
    Model,
    NumberFormat,
    Samples,
    Seed,
    Selection,
    Steps,
    Temperature,
    Views,
)
from hf_binaryformer.commands.display import (
    err,
    progress_bar,
    scans_bar,
    show_demo,
    show_generation,
    show_info,
    show_models,
    show_scores,
    show_volumes,
    tell,
    tell_address,
    tell_error,
    tell_notes,
    tell_written,
)
from hf_binaryformer.commands.outputs import TRACEBACK_VARIABLE
from hf_binaryformer.pipelines.provenance import versions

P = ParamSpec("P")

app = typer.Typer(
    name="binaryformer",
    help="1-bit vision transformers for medical volumes. Research only, not for clinical use.",
    epilog=f"An error is told in one line; with {TRACEBACK_VARIABLE}=1 in the environment, with its traceback.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

# For commands that pass their arguments on to another program; that program is imported only then.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


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
    tell_error(str(error))
    raise typer.Exit(1) from None


@app.command()
@one_line_errors
def segment(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="IN...",
            help="NIfTI, .mha, .mhd, .nrrd or .mgz files, DICOM folders, BIDS folders, folders of any of these, or patterns.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Label volume to write: .nii.gz, .nii or .mha. For many scans: a folder."),
    ],
    overlay: Annotated[Path | None, typer.Option(help="Picture of the labels on the image to write: .png.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Label volumes, quality, settings, versions to write: .json.")
    ] = None,
    probabilities: Annotated[Path | None, typer.Option(help="4D volume of probabilities to write: .nii.gz.")] = None,
    views: Annotated[
        Views | None,
        typer.Option(
            help="Slices that the network sees; all averages three views, in 3 times the time.  [default: model's]"
        ),
    ] = None,
    mirror: Mirror = None,
    keep_largest: KeepLargest = None,
    head_only: HeadOnly = None,
    skip_existing: Annotated[
        bool,
        typer.Option(
            "--skip-existing", help="Leave out scans that the folder has whole results of, made the same way."
        ),
    ] = False,
    bids_suffix: Annotated[str, typer.Option(help="Which scans of a BIDS folder: T1w, T2w, FLAIR.")] = "T1w",
    model: Model = jobs.DEFAULT_MODEL,
    backend: Backend = None,
    dtype: NumberFormat = DType.auto,
    device: Device = None,
) -> None:
    """Segment a volume, or many; labels come back on the grid of each.

    One scan and -o FILE: the labels, and what else is asked for.

    Several scans, or -o FOLDER: labels, a report and a picture of each, volumes.csv with ml and quality scores, report.html to
    look through. A scan that fails does not stop the others.
    """
    options: dict[str, Any] = {
        "model": model,
        "backend": backend,
        "dtype": dtype.value,
        "device": device,
        "views": views.value if views else None,
        "mirror": mirror,
        "keep_largest": keep_largest,
        "head_only": head_only,
    }
    # A volume's name has an ending; whoever types none means a folder.
    one = len(sources) == 1 and output.suffix and not output.is_dir()
    if not one or not (sources[0].exists() or not has_magic(str(sources[0]))):
        if overlay or report or probabilities:
            raise ValueError(
                f"--overlay, --report and --probabilities go with one scan and -o FILE; in the folder '{output}', each scan has "
                f"a report and a picture anyway: leave them out"
            )
        segment_many(sources, output, skip_existing=skip_existing, bids_suffix=bids_suffix, **options)
        return
    if skip_existing:
        raise ValueError(f"--skip-existing goes with a folder of results, -o is the file '{output}': leave it out")
    with progress_bar("segmenting") as progress:
        content = jobs.segment_file(
            sources[0],
            output,
            overlay=overlay,
            report=report,
            probabilities=probabilities,
            progress=progress,
            **options,
        )
    tell_notes(content)
    show_volumes(content)
    tell_written(output, probabilities, overlay, report)


def segment_many(sources: list[Path], output: Path, **options: Any) -> None:
    """Segment scans into a folder; exit with 1 if one of them failed."""
    from hf_binaryformer.commands.many_scans import segment_scans
    from hf_binaryformer.pipelines.volumes import OUTPUT_SUFFIXES

    if output.name.lower().endswith(OUTPUT_SUFFIXES) and not output.is_dir():
        raise ValueError(f"-o is '{output}', expected a folder for several scans: leave out its ending")

    def finished(name: str, content: Mapping[str, Any]) -> None:
        tell_notes({"notes": [f"{name}: {note}" for note in content["notes"]]})
        if not err.is_terminal:
            err.print(f"{name}: {content['seconds']:.1f} s", markup=False, highlight=False, soft_wrap=True)

    with scans_bar() as progress:
        content = segment_scans(sources, output, progress=progress, finished=finished, **options)
    tell_notes(content)
    for name, why in content["failed"]:
        tell_error(f"{name}: {why}")
    counts = {what: len(content[what]) for what in ("segmented", "skipped", "failed")}
    tell(", ".join(f"{n} {what}" for what, n in counts.items()))
    tell_written(content["table"], content["page"])
    if content["failed"]:
        raise typer.Exit(1)


@app.command()
@one_line_errors
def inpaint(
    source: Annotated[Path, typer.Argument(metavar="IN", help="NIfTI, .mgz, .mha, .mhd, .nrrd file, or DICOM folder.")],
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
    truth: Annotated[Path, typer.Option(help="True label volume, or a folder with such names, subfolders too.")],
    report: Annotated[Path | None, typer.Option(help="All scores to write: .json.")] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Label names, or the report of `segment`: .json; or the word freesurfer.")
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Distance up to which a surface is right, mm.")] = 1.0,
    merge_sides: Annotated[bool, typer.Option("--merge-sides", help="Score left and right as one structure.")] = False,
    map_pred: Annotated[Path | None, typer.Option(help="New labels of the prediction: .json, .csv, or aseg.")] = None,
    map_truth: Annotated[Path | None, typer.Option(help="The same for the truth; * stands for all others.")] = None,
) -> None:
    """Score labels against the truth: Dice, NSD and HD95."""
    with progress_bar("scoring") as progress:
        content = jobs.evaluate_files(
            pred,
            truth,
            report=report,
            labels=labels,
            tolerance=tolerance,
            merge_sides=merge_sides,
            map_pred=map_pred,
            map_truth=map_truth,
            progress=progress,
        )
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

    show_info(versions(), backend_report(), {name: resolve_checkpoint(name) for name in known_checkpoints()})


@app.command()
@one_line_errors
def models() -> None:
    """List every known model: what it is for, what it was trained on, its size, and where its weights are."""
    from hf_binaryformer.modeling.catalogue import KNOWN_MODELS
    from hf_binaryformer.modeling.pretrained import PACKAGED, known_checkpoints, local_checkpoint, published_checkpoints

    names = sorted({*KNOWN_MODELS, *known_checkpoints(), *published_checkpoints()})
    show_models({name: (KNOWN_MODELS.get(name), local_checkpoint(name)) for name in names}, PACKAGED)


@app.command()
@one_line_errors
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path("demo"),
    model: Model = jobs.DEFAULT_MODEL,
) -> None:
    """Try it on the MNI152 template, an average of real brains."""
    from hf_binaryformer.commands.demo import run_demo

    with progress_bar("segmenting and filling MNI152") as progress:
        content = run_demo(folder, model=model, progress=progress)
    show_demo(content)
    tell_written(*(folder / name for name in content["files"]))


@app.command("app")
@one_line_errors
def serve(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 takes a free one.")] = 7860,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    share: Annotated[bool, typer.Option("--share", help="Public address by way of Gradio's servers.")] = False,
    max_mb: Annotated[int, typer.Option(min=1, help="Largest file that the page takes.")] = 500,
    model: Model = jobs.DEFAULT_MODEL,
    inpaint_model: Model = generation_jobs.DEFAULT_MODEL,
    backend: Backend = None,
    device: Device = None,
) -> None:
    """Serve a web page to segment, inpaint and look; Ctrl-C ends it and deletes its files."""
    from hf_binaryformer.app import runs
    from hf_binaryformer.app import serve as page

    networks, limits = runs.Networks(model, inpaint_model, backend, device), page.Limits(max_mb)
    page.serve(host=host, port=port, share=share, networks=networks, limits=limits, started=tell_address)


def main() -> None:
    """Entry point of the `binaryformer` command."""
    app(prog_name="binaryformer")
