"""The jobs that are disturbed, at toy size: each takes about a second, and its results can be compared byte for byte."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

ROOT = Path(__file__).parents[2]
# The toy data and networks are those of the tests.
sys.path.append(str(ROOT / "tests"))

import toys  # noqa: E402
import vq_cases  # noqa: E402

from hf_binaryformer.commands import generation_jobs, jobs  # noqa: E402
from hf_binaryformer.data import decathlon, shards  # noqa: E402
from hf_binaryformer.data.decathlon import GroupRule  # noqa: E402
from hf_binaryformer.data.folder_writer import NewCase, new_folder, write_case, write_dataset, write_manifest  # noqa: E402
from hf_binaryformer.modeling.configuration import BinaryFormerConfig  # noqa: E402
from hf_binaryformer.modeling.image_processing import BinaryFormerImageProcessor  # noqa: E402
from hf_binaryformer.modeling.networks import BinaryFormerForSemanticSegmentation  # noqa: E402
from hf_binaryformer.training import segmentation  # noqa: E402
from hf_binaryformer.training.checkpoints import FOLDER, PARTIAL, find_damage  # noqa: E402

# What differs between two runs of the same work.
CLOCKS = {"seconds", "sampling_seconds"}
TRAIN_SETTINGS = ["train.iterations=12", "train.checkpoint_every=2", "train.validate_every=4"]
# Number of the first case that `pack` makes; a file of this name changes what it writes.
FIRST = "first"


@dataclass(frozen=True)
class Job:
    """One kind of work.

    Args:
        name: for the record.
        set_up: writes the inputs into a folder.
        run: ``run(inputs, out, again)`` works; ``again``: after a run that was cut short.
        is_folder: the result is ``out`` itself, which is whole or absent; otherwise each file in ``out`` is.
    """

    name: str
    set_up: Callable[[Path], None]
    run: Callable[[Path, Path, bool], None]
    is_folder: bool = False


def head(shape: tuple[int, int, int] = (40, 48, 40)) -> np.ndarray:
    """A ball with a brighter core in noise, float32."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    distance = np.sqrt(sum(axis**2 for axis in axes))
    noise = np.random.default_rng(0).normal(0, 2, shape)
    return ((distance < 0.8) * 60 + (distance < 0.4) * 40 + noise * (distance < 0.8)).astype(np.float32)


def save(array: np.ndarray, path: Path) -> Path:
    """A NIfTI file with voxels of 2 mm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 2.0, 1.0])), path)
    return path


def save_network(folder: Path) -> Path:
    """A segmentation network with random weights."""
    torch.manual_seed(0)
    config = BinaryFormerConfig(
        image_size=32,
        num_channels=3,
        hidden_size=48,
        num_heads=3,
        value_head_dim=4,
        num_hidden_layers=1,
        decoder_hidden_size=64,
        attention_type="sign",
        id2label={0: "background", 1: "shell", 2: "core"},
    )
    BinaryFormerForSemanticSegmentation(config).save_pretrained(folder)
    processor = BinaryFormerImageProcessor(num_slices=3, slice_axis=1, spacing=(2, 2, 2), image_size=(32, 32))
    processor.save_pretrained(folder)
    return folder


def set_up_segment(folder: Path) -> None:
    """A volume and a network."""
    save(head(), folder / "in.nii.gz")
    save_network(folder / "network")


def segment(inputs: Path, out: Path, again: bool) -> None:
    """`binaryformer segment` with all its results."""
    out.mkdir(exist_ok=True)
    jobs.segment_file(
        inputs / "in.nii.gz",
        out / "labels.nii.gz",
        overlay=out / "labels.png",
        report=out / "report.json",
        probabilities=out / "probabilities.nii.gz",
        model=str(inputs / "network"),
    )


def set_up_inpaint(folder: Path) -> None:
    """A volume, a hole and a pipeline."""
    save(head(vq_cases.SHAPE), folder / "in.nii.gz")
    hole = np.zeros(vq_cases.SHAPE, np.uint8)
    hole[6:14, 8:16, 4:12] = 1
    save(hole, folder / "hole.nii.gz")
    vq_cases.save_checkpoint(folder / "network")


def inpaint(inputs: Path, out: Path, again: bool) -> None:
    """`binaryformer inpaint` with all its results."""
    out.mkdir(exist_ok=True)
    generation_jobs.inpaint_file(
        inputs / "in.nii.gz",
        inputs / "hole.nii.gz",
        out / "filled.nii.gz",
        std_map=out / "std.nii.gz",
        overlay=out / "filled.png",
        report=out / "report.json",
        samples=2,
        steps=40,
        model=str(inputs / "network"),
    )


def set_up_prepare(folder: Path) -> None:
    """Six volumes in the Decathlon's layout."""
    for number in range(6):
        image = head() + np.random.default_rng(number).normal(0, 1, head().shape).astype(np.float32)
        save(image, folder / "imagesTr" / f"hippocampus_{number:03d}.nii.gz")
        save((image > 60).astype(np.uint8), folder / "labelsTr" / f"hippocampus_{number:03d}.nii.gz")


def prepare(inputs: Path, out: Path, again: bool) -> None:
    """`binaryformer prepare hippocampus`."""
    if is_complete(out):
        return
    decathlon.prepare_decathlon(
        inputs, out, test_fraction=0.3, validation_fraction=0.3, group_rule=GroupRule.none, seed=0, qc_every=3
    )


def is_complete(out: Path) -> bool:
    """Whether a prepared folder needs no second run."""
    return (out / "manifest.json").is_file()


def build(out: Path, case: NewCase) -> dict[str, Any]:
    """One case of :func:`pack`."""
    rng = np.random.default_rng(case.inputs[0])
    values = rng.integers(0, 900, (40, 40, 30)).astype(np.int16), rng.integers(0, 2, (40, 40, 30)).astype(np.uint8)
    image, labels = (nib.Nifti1Image(array, np.diag([1, 2, 3, 1])) for array in values)
    return write_case(out, case, image, labels, {})


MANIFEST = {"name": "toy", "source": "a test", "licence": "CC BY 4.0", "label_names": {"0": "background", "1": "one"}}


def pack(inputs: Path, out: Path, again: bool) -> None:
    """Prepare with Parquet shards, of one volume each."""
    splits = ["train"] * 6 + ["validation"] * 2 + ["test"] * 2
    first = int((inputs / FIRST).read_text()) if (inputs / FIRST).is_file() else 0
    cases = [NewCase(f"c{n}", f"patient {n}", split, (first + n,)) for n, split in enumerate(splits)]
    if not is_complete(out):
        write_dataset(out, cases, build, MANIFEST, 1, 0, shard_mb=1)


def set_up_unpack(folder: Path) -> None:
    """A folder with shards."""
    pack(folder, folder / "packed", False)


def unpack(inputs: Path, out: Path, again: bool) -> None:
    """`binaryformer prepare shards`."""
    if not is_complete(out):
        with new_folder(out) as folder:
            write_manifest(folder, shards.read_shards(inputs / "packed" / "shards", folder))


def set_up_train(folder: Path) -> None:
    """A prepared folder and a recipe."""
    (folder / "data").mkdir()
    toys.write_segmentation_data(folder / "data")
    toys.write_segmentation_recipe(folder / "toy.yaml")


def train(inputs: Path, out: Path, again: bool) -> None:
    """`binaryformer train`: twelve iterations with six checkpoints, validations and an evaluation."""
    segmentation.main(
        recipe=str(inputs / "toy.yaml"),
        data=inputs / "data",
        output=out,
        resume=again and any((out / FOLDER).glob("step_????????")),
        evaluate="test",
        overrides=TRAIN_SETTINGS,
    )


def nothing(folder: Path) -> None:
    """No inputs."""


JOBS = {
    job.name: job
    for job in (
        Job("segment", set_up_segment, segment),
        Job("inpaint", set_up_inpaint, inpaint),
        Job("prepare", set_up_prepare, prepare, is_folder=True),
        Job("pack", nothing, pack, is_folder=True),
        Job("unpack", set_up_unpack, unpack, is_folder=True),
        Job("train", set_up_train, train),
    )
}


def without_clocks(value: Any) -> Any:
    """JSON without the times that it took."""
    if isinstance(value, dict):
        return {key: without_clocks(item) for key, item in value.items() if key not in CLOCKS}
    if isinstance(value, list):
        return [without_clocks(item) for item in value]
    return value


def results(out: Path) -> dict[str, Any]:
    """Content of all files under their final names; no hidden files, no logs, and no checkpoints, which have hashes."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        hidden = any(part.startswith(".") for part in Path(name).parts)
        if hidden or not path.is_file() or name.startswith(FOLDER) or path.suffix == ".jsonl":
            continue
        content = path.read_bytes()
        found[name] = without_clocks(json.loads(content)) if path.suffix == ".json" else content
    return found


def faults(job: Job, out: Path, undisturbed: dict[str, Any]) -> list[str]:
    """What is wrong in ``out`` after a run that was cut short: files that are there, but not whole."""
    found = results(out) if out.exists() else {}
    wrong = [f"{name} is not whole" for name, content in found.items() if content != undisturbed.get(name)]
    if job.is_folder and found and found.keys() != undisturbed.keys():
        wrong.append(f"only {len(found)} of {len(undisturbed)} files are in the folder")
    for checkpoint in sorted((out / FOLDER).glob("step_*")):
        if not checkpoint.name.endswith(PARTIAL) and (damage := find_damage(checkpoint)):
            wrong.append(f"{checkpoint.name}: {damage}")
    return wrong
