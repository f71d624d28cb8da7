"""Task04_Hippocampus in the layout of the Medical Segmentation Decathlon (imagesTr/, labelsTr/, dataset.json)."""

from __future__ import annotations

import json
import re
from enum import StrEnum
from pathlib import Path

import nibabel as nib
import numpy as np

from hf_binaryformer.data.folder_writer import NewCase, split_groups, write_case, write_dataset
from hf_binaryformer.data.integrity import pair_problems, raise_problems
from hf_binaryformer.pipelines.label_values import label_numbers
from hf_binaryformer.pipelines.nifti import parsing, read_file
from hf_binaryformer.pipelines.whole_files import unchanged

HIPPOCAMPUS_NAMES = {0: "background", 1: "anterior", 2: "posterior"}


class GroupRule(StrEnum):
    """Which files belong to one subject: every file is one (``none``), or files 2k-1 and 2k are one (``pairs``)."""

    none = "none"
    pairs = "pairs"


def check_decathlon(source: Path, names: dict[int, str]) -> list[Path]:
    """Images of a Decathlon folder, every one with a good label file.

    Raises:
        ValueError: lists all problems of all files at once.
    """
    images = sorted(path for path in (source / "imagesTr").glob("*.nii.gz") if not path.name.startswith("."))
    if not images:
        raise ValueError(f"{source} holds no imagesTr/*.nii.gz; expected the Decathlon layout imagesTr/, labelsTr/")
    problems = [
        f"{path.relative_to(source).as_posix()}: expected a name that ends in .nii.gz, directly in its folder"
        for folder in ("imagesTr", "labelsTr")
        for path in sorted((source / folder).rglob("[!.]*"))
        if path.is_file() and not (path.name.endswith(".nii.gz") and path.parent.name == folder)
    ]
    for path in images:
        label_path = source / "labelsTr" / path.name
        if label_path.is_file():
            problems += pair_problems(path, label_path, names, source)
        else:
            problems.append(f"{path.name}: no labelsTr/{path.name}")
    image_names = {path.name for path in images}
    lonely = [path.name for path in (source / "labelsTr").glob("*.nii.gz") if path.name not in image_names]
    problems += [f"labelsTr/{name}: no imagesTr/{name}" for name in sorted(lonely) if not name.startswith(".")]
    raise_problems(source, problems)
    return images


def refuse_other_data(source: Path) -> None:
    """Keep the names, the licence and the group rule of the hippocampus data from other data.

    Raises:
        ValueError: an image has another name than those of the data set.
    """
    names = sorted(path.name for path in (source / "imagesTr").glob("[!.]*.nii.gz"))
    if other := [name for name in names if not name.startswith("hippocampus_")]:
        raise ValueError(
            f"{source} is not Task04_Hippocampus: it holds imagesTr/{other[0]}, expected hippocampus_NNN.nii.gz. For your own "
            f"files use `binaryformer prepare folder {source} -o OUT`"
        )


def group_of(path: Path, rule: GroupRule) -> str:
    """`pairs`: files 2k-1 and 2k are one subject (Hippocampus: most likely left and right side of one person)."""
    stem = path.name.removesuffix(".nii.gz")
    if rule is GroupRule.none:
        return stem
    number = re.search(r"(\d+)$", stem)
    if number is None:
        raise ValueError(f"{path.name}: --group-rule pairs needs a number at the end of the name; use none")
    return f"pair_{(int(number[1]) + 1) // 2:04d}"


def build_decathlon(out: Path, case: NewCase) -> dict:
    """Copy one case to RAS order; voxel values stay as they are, except that labels become whole numbers."""
    image_path, label_path = case.inputs
    with unchanged(image_path, label_path):
        image, label = (nib.as_closest_canonical(read_file(path)) for path in (image_path, label_path))
    classes = label_numbers(label_path, np.asanyarray(label.dataobj))[0].astype(np.uint8)
    return write_case(out, case, image, nib.Nifti1Image(classes, image.affine), {})


def read_affine(path: Path) -> np.ndarray:
    """The affine of a NIfTI file, whose voxels are not read.

    Raises:
        VolumeError: the file is missing or damaged.
    """
    with parsing(path):
        affine: np.ndarray = nib.Nifti1Image.from_filename(path).affine
    return affine


def read_label_names(labels: dict[str, str] | dict[str, int]) -> dict[int, str]:
    """Names of label values, in lower case, from a dataset.json.

    The file maps value to name (Decathlon) or name to value (nnU-Net v2).

    Raises:
        ValueError: the mapping has neither form, or its values are not those of a network: 0 (background, which may be
            left out), 1, 2 and so on.
    """
    try:
        if all(isinstance(value, int) for value in labels.values()):
            names = {int(value): name.lower() for name, value in labels.items()}
        else:
            names = {int(value): str(name).lower() for value, name in labels.items()}
    except ValueError:
        raise ValueError(
            f'dataset.json has labels {labels}, expected {{"1": "anterior"}} or {{"anterior": 1}}'
        ) from None
    names = {0: "background"} | names
    if sorted(names) != list(range(len(names))) or len(names) > 256:
        raise ValueError(f"dataset.json has the label values {sorted(names)}, expected 0, 1, 2 and so on, at most 255")
    return names


def prepare_decathlon(
    source: Path,
    out: Path,
    *,
    test_fraction: float,
    validation_fraction: float,
    group_rule: GroupRule,
    seed: int,
    qc_every: int,
) -> None:
    """Check all of a Decathlon folder, then write the prepared folder.

    Args:
        source: folder with imagesTr/ and labelsTr/, and perhaps a dataset.json.
        out: new folder.
        test_fraction: share of all volumes, 0 to 1, in whole groups.
        validation_fraction: share of the volumes not in test.
        group_rule: which files belong to one subject.
        seed: random seed of the split.
        qc_every: a picture for every n-th case; 0: none.

    Raises:
        ValueError: other data, or a list of all problems of all files; nothing is written.
        typer.Exit: ``out`` is not empty, or a file is in two splits; nothing is written.
    """
    refuse_other_data(source)
    described = source / "dataset.json"
    description = json.loads(described.read_text()) if described.is_file() else {}
    names = read_label_names(description.get("labels", HIPPOCAMPUS_NAMES))
    images = check_decathlon(source, names)
    groups = [group_of(path, group_rule) for path in images]
    splits = split_groups(groups, test_fraction, validation_fraction, seed)
    cases = [
        NewCase(path.name.removesuffix(".nii.gz"), group, splits[group], (path, source / "labelsTr" / path.name))
        for path, group in zip(images, groups, strict=True)
    ]
    spacings = np.array([nib.affines.voxel_sizes(read_affine(path)) for path in images])
    manifest = {
        "name": description.get("name", "hippocampus"),
        "source": "Medical Segmentation Decathlon, Task04_Hippocampus",
        "licence": description.get(
            "licence", description.get("license", "not stated" if description else "CC BY-SA 4.0")
        ),
        "spacing": np.median(spacings, axis=0).round(6).tolist(),
        "label_names": names,
        "seed": seed,
        "settings": {
            "group_rule": group_rule.value,
            "test_fraction": test_fraction,
            "validation_fraction": validation_fraction,
        },
    }
    write_dataset(out, cases, build_decathlon, manifest, 1, qc_every)
