"""python scripts/reliability/determinism.py --record model_cards/evidence/reliability/determinism.json

What changes a result, with the seed and the inputs as they are: a second process, another number of threads, another batch
size, an interruption. Each way runs in a process of its own; results are compared with those of the first as bytes, and
where they differ by the largest difference.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.numpy import load_file, save_file

from hf_binaryformer.commands.demo import load_mni152
from hf_binaryformer.commands.generation_jobs import DEFAULT_MODEL
from hf_binaryformer.kernels import available_backends, sign_attention
from hf_binaryformer.pipelines.inpainting_scores import make_hole
from hf_binaryformer.pipelines.segmentation import VolumeSegmentationPipeline
from hf_binaryformer.pipelines.volumes import read_volume
from hf_binaryformer.pipelines.vq_inpainting import BinaryVQInpaintPipeline
from hf_binaryformer.training import segmentation
from jobs import JOBS, Job, head, save, save_network
from records import write_record

import vq_cases  # isort: skip  (jobs puts the folder of the tests on the path)

Arrays = dict[str, np.ndarray]
FIRST = {"threads": 1, "batch": 1, "stop": False}
# The name of each way that a run may differ from the first, and what differs.
WAYS: dict[str, dict[str, Any]] = {
    "again": {},
    "2 threads": {"threads": 2},
    "batches of 3": {"batch": 3},
    "batches of 16": {"batch": 16},
    "stopped and resumed": {"stop": True},
}


def attention(folder: Path, batch: int, stop: bool) -> Arrays:
    """Forward and gradients of the operator, each backend."""
    found: Arrays = {}
    for backend in available_backends():
        tensors = []
        for seed, channels in enumerate((48, 48, 24)):
            generator = torch.Generator().manual_seed(seed)
            tensors.append((0.7 * torch.randn(2, 3, 777, channels, generator=generator)).requires_grad_())
        for gradient in ("ste", "ternary"):
            output = sign_attention(*tensors, bit_gradient=gradient, seed=5, backend=backend)
            parts = torch.autograd.grad(output.square().sum(), tensors)
            for name, part in zip(("output", "query", "key", "value"), (output, *parts), strict=True):
                found[f"{backend} {gradient} {name}"] = part.detach().numpy()
    return found


def segment(folder: Path, batch: int, stop: bool) -> Arrays:
    """Labels and probabilities of a volume; ``batch`` windows at once."""
    path = save(head(), folder / "in.nii.gz")
    pipeline = VolumeSegmentationPipeline.from_pretrained(str(save_network(folder / "network")), batch_size=batch)
    output = pipeline(str(path), return_probabilities=True)
    assert output.probabilities is not None
    return {"labels": output.labels, "probabilities": output.probabilities}


def inpaint(folder: Path, batch: int, stop: bool) -> Arrays:
    """Samples of a hole; the first of ``batch`` samples."""
    volume = read_volume(save(head(vq_cases.SHAPE), folder / "in.nii.gz"))
    hole = np.zeros(vq_cases.SHAPE, bool)
    hole[6:14, 8:16, 4:12] = True
    pipeline = vq_cases.inpainting()
    output = pipeline(
        volume, hole, num_samples=batch, generator=torch.Generator().manual_seed(3), num_inference_steps=20
    )
    return {"tokens": output.tokens[:1].numpy(), "volume": np.asarray(output.images[:1])}


def synthesize(folder: Path, batch: int, stop: bool) -> Arrays:
    """The first of ``batch`` volumes."""
    output = vq_cases.synthesis()(batch_size=batch, generator=torch.Generator().manual_seed(3), num_inference_steps=20)
    return {"tokens": output.tokens[:1].numpy(), "volume": np.asarray(output.images[:1])}


def inpaint_template(folder: Path, batch: int, stop: bool) -> Arrays:
    """A hole in the MNI152 template, filled by the packaged pipeline in a few steps."""
    volume = read_volume(load_mni152(folder)[0])
    hole = make_hole(volume.array.shape, volume.spacing, 30.0)
    pipeline = BinaryVQInpaintPipeline.from_pretrained(DEFAULT_MODEL)
    output = pipeline(
        volume, hole, num_samples=batch, generator=torch.Generator().manual_seed(3), num_inference_steps=6
    )
    return {"tokens": output.tokens[:1].numpy(), "volume": np.asarray(output.images[:1])}


def train(folder: Path, batch: int, stop: bool) -> Arrays:
    """Weights after twelve iterations; ``stop``: of two runs, the second of which resumes the first."""
    job: Job = JOBS["train"]
    job.set_up(folder)
    out = folder / "out"
    if stop:
        segmentation.main(
            recipe=str(folder / "toy.yaml"),
            data=folder / "data",
            output=out,
            stop_after=7,
            evaluate="none",
            overrides=["train.iterations=12", "train.checkpoint_every=2", "train.validate_every=4"],
        )
    job.run(folder, out, stop)
    return load_file(out / "model" / "model.safetensors")


# What each kind of result depends on, and so which ways are tried.
RESULTS: dict[str, tuple[Callable[[Path, int, bool], Arrays], tuple[str, ...]]] = {
    "attention": (attention, ("again", "2 threads")),
    "segment": (segment, ("again", "2 threads", "batches of 3", "batches of 16")),
    "inpaint": (inpaint, ("again", "2 threads", "batches of 3")),
    "inpaint, packaged network": (inpaint_template, ("again", "2 threads")),
    "synthesize": (synthesize, ("again", "2 threads", "batches of 3")),
    "train": (train, ("again", "2 threads", "stopped and resumed")),
}


def in_a_process(name: str, way: dict[str, Any], folder: Path) -> Arrays:
    """The result of one way."""
    settings = {**FIRST, **way}
    file = folder / "result.safetensors"
    words = [sys.executable, __file__, "--child", name, "--folder", str(folder), "--batch", str(settings["batch"])]
    words += ["--stop"] if settings["stop"] else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(settings["threads"])}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return load_file(file)


def compare(first: Arrays, second: Arrays) -> dict[str, Any]:
    """How many arrays there are and how many differ; the largest share of elements that differ, and difference."""
    assert first.keys() == second.keys()
    shares, gaps = [], []
    for name, array in first.items():
        if array.tobytes() != second[name].tobytes():
            gap = np.abs(array.astype(np.float64) - second[name].astype(np.float64))
            shares.append(float((gap > 0).mean()))
            gaps.append(float(gap.max()))
    return {
        "arrays": len(first),
        "differ": len(gaps),
        "largest_share": max(shares, default=0.0),
        "largest_difference": max(gaps, default=0.0),
    }


def measure(name: str, chosen: Collection[str] = WAYS.keys()) -> dict[str, Any]:
    """What differs, for each way (of those chosen) that a kind of result may depend on."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        first = in_a_process(name, {}, folder)
        return {way: compare(first, in_a_process(name, WAYS[way], folder)) for way in RESULTS[name][1] if way in chosen}


def main(
    child: Annotated[str | None, typer.Option(hidden=True)] = None,
    folder: Annotated[Path | None, typer.Option(hidden=True)] = None,
    batch: Annotated[int, typer.Option(hidden=True)] = 1,
    stop: Annotated[bool, typer.Option("--stop", hidden=True)] = False,
    record: Annotated[Path | None, typer.Option(help="Figures to write: .json.")] = None,
) -> None:
    """Measure."""
    if child is not None:
        assert folder is not None
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        arrays = RESULTS[child][0](folder, batch, stop)
        save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, folder / "result.safetensors")
        return
    figures = {}
    for name in RESULTS:
        figures[name] = measure(name)
        for way, found in figures[name].items():
            typer.echo(f"{name}, {way}: {found if found['differ'] else 'the same bytes'}")
    write_record(record, 0, {"command": "python scripts/reliability/determinism.py", "results": figures})


if __name__ == "__main__":
    typer.run(main)
