"""A data set of synthesised volumes: the splits of the anatomies, training volumes, and fixed evaluation sets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import nibabel as nib
import torch

from hf_binaryformer.data.folder_writer import NewCase, write_case, write_dataset
from hf_binaryformer.data.synthesis.anatomy import read_anatomy
from hf_binaryformer.data.synthesis.description import load_description
from hf_binaryformer.data.synthesis.engine import synthesize

TRAIN = "train"


def build_volume(out: Path, case: NewCase) -> dict:
    """Synthesise one case; runs in a worker process."""
    torch.set_num_threads(1)  # one process per core is faster than threads inside each volume
    path, description, kind, seed = case.inputs
    anatomy = read_anatomy(path, description)
    told = anatomy.description
    volume = synthesize(anatomy, told.train_ranges if kind == TRAIN else told.set_ranges(kind), seed)
    image, labels = (nib.Nifti1Image(array, volume.affine) for array in (volume.image, volume.labels))
    for nifti in (image, labels):
        nifti.header.set_xyzt_units("mm")
    return write_case(out, case, image, labels, {"set": kind} | volume.drawn)


def prepare_synthetic(
    name: str,
    description: Path,
    labels: Path,
    out: Path,
    splits: dict[str, list[int]],
    *,
    variants: int,
    eval_variants: int,
    seed: int,
    workers: int,
    qc_every: int,
) -> None:
    """Synthesise a prepared folder, split by anatomy.

    Args:
        name: of the data set, for the manifest.
        description: YAML file (:class:`~hf_binaryformer.data.synthesis.description.Description`).
        labels: folder of the label maps.
        out: new folder.
        splits: numbers of the anatomies of each split.
        variants: volumes for each training anatomy.
        eval_variants: volumes of each evaluation set for each validation or test anatomy.
        seed: random seed of everything that is drawn.
        workers: processes, about 2 GB each.
        qc_every: a picture for every n-th case; 0: none.

    Raises:
        ValueError: an anatomy is in two splits, or has no file, or the description is wrong.
        typer.Exit: ``out`` is not empty.
    """
    told = load_description(description)
    numbers = sum(splits.values(), [])
    if repeated := sorted({number for number in numbers if numbers.count(number) > 1}):
        raise ValueError(f"anatomies {repeated} are in two splits; an anatomy belongs to one")
    paths = {number: labels / told.files.format(number=number) for number in numbers}
    if missing := [path.name for path in paths.values() if not path.is_file()]:
        raise ValueError(f"{labels} lacks {', '.join(missing)}; narrow --train, --validation, --test or fetch them")
    cases = []
    for split, anatomies in splits.items():
        kinds = [(TRAIN, variants)] if split == TRAIN else [(name, eval_variants) for name in told.evaluation["sets"]]
        for number in anatomies:
            # Volumes of one anatomy follow each other, because reading it takes longer than drawing from it. The seed
            # of an evaluation volume differs from that of all training volumes by the set's place.
            for place, (kind, count) in enumerate(kinds):
                for variant in range(count):
                    case = f"{told.case}_{number:02d}_{kind + '_' if kind != TRAIN else ''}{variant:02d}"
                    inputs = (paths[number], description, kind, (seed, number, place, variant))
                    cases.append(NewCase(case, f"anatomy_{number:02d}", split, inputs))
    manifest = {
        "name": name,
        "source": told.source,
        "licence": told.licence,
        "spacing": list(told.grid_mm),
        "label_names": told.label_names,
        "seed": seed,
        "settings": dataclasses.asdict(told),
    }
    write_dataset(out, cases, build_volume, manifest, workers, qc_every)
