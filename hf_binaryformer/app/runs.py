"""The two jobs of the page. Both call what the commands call, so that files are the same bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_binaryformer.app.limits import suffix_of
from hf_binaryformer.app.workspace import Job, Workspace
from hf_binaryformer.commands import generation_jobs, jobs
from hf_binaryformer.commands.scan_tables import Row, write_csv
from hf_binaryformer.pipelines.provenance import NOTICE

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Networks:
    """Which networks the page runs, and how.

    Args:
        model: labels volumes; short name, folder or Hub id.
        inpaint_model: fills holes; likewise.
        backend: of Hamming attention; None leaves the choice to the operator.
        device: torch device; None takes CUDA if it is available, otherwise the CPU.
    """

    model: str = jobs.DEFAULT_MODEL
    inpaint_model: str = generation_jobs.DEFAULT_MODEL
    backend: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class Result:
    """What a job made.

    Args:
        report: as the command's ``--report`` has it.
        files: what can be fetched, by what it is called on the page.
    """

    report: dict[str, Any]
    files: dict[str, Path] = field(default_factory=dict)


def stem_of(source: Path) -> str:
    """A scan's name without its ending."""
    suffix = suffix_of(source.name)
    return source.name[: -len(suffix)] if suffix else source.name


def run_segmentation(
    workspace: Workspace,
    networks: Networks,
    progress: Progress,
    *,
    views: str | None = None,
    keep_largest: bool = False,
) -> Result:
    """Label the scan of a workspace, as `binaryformer segment` does.

    Args:
        workspace: with a scan, and a job "segment" that was announced.
        networks: which network.
        progress: called with (slices done, all slices).
        views: "sagittal", "coronal", "axial" or "all"; None: as the checkpoint says.
        keep_largest: keep the largest piece of each structure only; False: as the checkpoint says.

    Returns:
        Files "NIfTI", "CSV" and "PNG".

    Raises:
        CancelledError: the visitor cancelled.
        ValueError, OSError: as for :func:`~hf_binaryformer.commands.jobs.segment_file`.
    """
    with workspace.job("segment") as job:
        source, _ = workspace.scan()
        stem = stem_of(source)
        labels, picture, table = (job.folder / f"{stem}_labels{end}" for end in (".nii.gz", ".png", ".csv"))
        report = jobs.segment_file(
            source,
            labels,
            overlay=picture,
            dtype="auto",
            model=networks.model,
            backend=networks.backend,
            device=networks.device,
            views=views,
            keep_largest=keep_largest or None,
            progress=stopping(job, progress),
        )
        # The folder that it lies in is nobody's business.
        report = {**report, "input": source.name}
        write_csv(table, [Row.of(stem, report, picture)])
        return Result(report, {"NIfTI": labels, "CSV": table, "PNG": picture})


def write_hole(workspace: Workspace, centre: Sequence[float], size: Sequence[float], form: str) -> Path:
    """Write a drawn hole as the workspace's mask, on the scan's own grid.

    Args and raised errors as for :func:`~hf_binaryformer.app.holes.hole_mask`.
    """
    from hf_binaryformer.app.holes import hole_mask
    from hf_binaryformer.pipelines.volumes import write_labels

    _, volume = workspace.scan()
    mask = hole_mask(volume, centre, size, form)
    path = write_labels(workspace.new_mask_folder() / "hole.nii.gz", mask, volume, description=NOTICE)
    return workspace.set_mask(path)


def run_inpainting(
    workspace: Workspace,
    networks: Networks,
    progress: Progress,
    *,
    samples: int = 1,
    steps: int = generation_jobs.DEFAULT_STEPS,
    temperature: float = generation_jobs.DEFAULT_TEMPERATURE,
    feather: int = 0,
    seed: int = 0,
) -> Result:
    """Fill the hole of a workspace's scan, as `binaryformer inpaint` does.

    Args:
        workspace: with a scan and a mask, and a job "inpaint" that was announced.
        networks: which network.
        progress: called with (steps done, all steps).
        samples, steps, temperature, feather, seed: as for :func:`~hf_binaryformer.commands.generation_jobs.inpaint_file`.

    Returns:
        Files "NIfTI", "mask" and "PNG", and "std" for two samples or more.

    Raises:
        CancelledError: the visitor cancelled.
        ValueError, OSError: there is no hole, or as for ``inpaint_file``.
    """
    with workspace.job("inpaint") as job:
        source, _ = workspace.scan()
        if workspace.mask is None:
            raise ValueError("there is no hole yet: click into the scan and press 'Set the hole', or upload a mask")
        stem = stem_of(source)
        filled, picture = job.folder / f"{stem}_filled.nii.gz", job.folder / f"{stem}_filled.png"
        std = job.folder / f"{stem}_std.nii.gz" if samples > 1 else None
        report = generation_jobs.inpaint_file(
            source,
            workspace.mask,
            filled,
            std_map=std,
            overlay=picture,
            samples=samples,
            seed=seed,
            steps=steps,
            temperature=temperature,
            feather=feather,
            model=networks.inpaint_model,
            backend=networks.backend,
            device=networks.device,
            progress=stopping(job, progress),
        )
        files = {"NIfTI": filled, "std": std, "mask": workspace.mask, "PNG": picture}
        return Result(report, {name: path for name, path in files.items() if path is not None})


def stopping(job: Job, progress: Progress) -> Progress:
    """The same progress, which ends a job that is no longer wanted."""

    def step(done: int, total: int) -> None:
        job.check()
        progress(done, total)

    return step
