"""python scripts/prepare_data.py amos --source amos22 --out data/amos

Writes a data folder that `scripts/finetune.py` and `scripts/train_vqae.py` read: images/CASE.nii.gz and labels/CASE.nii.gz
on one grid in RAS order, manifest.json (split by group, file hashes, licence, settings, command) and qc/*.png. Sources:
`amos`, `crossmoda`, `oasis` and `spider` (public downloads as they are; scripts/data_sets/*.yaml), `hippocampus` (any folder
in the layout of the Medical Segmentation Decathlon), `synth-brain` (images synthesised from label maps) and `shards` (the
Parquet shards of a folder that was prepared elsewhere, by their folder or Hub id).
"""

from __future__ import annotations

import dataclasses
import json
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import nibabel as nib
import numpy as np
import torch
import typer
import yaml

from folder_writer import (
    NewCase,
    fail,
    new_folder,
    show_leakage,
    split_groups,
    write_case,
    write_dataset,
    write_manifest,
)
from hashing import file_hash
from integrity import check_decathlon
from leakage import check_leakage
from public_data import DATA_SETS, load_data_set, parse_numbers, prepare_public
from shards import fetch_shards, read_shards
from synth_brain import LABEL_NAMES, SynthSettings, read_anatomy, synthesize

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Prepare training data with splits and a manifest.")

HIPPOCAMPUS_NAMES = {0: "background", 1: "anterior", 2: "posterior"}


class Contrast(StrEnum):
    t1 = "t1"
    random = "random"
    mixed = "mixed"


class Skull(StrEnum):
    with_ = "with"
    without = "without"
    both = "both"


class GroupRule(StrEnum):
    none = "none"
    pairs = "pairs"


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
    """The generator's ranges: its defaults, and what a .yaml file says otherwise."""
    changes: dict[str, Any] = yaml.safe_load(path.read_text()) if path else {}
    known = {field.name for field in dataclasses.fields(SynthSettings)}
    if unknown := sorted(set(changes) - known):
        fail(f"{path} has {', '.join(unknown)}; SynthSettings knows {', '.join(sorted(known))}")
    fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in changes.items()}
    return SynthSettings(**fields)


@app.command("synth-brain")
def synth_brain(
    labels: Annotated[Path, typer.Option(help="Folder of training_seg_NN.nii.gz (FreeSurfer label values, 1 mm).")],
    out: Annotated[Path, typer.Option(help="New folder to write.")],
    variants: Annotated[int, typer.Option(min=1, help="Volumes per training anatomy.")] = 6,
    eval_variants: Annotated[int, typer.Option(min=1, help="Volumes per validation or test anatomy.")] = 2,
    contrast: Annotated[Contrast, typer.Option(help="Of the training volumes; the others are T1-like.")] = Contrast.t1,
    skull: Annotated[Skull, typer.Option(help="both: every second variant without.")] = Skull.both,
    ranges: Annotated[
        Path | None,
        typer.Option("--settings", help=".yaml with fields of SynthSettings that differ from its defaults."),
    ] = None,
    train: Annotated[str, typer.Option(help="Anatomies, e.g. 1-16 or 1,4,7.")] = "1-16",
    validation: Annotated[str, typer.Option()] = "17-18",
    test: Annotated[str, typer.Option()] = "19-20",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes; about 2 GB each.")] = 1,
    qc_every: Annotated[int, typer.Option(min=0, help="A QC picture for every n-th volume; 0: none.")] = 7,
) -> None:
    """T1-like (or random-contrast) images synthesised from whole-head label maps, split by anatomy."""
    splits = {"train": parse_numbers(train), "validation": parse_numbers(validation), "test": parse_numbers(test)}
    numbers = sum(splits.values(), [])
    if repeated := sorted({number for number in numbers if numbers.count(number) > 1}):
        fail(f"anatomies {repeated} are in two splits; an anatomy belongs to one")
    paths = {number: labels / f"training_seg_{number:02d}.nii.gz" for number in numbers}
    if missing := [path.name for path in paths.values() if not path.is_file()]:
        fail(f"{labels} lacks {', '.join(missing)}; narrow --train, --validation, --test or fetch them")
    settings = read_settings(ranges)
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
    """Copy one case to RAS order; voxel values stay as they are."""
    image_path, label_path = case.inputs
    image, label = (nib.as_closest_canonical(nib.Nifti1Image.from_filename(path)) for path in (image_path, label_path))
    classes = np.asanyarray(label.dataobj).astype(np.uint8)
    return write_case(out, case, image, nib.Nifti1Image(classes, image.affine), {})


def read_label_names(labels: dict[str, str] | dict[str, int]) -> dict[int, str]:
    """Names of label values, in lower case, from a dataset.json: value: name (Decathlon) or name: value (nnU-Net v2).

    Raises:
        ValueError: neither, or not the values that a network has: 0 (background, which may be left out), 1, 2 and so on.
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


@app.command()
def hippocampus(
    source: Annotated[Path, typer.Option(help="Folder with imagesTr/ and labelsTr/ (Decathlon layout).")],
    out: Annotated[Path, typer.Option(help="New folder to write.")],
    test_fraction: Annotated[float, typer.Option(min=0, max=1, help="Of all volumes.")] = 0.24,
    validation_fraction: Annotated[float, typer.Option(min=0, max=1, help="Of the volumes not in test.")] = 0.10,
    group_rule: Annotated[GroupRule, typer.Option(help="pairs: IDs 2k-1 and 2k stay together.")] = GroupRule.pairs,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    qc_every: Annotated[int, typer.Option(min=0, help="A QC picture for every n-th volume; 0: none.")] = 20,
) -> None:
    """Real volumes with labels in the Decathlon layout: Task04_Hippocampus, or what dataset.json describes."""
    described = source / "dataset.json"
    description = json.loads(described.read_text()) if described.is_file() else {}
    try:
        names = read_label_names(description.get("labels", HIPPOCAMPUS_NAMES))
        images = check_decathlon(source, names)
        groups = [group_of(path, group_rule) for path in images]
    except ValueError as error:
        fail(str(error))
    splits = split_groups(groups, test_fraction, validation_fraction, seed)
    cases = [
        NewCase(path.name.removesuffix(".nii.gz"), group, splits[group], (path, source / "labelsTr" / path.name))
        for path, group in zip(images, groups, strict=False)
    ]
    spacings = np.array([nib.affines.voxel_sizes(nib.Nifti1Image.from_filename(path).affine) for path in images])
    manifest = {
        "name": description.get("name", "hippocampus"),
        "source": "Medical Segmentation Decathlon layout; Task04_Hippocampus if no dataset.json says otherwise",
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


def add_public(name: str) -> None:
    """Register the command of a public data set, which its YAML file describes."""
    file = DATA_SETS / f"{name}.yaml"

    def command(
        source: Annotated[Path, typer.Option(help="Folder of the download, in its public layout.")],
        out: Annotated[Path, typer.Option(help="New folder to write.")],
        config: Annotated[
            Path, typer.Option(help="Label map, size, spacing.", show_default="scripts/data_sets/…")
        ] = file,
        seed: Annotated[int, typer.Option(min=0, help="Of the split.")] = 0,
        workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
        qc_every: Annotated[int, typer.Option(min=0, help="A QC picture for every n-th volume; 0: none.")] = 10,
        shards: Annotated[bool, typer.Option(help="Beside the files, Parquet shards that stream.")] = True,
        shard_mb: Annotated[int, typer.Option(min=1, help="Size of a shard in MB.")] = 500,
    ) -> None:
        try:
            data_set = load_data_set(config)
            prepare_public(data_set, source, out, seed, workers, qc_every, shard_mb if shards else None)
        except (ValueError, ImportError) as error:
            fail(str(error))

    app.command(name, help=f"{load_data_set(file).source}: public layout to a prepared folder.")(command)


@app.command("shards")
def unpack_shards(
    source: Annotated[str, typer.Option(help="Folder of shards, or the id of such a data set on the Hub.")],
    out: Annotated[Path, typer.Option(help="New folder to write.")],
) -> None:
    """Shards that prepare_data.py wrote: back to the prepared folder, with its splits."""
    try:
        with new_folder(out) as folder:
            manifest = read_shards(fetch_shards(source), folder)
            write_manifest(folder, manifest)
    except ValueError as error:
        fail(str(error))
    typer.echo(f"{len(manifest['cases'])} volumes -> {out}")


for public_name in ("amos", "crossmoda", "oasis", "spider"):
    add_public(public_name)


@app.command("check-leakage")
def check_folder(folder: Annotated[Path, typer.Argument(help="Prepared folder.")]) -> None:
    """Look for leaks between the splits of a prepared folder, and for files that are not what the manifest says."""
    described = folder / "manifest.json"
    if not described.is_file():
        fail(f"{folder} has no manifest.json: write it with scripts/prepare_data.py")
    rows = json.loads(described.read_text())["cases"]
    files = [(folder / row[kind], row[f"{kind}_sha256"]) for row in rows for kind in ("image", "label") if kind in row]
    if missing := [path.name for path, _ in files if not path.is_file()]:
        fail(f"{folder} lacks {', '.join(missing[:8])} ({len(missing)} files): prepare the data anew")
    if changed := [path.relative_to(folder).as_posix() for path, value in files if file_hash(path) != value]:
        fail(f"{', '.join(changed[:8])} ({len(changed)} files) changed since {described}: prepare the data anew")
    report = check_leakage(folder, rows)
    show_leakage(report)
    if report.errors:
        fail(f"{len(report.errors)} leaks in {folder}: prepare the data anew")
    typer.echo(f"No leak in {len(rows)} volumes, {len(report.warnings)} warnings")


if __name__ == "__main__":
    app()
