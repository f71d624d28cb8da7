"""The formats: their samples, how inputs are made from them, what reads them, and what it may raise."""

from __future__ import annotations

import gzip
import importlib
import json
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import typer
import yaml

from fuzzing import seeds
from fuzzing.mutations import (
    Mutation,
    mutate_bytes,
    mutate_dicom,
    mutate_fields,
    mutate_json,
    mutate_text,
    mutate_value,
)
from hf_binaryformer.modeling.pretrained import PACKAGED, CheckpointError, CheckpointNotFoundError
from hf_binaryformer.pipelines.volumes import Volume, VolumeError

LOADED_MODULES = ("transformers", "diffusers", "accelerate", "safetensors.torch", "hf_binaryformer.modeling.networks")
VOLUME_MODULES = ("nibabel", "SimpleITK", "pydicom", "pydicom.pixels", "hf_binaryformer.pipelines.volumes")


@dataclass(frozen=True)
class Sample:
    """A valid file: its content, where inputs are written, what is given to the reader, and the class of a checkpoint."""

    data: bytes
    path: Path
    given: Path
    saved_from: str = ""


@dataclass(frozen=True)
class Target:
    """A format.

    Args:
        name: of the format.
        samples: makes the valid files of the format below a folder.
        mutate: one fault of a file.
        read: reads the file of a sample, with the generator for options.
        refusals: the exceptions that the reader documents; no subclasses.
        modules: imported once, before the workers start.
        fault_of: what is wrong with a result; None if nothing is.
    """

    name: str
    samples: Callable[[Path], list[Sample]]
    mutate: Mutation
    read: Callable[[Sample, Random], Any]
    refusals: tuple[type[Exception], ...]
    modules: tuple[str, ...] = ()
    fault_of: Callable[[Any], str | None] = lambda result: None

    def preload(self) -> None:
        """Import what every worker needs."""
        for module in self.modules:
            importlib.import_module(module)


def _samples(suffix: str, files: Callable[[Path], dict[str, bytes]]) -> Callable[[Path], list[Sample]]:
    """Samples of files that stand alone, each in a folder of its own."""

    def make(folder: Path) -> list[Sample]:
        made = []
        folder.mkdir(parents=True)
        for name, content in files(folder).items():
            path = folder / name / f"input{suffix}"
            path.parent.mkdir()
            path.write_bytes(content)
            made.append(Sample(content, path, path))
        return made

    return make


# ------------------------------------------------------------------------------------------------------------ volumes


def read_any_volume(sample: Sample, rng: Random) -> tuple[Volume, bool]:
    """Read as an image, as labels, or exactly; returns whether values must be finite."""
    from hf_binaryformer.pipelines.volumes import read_volume

    kind = rng.randrange(4)
    return read_volume(sample.given, labels=kind == 2, exact=kind == 3), kind != 3


def volume_fault(result: tuple[Volume, bool]) -> str | None:
    """What makes a volume unusable."""
    volume, finite = result
    if volume.array.ndim != 3 or not volume.array.size or volume.array.dtype not in (np.float32, np.int32):
        return f"{volume.array.dtype} of shape {volume.array.shape}"
    if finite and not np.isfinite(volume.array).all():
        return "values that are not finite"
    if not np.isfinite(volume.affine).all() or not min(volume.spacing) > 0:
        return f"affine {volume.affine.tolist()}"
    return None


def nifti_fields(data: bytes) -> dict[str, tuple[int, str]]:
    """Offset and code of every number in a header."""
    import nibabel as nib

    second = data[:4] in (struct.pack("<i", 540), struct.pack(">i", 540))
    order = ">" if data[:4] in (struct.pack(">i", 348), struct.pack(">i", 540)) else "<"
    template: Any = (nib.Nifti2Header if second else nib.Nifti1Header).template_dtype
    fields: dict[str, tuple[int, str]] = {}
    for name in template.names:
        dtype, offset = template.fields[name][:2]
        code = dtype.base.char
        if code in "bBhHiIqQfd":
            for n in range(int(np.prod(dtype.shape))):
                fields[f"{name}{n}"] = (offset + n * dtype.base.itemsize, order + code)
        elif code in "lL":
            for n in range(int(np.prod(dtype.shape))):
                fields[f"{name}{n}"] = (offset + n * dtype.base.itemsize, order + ("q" if code == "l" else "Q"))
    return {name: place for name, place in fields.items() if place[0] + 8 <= len(data)}


def mutate_nifti(data: bytes, rng: Random) -> bytes:
    """A field of the header, or bytes."""
    fields = nifti_fields(data)
    return mutate_fields(data, rng, fields) if fields and rng.random() < 0.6 else mutate_bytes(data, rng)


def mutate_gzip(data: bytes, rng: Random) -> bytes:
    """The compressed bytes, or what they hold: then the checksum is right, or the member stands before another one."""
    if rng.random() < 0.4:
        return mutate_bytes(data, rng)
    try:
        content = gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        return mutate_bytes(data, rng)
    kind = rng.random()
    if kind < 0.1:
        return gzip.compress(content + bytes(2**24), mtime=0)
    return gzip.compress(mutate_nifti(content, rng), 1, mtime=0) + (data if kind < 0.15 else b"")


def mutate_itk(data: bytes, rng: Random) -> bytes:
    """A line or word of the text header, or bytes."""
    end = re.search(rb"ElementDataFile[^\n]*\n|\n\n", data)
    if end is None or rng.random() < 0.35:
        return mutate_bytes(data, rng)
    return mutate_text(data, rng, end.end())


def mutate_dicom_file(data: bytes, rng: Random) -> bytes:
    """An element, or bytes."""
    return mutate_dicom(data, rng) if rng.random() < 0.6 else mutate_bytes(data, rng)


def series_samples(folder: Path) -> list[Sample]:
    """The middle slice of a series, read by its folder and by its name."""
    made = []
    for kind in ("folder", "file"):
        where = folder / kind
        where.mkdir(parents=True)
        slices = seeds.dicom_series(where)
        for k, content in enumerate(slices):
            (where / f"{k}.dcm").write_bytes(content)
        made.append(Sample(slices[1], where / "1.dcm", where if kind == "folder" else where / "1.dcm"))
    return made


def multiframe_files(folder: Path) -> dict[str, bytes]:
    """Plain and run-length encoded."""
    return {str(packed): seeds.dicom_multiframe(folder, packed=packed) for packed in (False, True)}


# -------------------------------------------------------------------------------------------------------- checkpoints


def checkpoint_samples(folder: Path, suffixes: tuple[str, ...]) -> list[Sample]:
    """Files of these suffixes in copies of the packaged checkpoints; each copy links to what is not damaged."""
    made: list[Sample] = []
    for config in sorted(PACKAGED.rglob("*config.json")):
        content = json.loads(config.read_text())
        saved_from = (content.get("architectures") or [content.get("_class_name")])[0]
        for original in sorted(config.parent.iterdir()):
            is_first = original == config or original.suffix == ".safetensors"
            if config.name.startswith("preprocessor") or original.suffix not in suffixes or not is_first:
                continue
            where = folder / f"{len(made)}"
            where.mkdir(parents=True)
            for other in config.parent.iterdir():
                (where / other.name).symlink_to(other)
            (where / original.name).unlink()
            (where / original.name).write_bytes(original.read_bytes())
            made.append(Sample(original.read_bytes(), where / original.name, where, saved_from))
    return made


def read_checkpoint(sample: Sample, rng: Random) -> Any:
    """Load a model or scheduler by the class that its config names, or by the one that it was saved from."""
    from hf_binaryformer.pipelines.loading import from_pretrained, own_classes

    if rng.random() < 0.5:
        return from_pretrained(sample.given)
    classes = {kind.__name__: kind for flag in (True, False) for kind in own_classes(False, flag)}
    return classes[sample.saved_from].from_pretrained(sample.given)


def mutate_safetensors(data: bytes, rng: Random) -> bytes:
    """The length of the header, a value of it, or bytes."""
    kind = rng.random()
    if len(data) < 8 or kind < 0.3:
        return mutate_bytes(data, rng)
    if kind < 0.4:
        return mutate_fields(data, rng, {"length": (0, "<Q")})
    size = int.from_bytes(data[:8], "little")
    header = mutate_json(data[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


# ------------------------------------------------------------------------------------------------------------- texts


def mutate_yaml(data: bytes, rng: Random) -> bytes:
    """A value, a word of the text, or bytes."""
    kind = rng.random()
    if kind < 0.3:
        return mutate_bytes(data, rng)
    if kind < 0.55:
        return mutate_text(data, rng, len(data))
    if kind < 0.65:
        return mutate_json(data, rng)
    try:
        return yaml.safe_dump(mutate_value(yaml.safe_load(data), rng)).encode("utf-8", "replace")
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError):
        return mutate_bytes(data, rng)


def read_recipe(sample: Sample, rng: Random) -> Any:
    """A recipe by its path; some with a value that is set."""
    from hf_binaryformer.training.recipes import load_recipe

    return load_recipe(str(sample.given), ["train.batch_size=3"] if rng.random() < 0.1 else [])


def read_manifest(sample: Sample, rng: Random) -> Any:
    """A prepared folder's cases, as trainings read them."""
    from hf_binaryformer.data.prepared_folder import SPLITS, PreparedFolder

    folder = PreparedFolder(sample.given.parent)
    return [folder.split(name) for name in SPLITS]


def read_names(sample: Sample, rng: Random) -> Any:
    """Label names of `evaluate`."""
    from hf_binaryformer.commands.jobs import read_label_names

    return read_label_names(sample.given)


def names_fault(names: dict[int, str]) -> str | None:
    """What is wrong with label names."""
    plain = all(isinstance(number, int) and isinstance(name, str) for number, name in names.items())
    return None if plain else "names or numbers of another type"


def manifest_samples(folder: Path) -> list[Sample]:
    """A manifest in its folder."""
    path = folder / "manifest.json"
    folder.mkdir(parents=True)
    path.write_text(json.dumps(seeds.MANIFEST))
    return [Sample(path.read_bytes(), path, path)]


def names_files(folder: Path) -> dict[str, bytes]:
    """The forms that label names have."""
    forms = {"plain": seeds.LABELS, "report": seeds.REPORT_LABELS, "manifest": seeds.MANIFEST}
    return {name: json.dumps(content).encode() for name, content in forms.items()}


def _volume(name: str, suffix: str, files: Callable[[Path], dict[str, bytes]], mutate: Mutation) -> Target:
    reader = {"read": read_any_volume, "refusals": (VolumeError,), "fault_of": volume_fault, "modules": VOLUME_MODULES}
    return Target(name, _samples(suffix, files), mutate, **reader)  # type: ignore[arg-type]


CHECKPOINT = {
    "read": read_checkpoint,
    "refusals": (CheckpointError, CheckpointNotFoundError),
    "modules": LOADED_MODULES,
}
TARGETS = {
    target.name: target
    for target in (
        _volume("nifti", ".nii", lambda folder: seeds.nifti_files(), mutate_nifti),
        _volume("nifti_gz", ".nii.gz", lambda folder: seeds.compressed(seeds.nifti_files()), mutate_gzip),
        _volume("mha", ".mha", lambda folder: seeds.itk_files(".mha", folder), mutate_itk),
        _volume("nrrd", ".nrrd", lambda folder: seeds.itk_files(".nrrd", folder), mutate_itk),
        Target(
            "dicom", series_samples, mutate_dicom_file, read_any_volume, (VolumeError,), VOLUME_MODULES, volume_fault
        ),
        _volume("dicom_multiframe", ".dcm", multiframe_files, mutate_dicom_file),
        Target("config", lambda folder: checkpoint_samples(folder, (".json",)), mutate_json, **CHECKPOINT),  # type: ignore[arg-type]
        Target(
            "safetensors",
            lambda folder: checkpoint_samples(folder, (".safetensors",)),
            mutate_safetensors,
            **CHECKPOINT,  # type: ignore[arg-type]
        ),
        Target(
            "recipe",
            _samples(".yaml", lambda folder: {name: text.encode() for name, text in seeds.RECIPES.items()}),
            mutate_yaml,
            read_recipe,
            (typer.BadParameter,),
            ("hf_binaryformer.training.recipes",),
        ),
        Target(
            "manifest",
            manifest_samples,
            mutate_json,
            read_manifest,
            (ValueError, FileNotFoundError),
            ("hf_binaryformer.data.prepared_folder",),
        ),
        Target(
            "label_names",
            _samples(".json", names_files),
            mutate_json,
            read_names,
            (ValueError,),
            ("hf_binaryformer.commands.jobs",),
            names_fault,
        ),
    )
}
