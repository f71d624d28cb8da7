"""python scripts/prepare_data.py synth-brain --labels brain_label_maps --out data/brain --workers 2

Writes a data folder that `scripts/finetune.py` reads: images/CASE.nii.gz and labels/CASE.nii.gz on one grid in RAS
order, manifest.json (split by group, file hashes, settings, command) and qc/*.png. Sources: `synth-brain` (images
synthesised from label maps) and `hippocampus` (any folder in the layout of the Medical Segmentation Decathlon).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import nibabel as nib
import numpy as np
import torch
import typer
from PIL import Image
from rich.progress import track

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


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the manifest before its files exist; `inputs` is what its builder needs."""

    case: str
    group: str
    split: str
    inputs: tuple[Any, ...]


def write_case(out: Path, case: Case, image: nib.Nifti1Image, labels: nib.Nifti1Image, drawn: dict) -> dict:
    """Save both volumes and return the manifest's row."""
    row: dict[str, Any] = {"case": case.case, "group": case.group, "split": case.split}
    for kind, volume in (("image", image), ("label", labels)):
        path = Path(f"{kind}s") / f"{case.case}.nii.gz"
        nib.save(volume, out / path)
        row[kind] = path.as_posix()
        row[f"{kind}_sha256"] = hashlib.sha256((out / path).read_bytes()).hexdigest()
    spacing = [round(float(size), 6) for size in image.header.get_zooms()[:3]]
    return row | {"shape": list(image.shape), "spacing": spacing} | drawn


def write_dataset(
    out: Path, cases: list[Case], build: Callable[[Path, Case], dict], manifest: dict, workers: int, qc_every: int
) -> None:
    """Build every case, in `workers` processes; manifest.json comes last, so that it exists only when all is done."""
    if out.exists() and any(out.iterdir()):
        fail(f"{out} is not empty; give --out a new folder, so that no old case stays in it")
    for folder in ("images", "labels", "qc"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    counts = {split: sum(case.split == split for case in cases) for split in ("train", "validation", "test")}
    typer.echo(f"{len(cases)} volumes -> {out}: " + ", ".join(f"{count} {split}" for split, count in counts.items()))
    folders = [out] * len(cases)
    if workers > 1:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows = list(progress(pool.map(build, folders, cases), len(cases)))
    else:
        rows = list(progress(map(build, folders, cases), len(cases)))
    for row in rows[::qc_every] if qc_every else []:
        write_qc(out, row)
    command = shlex.join(["python", *sys.argv])
    text = json.dumps(manifest | {"command": command, "cases": rows}, indent=1)
    (out / "manifest.json").write_text(text + "\n")


def progress(rows: Iterable[dict], total: int) -> Iterable[dict]:
    return track(rows, description="Preparing", total=total)


def fail(message: str) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(2)


def write_qc(out: Path, row: dict) -> None:
    """qc/CASE.png: sagittal, coronal and axial slice through the labels' centre; above the image, below with labels."""
    image = np.asanyarray(nib.Nifti1Image.from_filename(out / row["image"]).dataobj).astype(np.float32)
    labels = np.asanyarray(nib.Nifti1Image.from_filename(out / row["label"]).dataobj)
    low, high = np.percentile(image, (0.5, 99.5))
    gray = (np.clip((image - low) / max(high - low, 1e-6), 0, 1) * 255)[..., None].repeat(3, axis=-1)
    # Golden-angle hues: neighbouring label values get colours far apart.
    colours = np.array(
        [
            Image.new("HSV", (1, 1), (int(i * 97.4) % 256, 200, 255)).convert("RGB").getpixel((0, 0))
            for i in range(int(labels.max()) + 1)
        ]
    )
    overlay = np.where((labels > 0)[..., None], 0.55 * gray + 0.45 * colours[labels], gray)
    where = np.argwhere(labels > 0)
    centre = where.mean(axis=0).round().astype(int) if len(where) else np.array(labels.shape) // 2
    size = max(image.shape)
    sheet = np.zeros((2 * size, 3 * size, 3), np.uint8)
    for line, volume in enumerate((gray, overlay)):
        for axis in range(3):
            # Last remaining axis upwards (superior or anterior), first one to the right.
            panel = np.take(volume, centre[axis], axis).swapaxes(0, 1)[::-1]
            sheet[line * size :, axis * size :][: panel.shape[0], : panel.shape[1]] = panel
    zoom = max(1, 192 // size)
    Image.fromarray(sheet).resize((3 * size * zoom, 2 * size * zoom), Image.Resampling.NEAREST).save(
        out / "qc" / f"{row['case']}.png"
    )


def parse_numbers(text: str) -> list[int]:
    """'1-3,7' -> [1, 2, 3, 7]; '' -> []."""
    numbers: list[int] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        if not re.fullmatch(r"\d+(-\d+)?", part):
            raise typer.BadParameter(f"expected numbers like 1-16 or 1,4,7, not {text!r}")
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def build_brain(out: Path, case: Case) -> dict:
    """Synthesise one case; runs in a worker process."""
    torch.set_num_threads(1)  # one process per core is faster than threads inside each volume
    path, seed, contrast, skull, mild, settings = case.inputs
    volume = synthesize(read_anatomy(path), seed, contrast=contrast, skull=skull, mild=mild, settings=settings)
    image, labels = (nib.Nifti1Image(array, volume.affine) for array in (volume.image, volume.labels))
    for nifti in (image, labels):
        nifti.header.set_xyzt_units("mm")
    return write_case(out, case, image, labels, {"skull": skull} | volume.drawn)


@app.command("synth-brain")
def synth_brain(
    labels: Annotated[Path, typer.Option(help="Folder of training_seg_NN.nii.gz (FreeSurfer label values, 1 mm).")],
    out: Annotated[Path, typer.Option(help="New folder to write.")],
    variants: Annotated[int, typer.Option(min=1, help="Volumes per training anatomy.")] = 6,
    eval_variants: Annotated[int, typer.Option(min=1, help="Volumes per validation or test anatomy.")] = 2,
    contrast: Annotated[Contrast, typer.Option(help="Of the training volumes; the others are T1-like.")] = Contrast.t1,
    skull: Annotated[Skull, typer.Option(help="both: every second variant without.")] = Skull.both,
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
    settings = SynthSettings()
    cases = []
    for split, anatomies in splits.items():
        for number in anatomies:
            for variant in range(variants if split == "train" else eval_variants):
                with_skull = skull is Skull.with_ or (skull is Skull.both and variant % 2 == 0)
                kind = contrast.value if split == "train" else "t1"
                inputs = (paths[number], (seed, number, variant), kind, with_skull, split != "train", settings)
                cases.append(Case(f"brain_{number:02d}_{variant:02d}", f"anatomy_{number:02d}", split, inputs))
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


def check_decathlon(source: Path, names: dict[int, str]) -> list[Path]:
    """Images of a Decathlon folder, every one with a good label file.

    Raises:
        ValueError: lists all problems of all files at once.
    """
    images = sorted(path for path in (source / "imagesTr").glob("*.nii.gz") if not path.name.startswith("."))
    if not images:
        raise ValueError(f"{source} holds no imagesTr/*.nii.gz; expected the Decathlon layout imagesTr/, labelsTr/")
    problems = []
    for path in images:
        label_path = source / "labelsTr" / path.name
        if not label_path.is_file():
            problems.append(f"{path.name}: no labelsTr/{path.name}")
            continue
        try:
            image, label = nib.Nifti1Image.from_filename(path), nib.Nifti1Image.from_filename(label_path)
            voxels, classes = np.asanyarray(image.dataobj), np.asanyarray(label.dataobj)
        except (nib.filebasedimages.ImageFileError, OSError, EOFError, ValueError) as error:
            problems.append(f"{path.name}: unreadable image or label ({error})")
            continue
        if voxels.ndim != 3:
            problems.append(f"{path.name}: expected 3 axes, found shape {voxels.shape}")
        if voxels.shape != classes.shape:
            problems.append(f"{path.name}: image shape {voxels.shape}, label shape {classes.shape}")
        if not np.allclose(image.affine, label.affine, atol=1e-3):
            problems.append(f"{path.name}: image and label have different affines")
        if bad := int((~np.isfinite(voxels)).sum()):
            problems.append(f"{path.name}: {bad} voxels are NaN or infinite")
        if unexpected := sorted(set(np.unique(classes).tolist()) - set(names)):
            problems.append(f"{path.name}: unexpected label values {unexpected[:8]}; known are {sorted(names)}")
    images_names = {path.name for path in images}
    lonely = [path.name for path in (source / "labelsTr").glob("*.nii.gz") if path.name not in images_names]
    problems += [f"labelsTr/{name}: no imagesTr/{name}" for name in sorted(lonely) if not name.startswith(".")]
    if problems:
        raise ValueError(f"{len(problems)} problems in {source}; repair or remove these files:\n" + "\n".join(problems))
    return images


def group_of(path: Path, rule: GroupRule) -> str:
    """`pairs`: files 2k-1 and 2k are one subject (Hippocampus: most likely left and right side of one person)."""
    stem = path.name.removesuffix(".nii.gz")
    if rule is GroupRule.none:
        return stem
    number = re.search(r"(\d+)$", stem)
    if number is None:
        raise ValueError(f"{path.name}: --group-rule pairs needs a number at the end of the name; use none")
    return f"pair_{(int(number[1]) + 1) // 2:04d}"


def split_groups(groups: list[str], test_fraction: float, validation_fraction: float, seed: int) -> dict[str, str]:
    """Split of every group: shuffled, then whole groups to test until `test_fraction` of all cases is reached, then to
    validation until `validation_fraction` of the remaining cases is.
    """
    sizes = {group: groups.count(group) for group in sorted(set(groups))}
    order = [list(sizes)[index] for index in np.random.default_rng(seed).permutation(len(sizes))]
    test_size = round(test_fraction * len(groups))
    targets = {"test": test_size, "validation": round(validation_fraction * (len(groups) - test_size))}
    splits: dict[str, str] = {}
    for split, target in targets.items():
        taken = 0
        for group in order:
            if taken < target and group not in splits:
                splits[group] = split
                taken += sizes[group]
    return {group: splits.get(group, "train") for group in order}


def build_decathlon(out: Path, case: Case) -> dict:
    """Copy one case to RAS order; voxel values stay as they are."""
    image_path, label_path = case.inputs
    image, label = (nib.as_closest_canonical(nib.Nifti1Image.from_filename(path)) for path in (image_path, label_path))
    classes = np.asanyarray(label.dataobj).astype(np.uint8)
    return write_case(out, case, image, nib.Nifti1Image(classes, image.affine), {})


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
    names = {int(value): name for value, name in description.get("labels", HIPPOCAMPUS_NAMES).items()}
    try:
        images = check_decathlon(source, names)
        groups = [group_of(path, group_rule) for path in images]
    except ValueError as error:
        fail(str(error))
    splits = split_groups(groups, test_fraction, validation_fraction, seed)
    cases = [
        Case(path.name.removesuffix(".nii.gz"), group, splits[group], (path, source / "labelsTr" / path.name))
        for path, group in zip(images, groups, strict=False)
    ]
    spacings = np.array([nib.affines.voxel_sizes(nib.Nifti1Image.from_filename(path).affine) for path in images])
    manifest = {
        "name": description.get("name", "hippocampus"),
        "source": "Medical Segmentation Decathlon layout; Task04_Hippocampus if no dataset.json says otherwise",
        "licence": description.get("licence", "CC BY-SA 4.0"),
        "spacing": np.median(spacings, axis=0).round(6).tolist(),
        "label_names": names | {0: "background"},
        "seed": seed,
        "settings": {
            "group_rule": group_rule.value,
            "test_fraction": test_fraction,
            "validation_fraction": validation_fraction,
        },
    }
    write_dataset(out, cases, build_decathlon, manifest, 1, qc_every)


if __name__ == "__main__":
    app()
