"""What the viewer shows: files by their address, colours, names. `static/viewer.js` draws it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hf_binaryformer.app.workspace import Workspace
from hf_binaryformer.pipelines.overlay import label_colours
from hf_binaryformer.pipelines.volumes import Volume, write_image

HOLE_COLOUR = (255, 77, 46)
Scene = dict[str, Any]


def viewable(workspace: Workspace) -> Path:
    """The scan as NIfTI: itself, or, for DICOM, written once beside the series."""
    source, volume = workspace.scan()
    if source.is_file():
        return source
    path = source.parent / f"{source.name}.nii.gz"
    return path if path.exists() else write_image(path, volume.array, volume)


def colour_table(colours: Mapping[int, tuple[int, int, int]], names: Mapping[int, str]) -> dict[str, Any]:
    """Colours of label numbers in the viewer's form; 0 is transparent."""
    numbers = [0, *sorted(number for number in colours if number)]
    rgb = [colours.get(number, (0, 0, 0)) for number in numbers]
    return {
        "R": [r for r, _, _ in rgb],
        "G": [g for _, g, _ in rgb],
        "B": [b for _, _, b in rgb],
        "A": [255 if number else 0 for number in numbers],
        "I": numbers,
        "labels": [names.get(number, f"label {number}") if number else "" for number in numbers],
    }


def report_colours(report: Mapping[str, Any]) -> dict[int, tuple[int, int, int]]:
    """Colour of each label of a segmentation's report, as in its picture."""
    return label_colours(np.zeros(1, np.int32), {row["label"]: row["name"] for row in report["labels"]})


def scan_scene(workspace: Workspace) -> Scene:
    """The scan alone, in three planes and as a rendering."""
    return {"panels": [{"title": "", "render": True, "volumes": [_image(workspace)]}]}


def labels_scene(workspace: Workspace, labels: Path, report: Mapping[str, Any]) -> Scene:
    """The scan with its labels."""
    names = {row["label"]: row["name"] for row in report["labels"]}
    overlay = _labels(workspace, labels, colour_table(report_colours(report), names))
    return {"panels": [{"title": "", "render": True, "volumes": [_image(workspace), overlay]}]}


def hole_scene(workspace: Workspace, mask: Path) -> Scene:
    """The scan with the hole."""
    return {"panels": [{"title": "", "render": False, "volumes": [_image(workspace), _hole(workspace, mask)]}]}


def filled_scene(workspace: Workspace, files: Mapping[str, Path]) -> Scene:
    """Before, after and standard deviation side by side; one crosshair moves in all."""
    image = _image(workspace)
    after = {**image, "url": workspace.publish(files["NIfTI"])}
    panels = [
        {"title": "before, with the hole", "render": False, "volumes": [image, _hole(workspace, files["mask"])]},
        {"title": "after", "render": False, "volumes": [after]},
    ]
    if "std" in files:
        spread = {"url": workspace.publish(files["std"]), "colormap": "inferno", "opacity": 0.9, "cal_min": 0}
        title = "standard deviation over the samples"
        panels.append({"title": title, "render": False, "volumes": [dict(image), spread]})
    return {"panels": panels}


def window(volume: Volume) -> tuple[float, float]:
    """The intensities that are shown as black and white: the 0.5 and 99.5 percentiles."""
    low, high = np.percentile(volume.array, (0.5, 99.5))
    return float(low), float(max(high, low + 1e-6))


def _image(workspace: Workspace) -> dict[str, Any]:
    _, volume = workspace.scan()
    low, high = window(volume)
    return {"url": workspace.publish(viewable(workspace)), "colormap": "gray", "cal_min": low, "cal_max": high}


def _labels(workspace: Workspace, path: Path, table: dict[str, Any]) -> dict[str, Any]:
    return {"url": workspace.publish(path), "labels": table, "opacity": 0.6}


def _hole(workspace: Workspace, path: Path) -> dict[str, Any]:
    numbers = {int(n): HOLE_COLOUR for n in np.unique(_mask_values(path)) if n}
    return _labels(workspace, path, colour_table(numbers, dict.fromkeys(numbers, "hole")))


def _mask_values(path: Path) -> np.ndarray:
    from hf_binaryformer.pipelines.volumes import read_volume

    return read_volume(path, labels=True).array
