"""How well a label volume agrees with the truth: Dice, surface Dice and HD95 for each label, by MONAI."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

METRICS = ("dice", "nsd", "hd95")
ABSENT_LABELS = (
    "A label in neither prediction nor truth is not counted (NaN). In only one of them, its Dice and NSD are 0, and its "
    "HD95 is not counted (NaN)."
)


@dataclass(frozen=True)
class LabelScore:
    """Agreement on one label, of one volume or averaged over several.

    Args:
        label: label number; None in a mean over labels.
        name: its name.
        dice: 2 |P and T| / (|P| + |T|), 0 to 1; 0 where only one of the two has the label, NaN where neither has it.
        nsd: normalised surface Dice, the share of both surfaces' voxels that lie within the tolerance of the other
            surface, 0 to 1; 0 and NaN as for Dice.
        hd95: larger of the two 95th percentiles of surface distances, in mm; NaN where either volume lacks the label.
        nan: how many of the averaged values were NaN and are left out, for each of "dice", "nsd", "hd95".
    """

    label: int | None
    name: str
    dice: float
    nsd: float
    hd95: float
    nan: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON has them: NaN becomes null."""
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(self).items()}


def mask_dice(pred: np.ndarray, truth: np.ndarray) -> float:
    """Dice of two boolean masks of the same shape; 0 where one of them is empty, NaN where both are."""
    from monai.metrics import compute_dice

    # MONAI's own rule gives NaN wherever the truth is empty, so that an invented structure would cost nothing.
    if not truth.any():
        return 0.0 if pred.any() else math.nan

    return float(compute_dice(_as_batch(pred), _as_batch(truth)))


def _as_batch(mask: np.ndarray) -> torch.Tensor:
    """(I, J, K) as MONAI wants it: (1, 1, I, J, K) float32."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(mask, dtype=np.float32))[None, None]


def score_labels(
    pred: np.ndarray,
    truth: np.ndarray,
    spacing: Sequence[float],
    *,
    label_names: Mapping[int, str] | None = None,
    tolerance: float = 1.0,
) -> list[LabelScore]:
    """Dice, NSD and HD95 of every label but 0; :class:`LabelScore` says what counts where a label is absent.

    A surface is the set of a mask's voxels that have a neighbour (one of six) outside it; its distances run between
    voxel centres.

    Args:
        pred: predicted labels, (I, J, K), whole numbers.
        truth: true labels on the same grid.
        spacing: voxel size along I, J, K in mm.
        label_names: which labels to score, with their names. None: those that occur in either, called "label 3".
        tolerance: distance in mm up to which a surface voxel counts as right in the NSD.

    Raises:
        ValueError: shapes differ, the tolerance is negative or not finite, or a label occurs that has no name.
    """
    if pred.shape != truth.shape:
        raise ValueError(f"prediction has shape {pred.shape}, truth {truth.shape}; both must be on the same grid")
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance is {tolerance} mm; expected a finite number of at least 0")
    found = {int(label) for volume in (pred, truth) for label in np.unique(volume)} - {0}
    if label_names is None:
        label_names = {label: f"label {label}" for label in found}
    elif unknown := found - set(label_names):
        raise ValueError(
            f"label ids {sorted(unknown)} occur in the volumes but have no name; "
            f"named are {sorted(label_names)}: add them to the names or score without names"
        )
    return [
        _score_mask(label, name, pred == label, truth == label, spacing, tolerance)
        for label, name in sorted(label_names.items())
        if label != 0
    ]


def _score_mask(
    label: int, name: str, pred: np.ndarray, truth: np.ndarray, spacing: Sequence[float], tolerance: float
) -> LabelScore:
    # Without a true surface, MONAI gives a surface Dice of 0, and a warning for distances; see ABSENT_LABELS.
    dice = nsd = hd95 = math.nan
    if pred.any() or truth.any():
        pred, truth = _crop_to_union(pred, truth)
        dice, nsd = mask_dice(pred, truth), 0.0
        if pred.any() and truth.any():
            nsd, hd95 = _surface_scores(pred, truth, spacing, tolerance)
    values = {"dice": dice, "nsd": nsd, "hd95": hd95}
    return LabelScore(label, name, **values, nan={k: int(math.isnan(v)) for k, v in values.items()})


def _crop_to_union(pred: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both masks within the smallest box that holds them and one voxel around it, as far as the volume reaches."""
    union, box = pred | truth, []
    for axis in range(union.ndim):
        hits = np.flatnonzero(union.any(axis=tuple(a for a in range(union.ndim) if a != axis)))
        box.append(slice(max(0, hits[0] - 1), hits[-1] + 2))
    return pred[tuple(box)], truth[tuple(box)]


def _surface_scores(
    pred: np.ndarray, truth: np.ndarray, spacing: Sequence[float], tolerance: float
) -> tuple[float, float]:
    """(NSD, HD95) of two masks that are both not empty."""
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    pair, mm = (_as_batch(pred), _as_batch(truth)), [float(s) for s in spacing]
    with warnings.catch_warnings():
        # MONAI 1.6 calls its own function with an argument that it has deprecated.
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
        nsd = compute_surface_dice(*pair, class_thresholds=[tolerance], include_background=True, spacing=mm)
        hd95 = compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=mm)
    return float(nsd), float(hd95)


def mean_score(scores: Iterable[LabelScore], *, label: int | None = None, name: str = "mean") -> LabelScore:
    """Mean of each metric over the scores that are not NaN, and the number of NaN scores; NaN if all of them are."""
    rows = list(scores)
    values, nan = {}, {}
    for metric in METRICS:
        numbers = [getattr(row, metric) for row in rows if not math.isnan(getattr(row, metric))]
        values[metric] = sum(numbers) / len(numbers) if numbers else math.nan
        nan[metric] = sum(row.nan[metric] for row in rows)
    return LabelScore(label, name, **values, nan=nan)


def sample_deviation(values: Iterable[float]) -> float:
    """Standard deviation sqrt(sum((x - mean)²) / (n - 1)) of the n values that are not NaN; NaN of fewer than two.

    Every spread over cases, seeds or samples that this project prints or writes is this one.
    """
    numbers = [value for value in values if not math.isnan(value)]
    return float(np.std(numbers, ddof=1)) if len(numbers) > 1 else math.nan


def summarize(cases: Sequence[Sequence[LabelScore]]) -> list[LabelScore]:
    """Mean over cases for each label, by number; the last row is the mean over these labels."""
    by_label: dict[int | None, list[LabelScore]] = {}
    for score in (score for case in cases for score in case):
        by_label.setdefault(score.label, []).append(score)
    rows = [
        mean_score(by_label[label], label=label, name=by_label[label][0].name)
        for label in sorted(by_label, key=lambda number: number or 0)
    ]
    return [*rows, mean_score(rows)]
