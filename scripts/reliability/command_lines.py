"""The jobs as commands: what a user would type, run with the code of the command line and its messages."""

from __future__ import annotations

import sys
from pathlib import Path

from hf_binaryformer import cli
from jobs import FOLDER, TRAIN_SETTINGS, Job, is_complete


def has_checkpoints(out: Path) -> bool:
    """Whether a training has something to go on from."""
    return any((out / FOLDER).glob("step_????????"))


def command_line(job: Job, inputs: Path, out: Path, again: bool) -> list[str] | None:
    """The words behind ``binaryformer``; None: the job has no command of its own."""
    if job.name == "segment":
        words = ["segment", inputs / "in.nii.gz", "-o", out / "labels.nii.gz", "--overlay", out / "labels.png"]
        words += ["--report", out / "report.json", "--probabilities", out / "probabilities.nii.gz"]
        words += ["--model", inputs / "network"]
    elif job.name == "inpaint":
        words = ["inpaint", inputs / "in.nii.gz", "--mask", inputs / "hole.nii.gz", "-o", out / "filled.nii.gz"]
        words += ["--std-map", out / "std.nii.gz", "--overlay", out / "filled.png", "--report", out / "report.json"]
        words += ["--samples", "2", "--steps", "40", "--model", inputs / "network"]
    elif job.name == "prepare":
        words = ["prepare", "hippocampus", "--source", inputs, "--out", out, "--test-fraction", "0.3"]
        words += ["--validation-fraction", "0.3", "--group-rule", "none", "--qc-every", "3"]
    elif job.name == "unpack":
        words = ["prepare", "shards", "--source", inputs / "packed" / "shards", "--out", out]
    elif job.name == "train":
        words = ["train", "--recipe", inputs / "toy.yaml", "--data", inputs / "data", "--output", out]
        words += [word for setting in TRAIN_SETTINGS for word in ("--set", setting)]
        words += ["--resume"] if again and has_checkpoints(out) else []
    else:
        return None
    return [str(word) for word in words]


def run_command(job: Job, inputs: Path, out: Path, again: bool = False) -> None:
    """Run a job through the command line; ends by SystemExit, or by whatever the command line lets through."""
    if again and job.is_folder and is_complete(out):
        return
    if not job.is_folder:
        out.mkdir(exist_ok=True)
    words = command_line(job, inputs, out, again)
    if words is None:
        cli.one_line_errors(job.run)(inputs, out, again)
        return
    sys.argv = ["binaryformer", *words]
    cli.main()
