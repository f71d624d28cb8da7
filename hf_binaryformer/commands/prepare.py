"""binaryformer prepare folder images masks --names 1=lesion -o data/mine

In a clone: ``scripts/prepare_data.py``. Writes a data folder to train on: images/CASE.nii.gz and labels/CASE.nii.gz on one
grid in RAS order, manifest.json (split by group, file hashes, licence, settings, command) and qc/*.png. Sources:
`folder` (anybody's images and label maps, under their own names), `amos`, `crossmoda`, `oasis` and `spider` (public downloads
as they are; ``data/data_sets/*.yaml``), `hippocampus` (Task04 of the Medical Segmentation Decathlon), `synth-brain` (T1-like
heads synthesised from label maps), `synth-brain-sides` (the same in any contrast and resolution, left and right apart),
`synth-abdomen` (axial scans of any contrast around label maps of abdominal organs) and `shards` (the Parquet shards of a
folder that was prepared elsewhere, by their folder or Hub id).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_binaryformer.data.decathlon import GroupRule, prepare_decathlon
from hf_binaryformer.data.folder_writer import fail, new_folder, show_leakage, write_manifest
from hf_binaryformer.data.hashing import file_hash
from hf_binaryformer.data.leakage import check_leakage
from hf_binaryformer.data.own_folder import prepare_own
from hf_binaryformer.data.prepared_folder import read_manifest
from hf_binaryformer.data.public_data import DATA_SETS, load_data_set, parse_numbers, prepare_public
from hf_binaryformer.data.shards import fetch_shards, read_shards
from hf_binaryformer.data.synth_dataset import Contrast, Skull, prepare_synth_brain, read_settings
from hf_binaryformer.data.synthesis.dataset import prepare_synthetic
from hf_binaryformer.data.synthesis.description import DESCRIPTIONS, load_description

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Prepare training data with splits and a manifest.")

# Options that mean the same for several sources.
Anatomies = Annotated[str, typer.Option(help="Anatomies, e.g. 1-16 or 1,4,7.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything that is drawn; the same seed gives the same folder.")]
SplitSeed = Annotated[int, typer.Option(min=0, help="Of the split.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes.")]
QcEvery = Annotated[int, typer.Option(min=0, help="A QC picture for every n-th volume; 0: none.")]
TestFraction = Annotated[float, typer.Option(min=0, max=1, help="Of all volumes.")]
ValidationFraction = Annotated[float, typer.Option(min=0, max=1, help="Of the volumes not in test.")]


@app.command("folder")
def own_folder(
    images: Annotated[
        str,
        typer.Argument(
            help="Folder of the images, or a pattern in quotes; alone, a folder with imagesTr and labelsTr."
        ),
    ],
    labels: Annotated[str | None, typer.Argument(help="Folder of the label maps, or a pattern in quotes.")] = None,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder to write.")],
    names: Annotated[
        str | None,
        typer.Option(
            help="Names of labels: 1=lesion,2=oedema, or a .yaml or .json file.", show_default="those of dataset.json"
        ),
    ] = None,
    subject: Annotated[
        str | None,
        typer.Option(
            help=r"Whose an image is: a regular expression on its name, e.g. '(P\d+)_'. Without it, what follows sub- (BIDS), or "
            "else each file is another person."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What the data are called.", show_default="the new folder")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the data, for manifest and card.")] = None,
    test_fraction: TestFraction = 0.2,
    validation_fraction: ValidationFraction = 0.2,
    seed: SplitSeed = 0,
    workers: Workers = 1,
    qc_every: QcEvery = 1,
) -> None:
    """Your own images and label maps: pairs are found by file name, and all scans of one person come into one split."""
    try:
        prepare_own(
            images,
            labels,
            out,
            names=names,
            name=name,
            licence=licence,
            subject=subject,
            test_fraction=test_fraction,
            validation_fraction=validation_fraction,
            seed=seed,
            workers=workers,
            qc_every=qc_every,
        )
    except (ValueError, ImportError) as error:
        fail(str(error))


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
        typer.Option("--settings", help="even-t1, or a .yaml with fields of SynthSettings that differ."),
    ] = None,
    train: Anatomies = "1-16",
    validation: Anatomies = "17-18",
    test: Anatomies = "19-20",
    seed: Seed = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes; about 2 GB each.")] = 1,
    qc_every: QcEvery = 7,
) -> None:
    """T1-like (or random-contrast) images synthesised from whole-head label maps, split by anatomy."""
    splits = {"train": parse_numbers(train), "validation": parse_numbers(validation), "test": parse_numbers(test)}
    try:
        prepare_synth_brain(
            labels,
            out,
            splits,
            variants=variants,
            eval_variants=eval_variants,
            contrast=contrast,
            skull=skull,
            settings=read_settings(ranges),
            seed=seed,
            workers=workers,
            qc_every=qc_every,
        )
    except ValueError as error:
        fail(str(error))


@app.command()
def hippocampus(
    source: Annotated[Path, typer.Option(help="Folder with imagesTr/ and labelsTr/ (Decathlon layout).")],
    out: Annotated[Path, typer.Option(help="New folder to write.")],
    test_fraction: TestFraction = 0.24,
    validation_fraction: ValidationFraction = 0.10,
    group_rule: Annotated[
        GroupRule, typer.Option(help="pairs: IDs 2k-1 and 2k stay together; none: each file is another person.")
    ] = GroupRule.pairs,
    seed: SplitSeed = 0,
    qc_every: QcEvery = 20,
) -> None:
    """Task04_Hippocampus of the Medical Segmentation Decathlon. For other files see `prepare folder`."""
    try:
        prepare_decathlon(
            source,
            out,
            test_fraction=test_fraction,
            validation_fraction=validation_fraction,
            group_rule=group_rule,
            seed=seed,
            qc_every=qc_every,
        )
    except ValueError as error:
        fail(str(error))


def add_synthetic(file: Path) -> None:
    """Register the command of a data set that is synthesised as a YAML file describes."""
    told = load_description(file)

    def command(
        labels: Annotated[Path, typer.Option(help="Folder of label maps.")],
        out: Annotated[Path, typer.Option(help="New folder to write.")],
        variants: Annotated[int, typer.Option(min=1, help="Volumes per training anatomy.")] = 19,
        eval_variants: Annotated[int, typer.Option(min=1, help="Of each set, per other anatomy.")] = 1,
        description: Annotated[
            Path, typer.Option(help="Structures, tissues, ranges.", show_default="the data set's own")
        ] = file,
        train: Anatomies = told.splits["train"],
        validation: Anatomies = told.splits["validation"],
        test: Anatomies = told.splits["test"],
        seed: Seed = 0,
        workers: Annotated[int, typer.Option(min=1, help="Processes; about 2 GB each.")] = 1,
        qc_every: QcEvery = 20,
    ) -> None:
        splits = {"train": parse_numbers(train), "validation": parse_numbers(validation), "test": parse_numbers(test)}
        try:
            prepare_synthetic(
                f"synth-{file.stem}",
                description,
                labels,
                out,
                splits,
                variants=variants,
                eval_variants=eval_variants,
                seed=seed,
                workers=workers,
                qc_every=qc_every,
            )
        except ValueError as error:
            fail(str(error))

    what = "images of random contrast and resolution synthesised from label maps, split by anatomy"
    maps = f"The maps are named like {told.files.format(number=1)}."
    app.command(f"synth-{file.stem}", help=f"{file.stem}: {what}. {maps}")(command)


def add_public(file: Path) -> None:
    """Register the command of a public data set, which its YAML file describes."""

    def command(
        source: Annotated[Path, typer.Option(help="Folder of the download, in its public layout.")],
        out: Annotated[Path, typer.Option(help="New folder to write.")],
        config: Annotated[
            Path, typer.Option(help="Label map, size, spacing.", show_default="the data set's own")
        ] = file,
        seed: SplitSeed = 0,
        workers: Workers = 1,
        qc_every: QcEvery = 10,
        shards: Annotated[bool, typer.Option(help="Beside the files, Parquet shards that stream.")] = True,
        shard_mb: Annotated[int, typer.Option(min=1, help="Size of a shard in MB.")] = 500,
    ) -> None:
        try:
            data_set = load_data_set(config)
            prepare_public(data_set, source, out, seed, workers, qc_every, shard_mb if shards else None)
        except (ValueError, ImportError) as error:
            fail(str(error))

    app.command(file.stem, help=f"{load_data_set(file).source}: public layout to a prepared folder.")(command)


@app.command("shards")
def unpack_shards(
    source: Annotated[str, typer.Option(help="Folder of shards, or the id of such a data set on the Hub.")],
    out: Annotated[Path, typer.Option(help="New folder to write.")],
) -> None:
    """Turn shards that `prepare` wrote back into the prepared folder, with its splits."""
    try:
        with new_folder(out) as folder:
            manifest = read_shards(fetch_shards(source), folder)
            write_manifest(folder, manifest)
    except ValueError as error:
        fail(str(error))
    typer.echo(f"{len(manifest['cases'])} volumes -> {out}")


for described in sorted(DESCRIPTIONS.glob("*.yaml")):
    add_synthetic(described)
for described in sorted(DATA_SETS.glob("*.yaml")):
    add_public(described)


@app.command("check-leakage")
def check_folder(folder: Annotated[Path, typer.Argument(help="Prepared folder.")]) -> None:
    """Look for leaks between the splits of a prepared folder, and for files that differ from the manifest."""
    described = folder / "manifest.json"
    try:
        rows = read_manifest(described)["cases"]
    except (OSError, ValueError) as error:
        fail(str(error))
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
