"""Changes of a job's inputs while it reads them, and other inputs of the same kind."""

from __future__ import annotations

import random
from pathlib import Path

import nibabel as nib
import numpy as np
from safetensors.torch import load, save

from jobs import FIRST, Job

CHANGES = ("overwritten", "truncated", "appended", "removed")


def mirrored(path: Path) -> bytes:
    """Content of a volume with its first axis reversed: as valid, and different."""
    image = nib.Nifti1Image.from_bytes(_unpacked(path))
    turned = nib.Nifti1Image(np.ascontiguousarray(np.asanyarray(image.dataobj)[::-1]), image.affine, image.header)
    other = path.with_name(f"other-{path.name}")
    nib.save(turned, other)
    content = other.read_bytes()
    other.unlink()
    return content


def _unpacked(path: Path) -> bytes:
    import gzip

    return gzip.decompress(path.read_bytes())


def other_content(path: Path) -> bytes:
    """What another valid file of the same kind holds."""
    if path.name.endswith(".nii.gz"):
        return mirrored(path)
    if path.suffix == ".safetensors":
        tensors = load(path.read_bytes())
        return save({name: tensor * 0.5 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()})
    if path.suffix == ".parquet":
        return next(p for p in sorted(path.parent.glob("*.parquet")) if p != path).read_bytes()
    # Text stays what it is, in other bytes.
    return path.read_bytes() + b"\n"


def set_up_other(job: Job, folder: Path) -> None:
    """Inputs that are valid too, and give other results."""
    folder.mkdir()
    (folder / FIRST).write_text("50")
    job.set_up(folder)
    if job.name not in ("pack", "unpack"):
        for path in folder.rglob("*.nii.gz"):
            path.write_bytes(mirrored(path))


def files_read(job: Job, inputs: Path) -> list[Path]:
    """The inputs that a job reads."""
    found = [path for path in sorted(inputs.rglob("*")) if path.is_file()]
    return [path for path in found if "shards" in path.parts] if job.name == "unpack" else found


class Change:
    """One input and how it is changed; :meth:`undo` restores it."""

    def __init__(self, path: Path, kind: str, rng: random.Random) -> None:
        self.path, self.kind, self._before = path, kind, path.read_bytes()
        if kind == "overwritten":
            self._after = other_content(path)
        else:
            cut = rng.randrange(len(self._before))
            self._after = self._before[:cut] if kind == "truncated" else self._before + rng.randbytes(200)

    def do(self) -> None:
        """In place: the file keeps its identity, as with a program that opens it and writes."""
        if self.kind == "removed":
            self.path.unlink()
        elif self.kind == "truncated":
            with self.path.open("r+b") as file:
                file.truncate(len(self._after))
        else:
            self._write(self._after)

    def undo(self) -> None:
        """Put the old content back."""
        self._write(self._before)

    def _write(self, content: bytes) -> None:
        with self.path.open("r+b" if self.path.exists() else "wb", buffering=0) as file:
            file.write(content)
            file.truncate()
