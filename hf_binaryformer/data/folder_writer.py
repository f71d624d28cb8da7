"""Writes a prepared folder: splits its cases, writes all files or none, checks for leaks, and draws pictures.

The folder holds images/CASE.nii.gz and, where there are labels, labels/CASE.nii.gz on the same grid, both in RAS order.
It also holds manifest.json, qc/CASE.png and, if requested, shards/. Intensities are those of the source. ``slices.py``
and ``patches.py`` scale them by the recipe's percentiles when they load a volume; nothing scales them before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import multiprocessing
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import nibabel as nib
import numpy as np
import typer
from rich.progress import track

from hf_binaryformer.data.claims import claimed_folder, remove, remove_left_behind
from hf_binaryformer.data.hashing import file_hash
from hf_binaryformer.data.leakage import LeakageReport, check_leakage
from hf_binaryformer.data.prepared_folder import SPLITS
from hf_binaryformer.data.shards import write_shards
from hf_binaryformer.pipelines.overlay import label_overlay
from hf_binaryformer.pipelines.volumes import read_volume
from hf_binaryformer.pipelines.whole_files import writing

# Number of warnings that are printed; the manifest has all of them.
SHOWN_WARNINGS = 10
PARTS, MANIFEST = ("images", "labels", "qc", "shards"), "manifest.json"


@dataclasses.dataclass(frozen=True)
class NewCase:
    """One row of the manifest before its files exist; `inputs` is what its builder needs."""

    case: str
    group: str
    split: str
    inputs: tuple[Any, ...]


def write_case(out: Path, case: NewCase, image: nib.Nifti1Image, labels: nib.Nifti1Image | None, drawn: dict) -> dict:
    """Save the volumes and return the manifest's row, which has no key "label" where there are no labels."""
    row: dict[str, Any] = {"case": case.case, "group": case.group, "split": case.split}
    for kind, volume in (("image", image), ("label", labels)):
        if volume is not None:
            path = Path(f"{kind}s") / f"{case.case}.nii.gz"
            nib.save(volume, out / path)
            row[kind] = path.as_posix()
            row[f"{kind}_sha256"] = file_hash(out / path)
    spacing = [round(float(size), 6) for size in image.header.get_zooms()[:3]]
    return row | {"shape": list(image.shape), "spacing": spacing} | drawn


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a hidden folder that becomes ``out`` at the end, or is deleted after an error.

    It is beside ``out``, and one rename puts it in place. If ``out`` is a mount, which cannot be replaced, it is inside,
    and its content moves up. What killed runs have left there is deleted first.

    Raises:
        typer.Exit: ``out`` holds files, at the start or, from another run, at the end.
        WriteError: the disk is full, or the folder cannot be written to.
    """
    whole = Path(os.path.abspath(out))
    inside = whole.is_dir() and os.path.ismount(whole)
    place = whole if inside else whole.parent
    with writing(out):
        place.mkdir(parents=True, exist_ok=True)
    if remove_left_behind(place, f".{whole.name}-") and inside:
        # A run was killed while its folders moved up; before, there was nothing here.
        for name in (*PARTS, MANIFEST):
            remove(whole / name)
    if whole.exists() and (not whole.is_dir() or any(whole.iterdir())):
        fail(f"{out} is not empty; give --out a new folder, so that no old case stays in it")
    with writing(out), claimed_folder(place, f".{whole.name}-") as temporary:
        yield temporary
        try:
            if not inside:
                os.rename(temporary, whole)
                return
            # The manifest comes last: a folder that has it is complete.
            for child in sorted(temporary.iterdir(), key=lambda path: path.name == MANIFEST):
                child.rename(whole / child.name)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            fail(f"{out} was filled by another run meanwhile, which is left as it is; give --out a new folder")


def write_dataset(
    out: Path,
    cases: list[NewCase],
    build: Callable[[Path, NewCase], dict],
    manifest: dict,
    workers: int,
    qc_every: int,
    shard_mb: int | None = None,
) -> dict:
    """Build every case, check for leaks, and write the complete folder or nothing.

    Args:
        out: new or empty folder.
        cases: what to build; their groups decide what a leak is.
        build: writes one case into the given folder and returns its row; runs in a worker process.
        manifest: its keys other than ``command``, ``leakage`` and ``cases``.
        workers: processes.
        qc_every: a picture for every n-th case; 0: none.
        shard_mb: size of a Parquet shard in 10⁶ bytes; None: no shards.

    Returns:
        The manifest.

    Raises:
        typer.Exit: ``out`` is not empty, or a group or file is in two splits.
    """
    with new_folder(out) as folder:
        for name in ("images", "labels", "qc"):
            (folder / name).mkdir()
        counts = {split: sum(case.split == split for case in cases) for split in SPLITS}
        typer.echo(
            f"{len(cases)} volumes -> {out}: " + ", ".join(f"{count} {split}" for split, count in counts.items())
        )
        tell_empty_splits(counts)
        rows = run_all(build, [folder] * len(cases), cases, workers=workers, description="Preparing")
        report = check_leakage(folder, rows)
        show_leakage(report)
        if report.errors:
            fail(f"{out} would leak: remove all but one of these files from the source, or put them into one group")
        for row in rows[::qc_every] if qc_every else []:
            write_qc(folder, row, manifest["label_names"])
        leakage = {"warnings": report.warnings, "statistics": report.statistics}
        manifest = manifest | {"leakage": leakage, "cases": rows}
        if shard_mb is not None:
            write_shards(folder, manifest, shard_mb)
        write_manifest(folder, manifest)
    return manifest


def tell_empty_splits(counts: Mapping[str, int]) -> None:
    """Warn of what a training cannot do."""
    lost = {
        "train": "nothing can be trained",
        "validation": "train.validate_every and train.best_by cannot be used",
        "test": "the training ends without a score on whole volumes",
    }
    for split in (split for split in SPLITS if not counts[split]):
        typer.echo(
            f"Warning: no volume is left for {split}, so {lost[split]}; give more volumes, or other fractions", err=True
        )


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json, with the command that started this process."""
    script, *words = sys.argv
    # For `binaryformer` only the bare name: its installation path describes a machine, not the data.
    is_command = script.endswith(("binaryformer", "hf_binaryformer/__main__.py"))
    program = ["binaryformer"] if is_command else ["python", script]
    whole = {"command": shlex.join([*program, *words])} | manifest
    (folder / MANIFEST).write_text(json.dumps(whole, indent=1) + "\n")


def run_all(function: Callable[..., Any], *arguments: Sequence[Any], workers: int, description: str) -> list[Any]:
    """``map`` with a progress bar, in ``workers`` processes."""
    total = len(arguments[0])

    def progress(results: Iterable[Any]) -> list[Any]:
        return list(track(results, description=description, total=total))

    if workers > 1:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            return progress(pool.map(function, *arguments))
    return progress(map(function, *arguments))


def show_leakage(report: LeakageReport) -> None:
    """Print intensity statistics of each split, warnings, and errors."""
    for split, figures in report.statistics.items():
        shown = {
            key: f"{figures[key]:g}" + (f" ± {figures[f'{key}_sd']:g}" if f"{key}_sd" in figures else "")
            for key in ("mean", "deviation")
        }
        typer.echo(
            f"{split}: {figures['volumes']} volume{'s' if figures['volumes'] != 1 else ''}, intensities above the lowest: "
            f"mean {shown['mean']}, deviation {shown['deviation']}"
        )
    for warning in report.warnings[:SHOWN_WARNINGS]:
        typer.echo(f"Warning: {warning}", err=True)
    if len(report.warnings) > SHOWN_WARNINGS:
        typer.echo(f"Warning: {len(report.warnings) - SHOWN_WARNINGS} more such pairs", err=True)
    for error in report.errors:
        typer.echo(f"Leak: {error}", err=True)


def fail(message: str) -> NoReturn:
    """Print an error message and exit."""
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(2)


def write_qc(out: Path, row: dict[str, Any], label_names: dict[int, str]) -> None:
    """Write qc/CASE.png: three views through the centre of the labels, or of the volume if there are no labels."""
    image = read_volume(out / row["image"])
    labels = np.zeros(image.array.shape, np.uint8)
    if "label" in row:
        labels = read_volume(out / row["label"], labels=True).array
    picture = label_overlay(image.array, labels, image.spacing, label_names, title=row["case"], max_width=900)
    picture.save(out / "qc" / f"{row['case']}.png")


def split_groups(groups: list[str], test_fraction: float, validation_fraction: float, seed: int) -> dict[str, str]:
    """Assign every group to a split.

    The groups are shuffled. Whole groups go to test until `test_fraction` of all cases is reached, then to validation
    until `validation_fraction` of the remaining cases is reached.
    """
    sizes = {group: groups.count(group) for group in sorted(set(groups))}
    order = [list(sizes)[index] for index in np.random.default_rng(seed).permutation(len(sizes))]
    test_size = round(test_fraction * len(groups))
    targets = {"test": test_size, "validation": round(validation_fraction * (len(groups) - test_size))}
    splits: dict[str, str] = {}
    for split, target in targets.items():
        taken = 0
        for group in order:
            if taken < target and group not in splits:
                splits[group] = split
                taken += sizes[group]
    return {group: splits.get(group, "train") for group in order}
