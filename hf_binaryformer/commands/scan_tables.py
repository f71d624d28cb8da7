"""Many scans at a glance: a table of volumes as CSV, and a page of pictures as one HTML file."""

from __future__ import annotations

import base64
import csv
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_binaryformer.pipelines.provenance import NOTICE
from hf_binaryformer.pipelines.whole_files import whole_file

# Scores below these are coloured on the page. A note says where a score is too low; colours help the eye.
GOOD, FAIR = 0.85, 0.7
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
body { margin: 1rem; background: #0d1117; color: #e6edf3; font: 14px system-ui, sans-serif }
main { display: flex; flex-wrap: wrap; gap: .75rem }
article { border: 1px solid #30363d; border-left: .3rem solid #3fa36b; border-radius: .3rem; padding: .5rem; max-width: 36rem }
article.fair { border-left-color: #ff9f1c } article.poor, li { border-left-color: #ff4d2e }
h2 { margin: 0 0 .3rem; font-size: 1rem; overflow-wrap: anywhere } h2 b { float: right; margin-left: 1rem }
img { max-width: 100%; height: auto } p { margin: .2rem 0; color: #ff9f1c } li { color: #ff4d2e }
td { padding: 0 .8rem 0 0 } td + td { text-align: right } small { color: #8b949e }
body:has(#by-name:checked) article { order: var(--by-name) } body:has(#by-quality:checked) article { order: var(--by-quality) }
"""


@dataclass(frozen=True)
class Row:
    """What both tables say of one scan.

    Args:
        name: of the scan.
        source: its file or folder.
        quality: score of the scan, 0 to 1; None where nothing was found.
        volumes: of each structure in ml.
        intracranial: estimate in ml; None where the labels are no brain.
        groups: quality score of each group of structures; None where nothing was found.
        notes: warnings.
        picture: JPEG.
    """

    name: str
    source: str
    quality: float | None
    volumes: Mapping[str, float]
    intracranial: float | None
    groups: Mapping[str, float | None]
    notes: Sequence[str]
    picture: Path

    @classmethod
    def of(cls, name: str, report: Mapping[str, Any], picture: Path) -> Row:
        """The row of a segmentation's report.

        Raises:
            KeyError, TypeError: it is no such report.
        """
        quality = report["quality"]
        return cls(
            name,
            str(report["input"]),
            quality["score"],
            {row["name"]: float(row["volume_ml"]) for row in report["labels"] if row["label"]},
            report["intracranial_ml"],
            {row["name"]: row["score"] for row in quality["groups"]},
            [str(note) for note in report["notes"]],
            picture,
        )


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write a row for each scan: name, file, quality score, volume of each structure in ml, quality of each group, warnings.

    UTF-8 with commas and a line of names; a number that is not known is left empty. The file appears whole or not at all.
    """
    rows = sorted(rows, key=lambda row: row.name)
    structures = list(dict.fromkeys(name for row in rows for name in row.volumes))
    groups = list(dict.fromkeys(name for row in rows for name in row.groups))
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        head = ["scan", "input", "quality", *(f"{name} ml" for name in structures), "intracranial ml"]
        table.writerow([*head, *(f"quality {name}" for name in groups), "warnings"])
        for row in rows:
            volumes = [_number(row.volumes.get(name), 3) for name in structures]
            scores = [_number(row.groups.get(name), 4) for name in groups]
            start = [row.name, row.source, _number(row.quality, 4)]
            table.writerow([*start, *volumes, _number(row.intracranial, 1), *scores, " | ".join(row.notes)])


def write_page(path: Path, rows: Iterable[Row], failures: Sequence[tuple[str, str]], title: str) -> None:
    """Write one HTML file that needs no other, without scripts: a picture, warnings and volumes for each scan.

    The lowest quality comes first; a click sorts by name. One picture at a time is held in memory.

    Args:
        path: .html, which appears whole or not at all.
        rows: of the scans.
        failures: name and error of each scan without a result.
        title: first line.
    """
    rows = sorted(rows, key=lambda row: (-1.0 if row.quality is None else row.quality, row.name))
    places = {name: place for place, name in enumerate(sorted(row.name for row in rows))}
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
            f"<body><h1>{html.escape(title)}</h1><p><small>{len(rows)} segmented, {len(failures)} failed. {NOTICE}</small></p>\n"
        )
        if failures:
            items = "".join(f"<li>{html.escape(name)}: {html.escape(why)}</li>\n" for name, why in failures)
            file.write(f"<ul>\n{items}</ul>\n")
        file.write(
            '<label><input type="radio" name="order" id="by-quality" checked> lowest quality first</label>\n'
            '<label><input type="radio" name="order" id="by-name"> by name</label>\n<main>\n'
        )
        for place, row in enumerate(rows):
            file.write(_article(row, place, places[row.name]))
        file.write("</main></body></html>\n")


def _article(row: Row, by_quality: int, by_name: int) -> str:
    score = row.quality
    kind = "poor" if score is None or score < FAIR else "fair" if score < GOOD else "good"
    volumes = dict(row.volumes) | ({} if row.intracranial is None else {"intracranial (estimate)": row.intracranial})
    cells = "".join(f"<tr><td>{html.escape(name)}</td><td>{ml:,.1f} ml</td></tr>" for name, ml in volumes.items())
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in row.notes)
    picture = base64.b64encode(row.picture.read_bytes()).decode("ascii")
    return (
        f'<article class="{kind}" style="--by-quality:{by_quality};--by-name:{by_name}">'
        f"<h2>{html.escape(row.name)} <b>{'nothing found' if score is None else f'{score:.2f}'}</b></h2>"
        f'<img alt="labels on three slices" src="data:image/jpeg;base64,{picture}">{notes}'
        f"<details><summary>volumes</summary><table>{cells}</table></details></article>\n"
    )


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
