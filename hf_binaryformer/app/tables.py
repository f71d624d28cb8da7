"""What the page tells in words and numbers, as HTML. All that comes from a file is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_binaryformer.app.scenes import report_colours
from hf_binaryformer.app.workspace import Workspace
from hf_binaryformer.pipelines.provenance import NOTICE
from hf_binaryformer.pipelines.volumes import Volume


def message(text: str, kind: str = "note") -> str:
    """One line in a box of its kind: "note", "warning" or "error"; empty for no text."""
    role = "alert" if kind == "error" else "status"
    return f'<div class="bf-message bf-{kind}" role="{role}">{html.escape(text)}</div>' if text else ""


def scan_facts(name: str, volume: Volume) -> str:
    """Name and grid of a scan, and what its reader had to choose."""
    size = " x ".join(str(n) for n in volume.array.shape)
    spacing = " x ".join(f"{mm:.3g}" for mm in volume.spacing)
    facts = message(f"{name}: {size} voxels of {spacing} mm")
    return facts + "".join(message(note, "warning") for note in volume.notes)


def volumes_table(report: Mapping[str, Any]) -> str:
    """Colour, name, volume in ml and a bar for each structure that was found, the largest bar full."""
    colours = report_colours(report)
    rows = [row for row in report["labels"] if row["label"] and row["voxels"]]
    most = max((row["volume_ml"] for row in rows), default=1.0)
    body = "".join(
        f'<tr><td><i class="bf-swatch" style="background:rgb{colours[row["label"]]}"></i></td>'
        f"<td>{html.escape(row['name'])}</td><td>{row['volume_ml']:,.1f}</td>"
        f'<td><i class="bf-bar" style="width:{100 * row["volume_ml"] / most:.1f}%;'
        f'background:rgb{colours[row["label"]]}"></i></td></tr>'
        for row in rows
    )
    head = '<tr><th></th><th>structure</th><th>ml</th><th class="bf-bars"></th></tr>'
    skull = report.get("intracranial_ml")
    foot = f"<p>intracranial volume, an estimate: {skull:,.0f} ml</p>" if skull else ""
    return f'<table class="bf-volumes"><thead>{head}</thead><tbody>{body}</tbody></table>{foot}'


def quality_box(report: Mapping[str, Any]) -> str:
    """Quality score of the scan, and a box for each warning."""
    score = report["quality"]["score"]
    head = "nothing was found" if score is None else f"quality {score:.2f} of 1, by {report['model']}"
    took = f"{head}, {report['seconds']:.1f} s. {NOTICE}"
    return message(took) + "".join(message(note, "warning") for note in report["notes"])


def filling_box(report: Mapping[str, Any]) -> str:
    """How much was filled, and a box for each warning."""
    text = (
        f"{report['hole_ml'][0]:,.1f} ml filled, {report['samples']} sample(s), {report['steps']} steps, "
        f"{report['seconds']:.1f} s. {report['generated']} {NOTICE}"
    )
    return message(text) + "".join(message(note, "warning") for note in report["notes"])


def downloads(workspace: Workspace, files: Mapping[str, Path]) -> str:
    """A link for each file."""
    links = "".join(
        f'<a class="bf-download" download="{html.escape(path.name)}" href="{workspace.publish(path)}">'
        f"{html.escape(name)} <small>{html.escape(path.name)}</small></a>"
        for name, path in files.items()
    )
    return f'<div class="bf-downloads">{links}</div>'


def without_folders(text: str, root: Path) -> str:
    """A message without the server's folders: a visitor knows the file's name only."""
    return re.sub(rf"{re.escape(str(root))}/\w+/[\w-]+/", "", text)
