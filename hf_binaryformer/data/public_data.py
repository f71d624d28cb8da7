"""Public data sets in the layouts in which they are published; data_sets/NAME.yaml describes one.

Such a file states which files are images and labels, what the labels mean, which network labels they become, and which
grid the volumes are brought to.
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

import nibabel as nib
import numpy as np
import torch
import typer
import yaml
from monai.data import MetaTensor
from monai.transforms import ResizeWithPadOrCrop

from hf_binaryformer.data.folder_writer import NewCase, run_all, split_groups, write_case, write_dataset
from hf_binaryformer.data.hashing import file_hash
from hf_binaryformer.data.integrity import pair_problems, raise_problems
from hf_binaryformer.pipelines.grids import affine_spacing, resample, same_spacing
from hf_binaryformer.pipelines.volumes import read_volume
from hf_binaryformer.pipelines.whole_files import unchanged

DATA_SETS = Path(__file__).parent / "data_sets"


@dataclass(frozen=True)
class DataSet:
    """The content of one YAML file.

    Args:
        name, source, url, licence: for the manifest.
        image, label: paths below the source folder, with {fields} for the parts that vary; ``patient`` is one of the
            fields.
        labels_required: True if every image needs labels. Otherwise, if no file matches ``label``, only images are
            prepared.
        fields: regular expression of each field.
        min_patient: patients with a smaller number are left out.
        labels: network label -> its name, and its values in the files, as numbers "1-9,20".
        size: voxels along R, A, S that volumes are cut or padded to around their centre; None keeps an axis, or all.
        spacing: voxel size in mm along R, A, S that volumes are resampled to first; None keeps an axis, or all.
        test_fraction: share of all volumes, in whole patients, 0 to 1.
        validation_fraction: share of the volumes not in test.
    """

    name: str
    source: str
    url: str
    licence: str
    image: str
    label: str
    labels_required: bool
    fields: dict[str, str]
    min_patient: int
    labels: dict[int, dict[str, Any]]
    size: tuple[int | None, ...] | None
    spacing: tuple[float | None, ...] | None
    test_fraction: float
    validation_fraction: float

    def __post_init__(self) -> None:
        if sorted(self.labels) != list(range(len(self.labels))) or len(self.labels) > 256:
            raise ValueError(f"network labels are {sorted(self.labels)}, expected 0, 1, 2 and so on, at most 255")
        values = sum((parse_numbers(str(rule["values"])) for rule in self.labels.values()), [])
        if doubled := sorted({value for value in values if values.count(value) > 1}):
            raise ValueError(f"values {doubled} stand under two network labels, expected one for each")
        for template in (self.image, self.label):
            names = {name for _, name, _, _ in Formatter().parse(template) if name}
            if names != set(self.fields) or "patient" not in names:
                raise ValueError(
                    f"'{template}' has the fields {sorted(names)}, expected {sorted(self.fields)} with patient"
                )
        for key, numbers in (("size", self.size), ("spacing", self.spacing)):
            if numbers is not None and (len(numbers) != 3 or any(n is not None and not n > 0 for n in numbers)):
                raise ValueError(f"{key} is {list(numbers)}, expected three numbers above 0, or null for an axis")
        for key in ("test_fraction", "validation_fraction"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}, expected at least 0 and below 1")

    @property
    def label_names(self) -> dict[int, str]:
        """Network label -> name."""
        return {label: rule["name"] for label, rule in self.labels.items()}

    @property
    def file_labels(self) -> dict[int, int]:
        """Value in a file -> network label."""
        return {value: label for label, rule in self.labels.items() for value in parse_numbers(str(rule["values"]))}


def load_data_set(path: Path) -> DataSet:
    """Read a YAML file.

    Raises:
        ValueError: the file is missing, keys are missing or unknown, or values contradict each other.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; those of the project are in {DATA_SETS}")
    values = yaml.safe_load(path.read_text())
    known = {field.name for field in dataclasses.fields(DataSet)}
    given = set(values) if isinstance(values, dict) else set()
    if given != known:
        raise ValueError(f"{path} lacks {sorted(known - given)} and has the unknown keys {sorted(given - known)}")
    try:
        return DataSet(**values)
    except (ValueError, TypeError, KeyError, typer.BadParameter) as error:
        raise ValueError(f"{path}: {error}") from error


def parse_numbers(text: str) -> list[int]:
    """'1-3,7' -> [1, 2, 3, 7]; '' -> [].

    Raises:
        typer.BadParameter: the text has another form.
    """
    numbers: list[int] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        if not re.fullmatch(r"\d+(-\d+)?", part):
            raise typer.BadParameter(f"expected numbers like 1-16 or 1,4,7, not {text!r}")
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def find_files(source: Path, template: str, data_set: DataSet) -> dict[tuple[str, ...], Path]:
    """Files below ``source`` that match a template, sorted; keys are the values of its fields, in the fields' order."""
    pattern = "".join(
        re.escape(text) + (f"(?P<{name}>{data_set.fields[name]})" if name else "")
        for text, name, _, _ in Formatter().parse(template)
    )
    found = {}
    # Folders may be links, for example when several people share one download.
    paths = [Path(folder, name) for folder, _, names in os.walk(source, followlinks=True) for name in names]
    for path in sorted(paths):
        match = re.fullmatch(pattern, path.relative_to(source).as_posix())
        if match and path.is_file() and int(match["patient"]) >= data_set.min_patient:
            found[tuple(match[name] for name in data_set.fields)] = path
    return found


def find_cases(source: Path, data_set: DataSet, workers: int, seed: int) -> list[NewCase]:
    """Cases of a public layout, checked and split by patient.

    Raises:
        ValueError: lists all problems of all files at once.
    """
    images, labels = (find_files(source, template, data_set) for template in (data_set.image, data_set.label))
    if not images:
        raise ValueError(
            f"{source} holds no {data_set.image} with {data_set.fields}; expected the layout of {data_set.name}"
        )
    problems = []
    if labels or data_set.labels_required:
        for key, template, other in (
            *((key, data_set.label, images) for key in images if key not in labels),
            *((key, data_set.image, labels) for key in labels if key not in images),
        ):
            expected = template.format(**dict(zip(data_set.fields, key, strict=True)))
            problems.append(f"{other[key].relative_to(source).as_posix()}: no {expected}")
    pairs = [(path, labels.get(key)) for key, path in images.items()]
    names = [path.name.removesuffix(".gz").rpartition(".")[0] for path, _ in pairs]
    for name in sorted({name for name in names if names.count(name) > 1}):
        where = [path.relative_to(source).as_posix() for path, _ in pairs if path.name.startswith(f"{name}.")]
        problems.append(f"{' and '.join(where)}: two images of one name, expected one")
    checks = [[*column] for column in zip(*((i, lab, data_set.file_labels, source) for i, lab in pairs), strict=True)]
    problems += sum(run_all(pair_problems, *checks, workers=workers, description="Checking"), [])
    raise_problems(source, problems)

    position = list(data_set.fields).index("patient")
    groups = [f"patient_{int(key[position]):04d}" for key in images]
    splits = split_groups(groups, data_set.test_fraction, data_set.validation_fraction, seed)
    return [
        NewCase(name, group, splits[group], (image, label, data_set, source))
        for name, group, (image, label) in zip(names, groups, pairs, strict=True)
    ]


def fit_grid(
    array: np.ndarray, affine: np.ndarray, data_set: DataSet, *, labels: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Resample, then cut or pad around the centre; padding has the image's minimum, or label 0.

    Args:
        array: (I, J, K) in RAS order.
        affine: (4, 4), voxel to mm.
        data_set: size and spacing.
        labels: if True, nothing is interpolated.

    Returns:
        The array and its affine.
    """
    own = affine_spacing(affine)
    spacing = [wanted or mm for wanted, mm in zip(data_set.spacing or (None,) * 3, own, strict=True)]
    if not same_spacing(own, spacing):
        array, affine = resample(array, affine, spacing, order=0 if labels else 1)
    if data_set.size is None:
        return array, affine
    padding = 0 if labels else float(array.min())
    # In MONAI, -1 keeps an axis.
    fit = ResizeWithPadOrCrop([wanted or -1 for wanted in data_set.size], mode="constant", value=padding)
    fitted = fit(MetaTensor(torch.from_numpy(np.ascontiguousarray(array))[None], torch.from_numpy(affine)))
    assert isinstance(fitted, MetaTensor)
    return fitted[0].numpy(), fitted.affine.numpy()


def whole_numbers(array: np.ndarray) -> np.ndarray:
    """Convert to int16 if that loses nothing; the file is then half as large."""
    limits = np.iinfo(np.int16)
    fits = array.min() >= limits.min and array.max() <= limits.max and bool((array == np.rint(array)).all())
    return array.astype(np.int16) if fits else array


def build_public(out: Path, case: NewCase) -> dict:
    """Bring one case to RAS order and the data set's grid; runs in a worker process.

    Intensities are resampled but not scaled. Training scales them once, by percentiles, when it loads the volume. The
    row's ``labels_lost`` is the share of labelled voxels that lay outside the data set's size.
    """
    torch.set_num_threads(1)
    image_path, label_path, _, _ = case.inputs
    # Hashes and voxels are of the same files.
    with unchanged(*(path for path in (image_path, label_path) if path is not None)):
        return _build(out, case)


def _build(out: Path, case: NewCase) -> dict:
    image_path, label_path, data_set, source = case.inputs
    image = read_volume(image_path)
    array, affine = fit_grid(image.array, image.affine, data_set, labels=False)
    drawn: dict[str, Any] = {
        "source_image": image_path.relative_to(source).as_posix(),
        "source_image_sha256": file_hash(image_path),
    }
    labels = None
    if label_path is not None:
        raw = read_volume(label_path, labels=True).array
        table = np.zeros(max(data_set.file_labels) + 1, np.uint8)
        table[list(data_set.file_labels)] = list(data_set.file_labels.values())
        classes = table[raw]
        # The image's affine is also that of the labels: pairs on different grids were refused by the check.
        fitted, _ = fit_grid(classes, image.affine, data_set, labels=True)
        uncut, _ = fit_grid(classes, image.affine, dataclasses.replace(data_set, size=None), labels=True)
        before, after = int(np.count_nonzero(uncut)), int(np.count_nonzero(fitted))
        drawn["source_label"] = label_path.relative_to(source).as_posix()
        drawn["source_label_sha256"] = file_hash(label_path)
        drawn["labels_lost"] = round(1 - after / before, 4) if before else 0.0
        labels = nib.Nifti1Image(fitted, affine)
        labels.header.set_xyzt_units("mm")
    nifti = nib.Nifti1Image(whole_numbers(array), affine)
    nifti.header.set_xyzt_units("mm")
    return write_case(out, case, nifti, labels, drawn)


def prepare_public(
    data_set: DataSet, source: Path, out: Path, seed: int, workers: int, qc_every: int, shard_mb: int | None
) -> None:
    """Check a complete public download, then write the prepared folder.

    Raises:
        ValueError: lists all problems of all files at once; nothing is written.
        typer.Exit: ``out`` is not empty, or a file is in two splits; nothing is written.
    """
    cases = find_cases(source, data_set, workers, seed)
    labelled = any(case.inputs[1] is not None for case in cases)
    manifest = {
        "name": data_set.name,
        "source": data_set.source,
        "url": data_set.url,
        "licence": data_set.licence,
        "spacing": data_set.spacing,
        "label_names": data_set.label_names if labelled else {0: data_set.label_names[0]},
        "seed": seed,
        "intensities": "of the source, not scaled",
        "settings": dataclasses.asdict(data_set),
    }
    rows = write_dataset(out, cases, build_public, manifest, workers, qc_every, shard_mb)["cases"]
    cut = sorted((row for row in rows if row.get("labels_lost", 0) > 0), key=lambda row: -row["labels_lost"])
    if cut:
        worst = f"{cut[0]['case']} {100 * cut[0]['labels_lost']:.3g} %"
        typer.echo(
            f"Warning: {len(cut)} of {len(rows)} volumes lose labels at the size {data_set.size}, most {worst}; "
            f"see labels_lost in the manifest, and size and spacing in the YAML file",
            err=True,
        )
