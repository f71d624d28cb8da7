"""Anybody's volumes and label maps, under their own names, to a prepared folder."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import typer
import yaml

from hf_binaryformer.data.file_pairs import find_volumes, pair_names, people_of
from hf_binaryformer.data.folder_writer import NewCase, run_all, split_groups, write_case, write_dataset
from hf_binaryformer.data.hashing import file_hash
from hf_binaryformer.data.integrity import MOST, pair_problems, raise_problems
from hf_binaryformer.data.public_data import whole_numbers
from hf_binaryformer.pipelines.grids import VolumeError
from hf_binaryformer.pipelines.volumes import read_volume
from hf_binaryformer.pipelines.whole_files import unchanged

EXAMPLE = "expected names by number, such as 1=lesion,2=oedema, or a .yaml or .json file with them"


def name_table(content: Any, where: str) -> dict[int, str]:
    """Names of label values, with 0, the background.

    Args:
        content: value -> name, or name -> value (nnU-Net), as a file holds it.
        where: the file, for messages.

    Raises:
        ValueError: it is neither, a value is not in 0 to 255, or two values have one name.
    """
    pairs = list(content.items()) if isinstance(content, dict) else []
    if pairs and all(isinstance(value, int) for _, value in pairs):
        pairs = [(value, name) for name, value in pairs]
    if not pairs or not all(re.fullmatch(r"\d{1,9}", str(value)) and isinstance(name, str) for value, name in pairs):
        raise ValueError(f"{where} has the labels {content}, {EXAMPLE}")
    names = {0: "background"} | {int(value): name for value, name in pairs}
    if wrong := [value for value in names if value > MOST]:
        raise ValueError(f"{where} has the label values {wrong}, expected 0 to {MOST}")
    if doubled := [name for name, count in Counter(names.values()).items() if count > 1]:
        raise ValueError(f"{where} gives the name {', '.join(doubled)} to several values, expected one for each")
    return dict(sorted(names.items()))


def given_names(text: str) -> dict[int, str]:
    """Names from ``1=lesion,2=oedema``, or from a .yaml or .json file: a table, or a dataset.json with ``labels``.

    Raises:
        ValueError: the file is missing or damaged, or holds something else.
    """
    if not text.lower().endswith((".yaml", ".yml", ".json")):
        parts = [part.partition("=") for part in text.split(",")]
        return name_table(
            {value.strip(): name.strip() for value, _, name in parts if name.strip()}, f"--names '{text}'"
        )
    return name_table(described(Path(text)), text)


def described(path: Path) -> Any:
    """The label names that a file holds.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read ({error}), {EXAMPLE}") from error
    return content["labels"] if isinstance(content, dict) and "labels" in content else content


def found_names(labels: list[Path]) -> dict[int, str]:
    """A name for each value in the files: "label 1" and so on.

    Damaged files, and values that cannot be labels, are left to :func:`check_pairs`, which tells all of them at once.
    """
    values = {0}
    for path in labels:
        with suppress(VolumeError), warnings.catch_warnings(action="ignore"):
            values |= {*np.unique(read_volume(path, labels=True).array).tolist()}
    values = {value for value in values if 0 <= value <= MOST}
    return {value: f"label {value}" if value else "background" for value in sorted(values)}


def description_beside(images: Path) -> dict[str, Any]:
    """The dataset.json of nnU-Net and the Decathlon, in the folder above the images; nothing if there is none.

    Raises:
        ValueError: it is damaged.
    """
    path = images.parent / "dataset.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): repair it, or give --names") from error
    return content if isinstance(content, dict) else {}


def build_own(out: Path, case: NewCase) -> dict:
    """Bring one case to RAS order; intensities and label numbers stay as they are."""
    image_path, label_path = case.inputs
    with unchanged(image_path, label_path):
        image, labels = read_volume(image_path), read_volume(label_path, labels=True)
        drawn: dict[str, Any] = {}
        for kind, path in (("image", image_path), ("label", label_path)):
            drawn |= {f"source_{kind}": path.name, f"source_{kind}_sha256": file_hash(path)}
    grey, numbers = (
        nib.Nifti1Image(array, image.affine) for array in (whole_numbers(image.array), labels.array.astype(np.uint8))
    )
    for volume in (grey, numbers):
        volume.header.set_xyzt_units("mm")
    return write_case(out, case, grey, numbers, drawn)


def layout_of(images: str, labels: str | None) -> tuple[str, str]:
    """Images and labels of a folder in the layout of nnU-Net and the Decathlon, or the two as they are.

    Raises:
        ValueError: one folder is given, and it has not that layout.
    """
    if labels is not None:
        return images, labels
    folders = Path(images, "imagesTr"), Path(images, "labelsTr")
    if not all(folder.is_dir() for folder in folders):
        raise ValueError(
            f"'{images}' has no imagesTr and labelsTr: give two folders, that of the images and that of the labels"
        )
    return str(folders[0]), str(folders[1])


def prepare_own(
    images: str,
    labels: str | None,
    out: Path,
    *,
    names: str | None,
    name: str | None,
    licence: str | None,
    subject: str | None,
    test_fraction: float,
    validation_fraction: float,
    seed: int,
    workers: int,
    qc_every: int,
) -> None:
    """Check all files, then write the prepared folder.

    Args:
        images: folder or pattern of the images; without ``labels`` a folder that holds imagesTr and labelsTr.
        labels: folder or pattern of the label maps.
        out: new folder.
        names: names of the labels, see :func:`given_names`; None: those of dataset.json, or "label 1" and so on.
        name: what the data are called; None: by dataset.json, or as ``out``.
        licence: for the manifest; None: that of dataset.json, or "not stated".
        subject: which images are of one person, see :func:`hf_binaryformer.data.file_pairs.people_of`.
        test_fraction: share of all volumes, 0 to 1, in whole persons.
        validation_fraction: share of the volumes not in test.
        seed: random seed of the split.
        workers: processes.
        qc_every: a picture for every n-th case; 0: none.

    Raises:
        ValueError: files without a partner, or a list of all problems of all files; nothing is written.
        typer.Exit: ``out`` is not empty, or a file is in two splits; nothing is written.
    """
    images, labels = layout_of(images, labels)
    found, maps = find_volumes(images), find_volumes(labels)
    pairs = {image: (found[image], maps[label]) for image, label in pair_names(found, maps).items()}
    told = description_beside(Path(images))
    if names is not None:
        label_names = given_names(names)
    elif "labels" in told:
        label_names = name_table(told["labels"], "dataset.json")
    else:
        label_names = found_names([label for _, label in pairs.values()])
        typer.echo(
            f"Labels have no names, so they are called {', '.join(label_names.values())}; --names names them", err=True
        )
    check_pairs(pairs, label_names, workers)
    people = people_of(sorted(pairs), subject)
    tell_pairs(pairs, people, subject)
    splits = split_groups(list(people.values()), test_fraction, validation_fraction, seed)
    cases = [NewCase(image.replace("/", "_"), who, splits[who], pairs[image]) for image, who in people.items()]
    if doubled := [case for case, count in Counter(case.case for case in cases).items() if count > 1]:
        raise ValueError(f"several images would be called {', '.join(doubled)}: rename one of them")
    manifest = {
        "name": name or told.get("name") or out.name,
        "source": "own files, by `binaryformer prepare folder`",
        "licence": licence or told.get("licence") or told.get("license") or "not stated",
        "label_names": label_names,
        "seed": seed,
        "settings": {"subject": subject, "test_fraction": test_fraction, "validation_fraction": validation_fraction},
    }
    tell_sizes(write_dataset(out, cases, build_own, manifest, workers, qc_every)["cases"])


def check_pairs(pairs: dict[str, tuple[Path, Path]], label_names: dict[int, str], workers: int) -> None:
    """Look at every file.

    Raises:
        ValueError: lists all problems of all files at once.
    """
    columns = [[path.absolute() for path in column] for column in zip(*pairs.values(), strict=True)]
    root = Path(os.path.commonpath([path.parent for column in columns for path in column]))
    checks = [*columns, [sorted(label_names)] * len(pairs), [root] * len(pairs)]
    raise_problems(root, sum(run_all(pair_problems, *checks, workers=workers, description="Checking"), []))


def tell_pairs(pairs: dict[str, tuple[Path, Path]], people: dict[str, str], subject: str | None) -> None:
    """Say which files were taken for a pair, and for whose; arguments as for :func:`prepare_own`."""
    image, label = next(iter(pairs.values()))
    typer.echo(f"Pairs such as {image.name} with {label.name}")
    unknown = subject is None and all(name == who for name, who in people.items())
    alone = ": each file is taken for another person; --subject says otherwise" if unknown else ""
    typer.echo(f"{len(pairs)} volumes of {len({*people.values()})} persons{alone}")


def tell_sizes(rows: list[dict[str, Any]]) -> None:
    """Say what a recipe has to fit."""
    spacing, shape = (np.median([row[key] for row in rows], axis=0) for key in ("spacing", "shape"))
    mm, voxels = " x ".join(f"{size:.3g}" for size in spacing), " x ".join(f"{size:g}" for size in shape)
    typer.echo(f"Median voxel {mm} mm, median size {voxels} voxels (R, A, S)")
