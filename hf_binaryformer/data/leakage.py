"""Checks splits for leaks: patients and files that are in two splits, and volumes across splits that look the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_binaryformer.pipelines.metrics import sample_deviation
from hf_binaryformer.pipelines.volumes import read_volume

# Volumes are compared as GRID³ block means. Different subjects stay below this correlation, even in one
# registered space.
GRID = 32
SAME_CORRELATION = 0.99
# Two volumes hold the same voxels, moved, if their mean, standard deviation and quantiles all agree within this share
# of the volume's range (5 % to 95 %).
SAME_STATISTICS = 1e-3
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
HASHES = ("image_sha256", "label_sha256", "source_image_sha256", "source_label_sha256")


@dataclass(frozen=True)
class LeakageReport:
    """What :func:`check_leakage` found.

    Args:
        errors: patients, or files with the same content, that are in two splits.
        warnings: pairs of volumes across splits that are nearly the same.
        statistics: for each split, the number of volumes, and the mean and the sample standard deviation over these
            volumes (missing for a single volume) of two quantities: the mean intensity of a volume, and the standard
            deviation of its intensities.
    """

    errors: list[str]
    warnings: list[str]
    statistics: dict[str, dict[str, float]]


def check_leakage(folder: Path, rows: list[dict[str, Any]]) -> LeakageReport:
    """Compare the splits of a prepared folder.

    Two volumes are nearly the same if one of two conditions holds. Either their block means correlate by at least 0.99,
    which finds copies with another gain or noise. Or their mean, standard deviation and quantiles agree within 0.1 % of
    the range, which finds rotated, mirrored and padded copies.

    Args:
        folder: the prepared folder.
        rows: cases of its manifest.
    """
    splits = np.array([row["split"] for row in rows])
    errors = [
        f"{name} {value[:16]} stands in {' and '.join(sorted(set(splits[where])))}: "
        f"{', '.join(rows[index]['case'] for index in where[:6])}"
        for name, value, where in shared_values(folder, rows)
        if len(set(splits[where])) > 1
    ]
    small, statistics = (np.stack(part) for part in zip(*(fingerprint(folder / r["image"]) for r in rows), strict=True))
    across = np.triu(splits[:, None] != splits[None], 1)
    correlation = small @ small.T
    scale = np.maximum(np.ptp(statistics[:, 2:], axis=1), 1e-12)
    warnings = []
    for a, b in np.argwhere(across):
        apart = np.abs(statistics[a] - statistics[b]).max() / max(scale[a], scale[b])
        if correlation[a, b] >= SAME_CORRELATION or apart <= SAME_STATISTICS:
            found = [f"they correlate by {correlation[a, b]:.4f}"] if correlation[a, b] >= SAME_CORRELATION else []
            if apart <= SAME_STATISTICS:
                found.append("mean and quantiles of their intensities agree")
            warnings.append(
                f"{rows[a]['case']} ({splits[a]}) and {rows[b]['case']} ({splits[b]}) may be one scan: {' and '.join(found)}. "
                f"If so, they belong in one split"
            )
    return LeakageReport(errors, warnings, {str(s): summary(statistics[splits == s]) for s in sorted(set(splits))})


def shared_values(folder: Path, rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, np.ndarray]]:
    """Every group and every file hash that several rows share: its kind, its value, and the indices of the rows."""
    for key in ("group", *HASHES):
        values = np.array([str(row.get(key, "")) for row in rows])
        for value in sorted(set(values) - {""}):
            where = np.flatnonzero(values == value)
            # Two label maps without any label are equal, but that is no leak.
            if len(where) > 1 and not (
                key in HASHES and "label" in key and _is_empty(folder / rows[where[0]]["label"])
            ):
                yield key.removesuffix("_sha256").replace("_", " ") + ("" if key == "group" else " file"), value, where


def _is_empty(label: Path) -> bool:
    return not read_volume(label, labels=True).array.any()


def fingerprint(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A volume's block means (GRID³,), of mean 0 and norm 1, and mean, deviation and quantiles of its foreground.

    The foreground is everything brighter than the minimum, so that padding changes nothing.
    """
    array = read_volume(path).array
    small = torch.nn.functional.adaptive_avg_pool3d(torch.from_numpy(array)[None], GRID).flatten().double().numpy()
    small = small - small.mean()
    inside = array[array > array.min()].astype(np.float64)
    statistics = np.array([inside.mean(), inside.std(), *np.quantile(inside, QUANTILES)])
    return small / max(np.linalg.norm(small), 1e-12), statistics


def summary(statistics: np.ndarray) -> dict[str, float]:
    """The figures of one split for the report, from (volumes, 7) statistics."""
    mean, deviation = statistics[:, 0], statistics[:, 1]
    figures = {
        "mean": mean.mean(),
        "mean_sd": sample_deviation(mean),
        "deviation": deviation.mean(),
        "deviation_sd": sample_deviation(deviation),
    }
    known = {name: float(f"{value:.6g}") for name, value in figures.items() if not math.isnan(value)}
    return {"volumes": len(statistics)} | known
