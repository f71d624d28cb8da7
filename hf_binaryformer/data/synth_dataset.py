"""A data set of synthesised brains: the splits of the anatomies, and the number of images drawn of each."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import Any

import nibabel as nib
import torch
import yaml

from hf_binaryformer.data.folder_writer import NewCase, write_case, write_dataset
from hf_binaryformer.data.synth_brain import LABEL_NAMES, SynthSettings, read_anatomy, synthesize

SETTINGS = Path(__file__).parent / "synth_settings"


class Contrast(StrEnum):
    """Contrast of the training volumes; validation and test volumes are T1-like."""

    t1 = "t1"
    random = "random"
    mixed = "mixed"


class Skull(StrEnum):
    """Whether volumes keep the tissues around the brain; ``both``: every second variant keeps them."""

    with_ = "with"
    without = "without"
    both = "both"


def build_brain(out: Path, case: NewCase) -> dict:
    """Synthesise one case; runs in a worker process."""
    torch.set_num_threads(1)  # one process per core is faster than threads inside each volume
    path, seed, contrast, skull, mild, settings = case.inputs
    volume = synthesize(read_anatomy(path), seed, contrast=contrast, skull=skull, mild=mild, settings=settings)
    image, labels = (nib.Nifti1Image(array, volume.affine) for array in (volume.image, volume.labels))
    for nifti in (image, labels):
        nifti.header.set_xyzt_units("mm")
    return write_case(out, case, image, labels, {"skull": skull} | volume.drawn)


def read_settings(path: Path | None) -> SynthSettings:
    """The generator's ranges: the defaults, overridden by those of a .yaml file.

    Args:
        path: the file, or the name of one in ``synth_settings/``; None: the defaults.

    Raises:
        ValueError: there is no such file, or it has fields that :class:`SynthSettings` lacks.
    """
    if path is not None and not path.is_file():
        named = SETTINGS / f"{path}.yaml"
        if not named.is_file():
            shipped = ", ".join(sorted(file.stem for file in SETTINGS.glob("*.yaml")))
            raise ValueError(f"no settings '{path}': give a .yaml file, or one of {shipped}")
        path = named
    changes: dict[str, Any] = yaml.safe_load(path.read_text()) if path else {}
    known = {field.name for field in dataclasses.fields(SynthSettings)}
    if unknown := sorted(set(changes) - known):
        raise ValueError(f"{path} has {', '.join(unknown)}; SynthSettings knows {', '.join(sorted(known))}")
    fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in changes.items()}
    return SynthSettings(**fields)


def prepare_synth_brain(
    labels: Path,
    out: Path,
    splits: dict[str, list[int]],
    *,
    variants: int,
    eval_variants: int,
    contrast: Contrast,
    skull: Skull,
    settings: SynthSettings,
    seed: int,
    workers: int,
    qc_every: int,
) -> None:
    """Synthesise a prepared folder, split by anatomy.

    Args:
        labels: folder of training_seg_NN.nii.gz (FreeSurfer label values, 1 mm).
        out: new folder.
        splits: numbers of the anatomies of each split.
        variants: volumes for each training anatomy.
        eval_variants: volumes for each validation or test anatomy.
        contrast: contrast of the training volumes.
        skull: whether volumes keep the skull.
        settings: the generator's ranges.
        seed: random seed of everything that is drawn.
        workers: processes, about 2 GB each.
        qc_every: a picture for every n-th case; 0: none.

    Raises:
        ValueError: an anatomy is in two splits, or has no file.
        typer.Exit: ``out`` is not empty.
    """
    numbers = sum(splits.values(), [])
    if repeated := sorted({number for number in numbers if numbers.count(number) > 1}):
        raise ValueError(f"anatomies {repeated} are in two splits; an anatomy belongs to one")
    paths = {number: labels / f"training_seg_{number:02d}.nii.gz" for number in numbers}
    if missing := [path.name for path in paths.values() if not path.is_file()]:
        raise ValueError(f"{labels} lacks {', '.join(missing)}; narrow --train, --validation, --test or fetch them")
    cases = []
    for split, anatomies in splits.items():
        for number in anatomies:
            for variant in range(variants if split == "train" else eval_variants):
                with_skull = skull is Skull.with_ or (skull is Skull.both and variant % 2 == 0)
                kind = contrast.value if split == "train" else "t1"
                inputs = (paths[number], (seed, number, variant), kind, with_skull, split != "train", settings)
                cases.append(NewCase(f"brain_{number:02d}_{variant:02d}", f"anatomy_{number:02d}", split, inputs))
    manifest = {
        "name": "synth-brain",
        "source": "images synthesised from the label maps of the SynthSeg project (Billot et al., 2023)",
        "licence": "Apache-2.0",
        "spacing": [1.0, 1.0, 1.0],
        "label_names": LABEL_NAMES,
        "seed": seed,
        "settings": dataclasses.asdict(settings),
    }
    write_dataset(out, cases, build_brain, manifest, workers, qc_every)
