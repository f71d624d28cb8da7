"""Converts a prepared folder to Parquet shards with embedded NIfTI files, which the datasets library streams, and back.

datasets.load_dataset("data/amos/shards", split="train", streaming=True)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_binaryformer.data.prepared_folder import SPLITS, read_manifest


def write_shards(folder: Path, manifest: dict[str, Any], shard_mb: int) -> None:
    """Write shards/data/SPLIT-NNNNN-of-NNNNN.parquet, shards/README.md and the manifest into a prepared folder.

    Columns: ``case``, ``group`` (the patient), ``image`` and, where there are labels, ``label``; the last two decode to
    nibabel images (I, J, K) in RAS order with the intensities and label numbers of the folder's own files.

    Args:
        folder: prepared folder.
        manifest: its manifest, without the command. The command names folders of this machine, and shards are meant to
            be shared.
        shard_mb: largest size of a shard in 10⁶ bytes, summed over its volumes; a larger volume has a shard of its own.
    """
    from datasets import Dataset, Features, Nifti, Value

    data = folder / "shards" / "data"
    data.mkdir(parents=True)
    kinds = [kind for kind in ("image", "label") if all(kind in row for row in manifest["cases"])]
    features = Features({"case": Value("string"), "group": Value("string")} | {kind: Nifti() for kind in kinds})
    for split in SPLITS:
        rows = [row for row in manifest["cases"] if row["split"] == split]
        parts = partition(
            rows, [sum((folder / row[k]).stat().st_size for k in kinds) for row in rows], shard_mb * 10**6
        )
        for number, part in enumerate(parts):
            columns: dict[str, list[Any]] = {key: [row[key] for row in part] for key in ("case", "group")}
            for kind in kinds:
                # If a path were given as well, it would be stored instead of the bytes.
                columns[kind] = [{"bytes": (folder / row[kind]).read_bytes(), "path": None} for row in part]
            # One volume per row group, so that a stream holds one volume in memory and not a whole shard.
            Dataset.from_dict(columns, features=features).to_parquet(
                data / f"{split}-{number:05d}-of-{len(parts):05d}.parquet", batch_size=1
            )
    (folder / "shards" / "README.md").write_text(card(manifest))
    (folder / "shards" / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def fetch_shards(source: str) -> Path:
    """The folder of this name or, if there is none, the data set of this Hub id, downloaded into the Hub's cache.

    Raises:
        ValueError: neither exists, or reading is not permitted.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source, repo_type="dataset"))
    except (OSError, HFValidationError) as error:
        raise ValueError(f"{source} is neither a folder nor a data set that the Hub gives: {error}") from error


def read_shards(shards: Path, folder: Path) -> dict[str, Any]:
    """Write images/ and labels/ of a prepared folder, identical byte for byte to those that :func:`write_shards` read.

    Returns:
        The manifest, without a command.

    Raises:
        ValueError: the shards were not written by :func:`write_shards`, or a volume is missing or differs from the
            manifest.
    """
    if not (shards / "manifest.json").is_file():
        raise ValueError(f"{shards} has no manifest.json: give shards that `binaryformer prepare` wrote")
    manifest = read_manifest(shards / "manifest.json")
    rows = {(row["split"], row["case"]): row for row in manifest["cases"]}
    kinds = [kind for kind in ("image", "label") if any(kind in row for row in rows.values())]
    for kind in kinds:
        (folder / f"{kind}s").mkdir()
    for split, sample in _samples(shards, kinds):
        case = sample["case"]
        row = rows.pop((split, case), {})
        for kind in kinds:
            # The names come from a foreign file: they must not lead out of the folder.
            path, content = f"{kind}s/{case}.nii.gz", (sample.get(kind) or {"bytes": b""})["bytes"]
            known = re.fullmatch(r"[\w.-]+", case) and row.get(kind) == path
            if not known or hashlib.sha256(content).hexdigest() != row[f"{kind}_sha256"]:
                raise ValueError(f"{kind} of {case} ({split}) is not what manifest.json says: fetch the shards anew")
            (folder / path).write_bytes(content)
    if rows:
        missing = ", ".join(case for _, case in list(rows)[:8])
        raise ValueError(f"{shards} lacks {missing} ({len(rows)} volumes): fetch the shards anew")
    return manifest


def _samples(shards: Path, kinds: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Split and columns of each volume, with the files as bytes.

    Raises:
        ValueError: a shard is damaged, or was removed meanwhile.
    """
    from datasets import Nifti, load_dataset

    try:
        for split, stream in load_dataset(str(shards), streaming=True).items():
            for kind in stream.features.keys() & kinds:
                stream = stream.cast_column(kind, Nifti(decode=False))
            for sample in stream:
                yield split, sample
    except Exception as error:
        # Whatever pyarrow, datasets and their parsers raise over a damaged file.
        raise ValueError(f"{shards} cannot be read ({error}): fetch the shards anew") from error


def partition(rows: list[dict[str, Any]], sizes: list[int], limit: int) -> list[list[dict[str, Any]]]:
    """Consecutive rows in parts of at most ``limit`` bytes, or of one row."""
    parts: list[list[dict[str, Any]]] = []
    filled = limit
    for row, size in zip(rows, sizes, strict=True):
        if not parts or filled + size > limit:
            parts.append([])
            filled = 0
        parts[-1].append(row)
        filled += size
    return parts


def card(manifest: dict[str, Any]) -> str:
    """Data card: licence, source, labels."""
    licence = manifest["licence"]
    hub_licence = licence.lower().replace(" ", "-") if licence.startswith("CC") else "other"
    labels = "\n".join(f"| {number} | {name} |" for number, name in manifest["label_names"].items())
    return (
        f"---\nlicense: {hub_licence}\npretty_name: {manifest['name']}\ntags: [medical, mri]\n---\n\n# {manifest['name']}\n\n"
        f"Source: {manifest['source']} {manifest.get('url', '')}\n\nLicence of the source: {licence}. Research only, not for "
        f"clinical use.\n\nRAS order, split by patient. Intensities are the source's; scale them when loading.\n\n"
        f"| label | name |\n| --- | --- |\n{labels}\n"
    )
