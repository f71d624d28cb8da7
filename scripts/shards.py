"""A prepared folder as Parquet shards, each volume's NIfTI file embedded, which the datasets library streams.

datasets.load_dataset("data/amos/shards", split="train", streaming=True)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prepared_folder import SPLITS


def write_shards(folder: Path, manifest: dict[str, Any], shard_mb: int) -> None:
    """Write shards/data/SPLIT-NNNNN-of-NNNNN.parquet and shards/README.md into a prepared folder.

    Columns: ``case``, ``group`` (the patient), ``image`` and, where there are labels, ``label``; the last two decode to
    nibabel images (I, J, K) in RAS order with the intensities and label numbers of the folder's own files.

    Args:
        folder: prepared folder.
        manifest: its manifest.
        shard_mb: a shard is closed when its volumes pass this size, in 10⁶ bytes; one volume always fits.
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
                # A path beside the bytes would be stored in place of them.
                columns[kind] = [{"bytes": (folder / row[kind]).read_bytes(), "path": None} for row in part]
            # One volume a row group: a stream holds one volume, not one shard.
            Dataset.from_dict(columns, features=features).to_parquet(
                data / f"{split}-{number:05d}-of-{len(parts):05d}.parquet", batch_size=1
            )
    (folder / "shards" / "README.md").write_text(card(manifest))


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
