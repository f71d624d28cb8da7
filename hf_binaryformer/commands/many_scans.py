"""Many scans in one run: one network, a result for each scan, and tables of all that is finished."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_binaryformer import __version__
from hf_binaryformer.commands.jobs import DEFAULT_MODEL, load_pipeline
from hf_binaryformer.commands.outputs import TRACEBACK_VARIABLE, check_outputs, write_json
from hf_binaryformer.commands.scan_tables import Row, write_csv, write_page
from hf_binaryformer.commands.scans import Scan, bids_picture, find_scans
from hf_binaryformer.data.hashing import file_hash
from hf_binaryformer.pipelines.whole_files import WriteError, all_or_nothing, unchanged, whole_file, write_text

if TYPE_CHECKING:
    from hf_binaryformer.pipelines.segmentation import VolumeSegmentationPipeline

CSV, PAGE = "volumes.csv", "report.html"
JPEG_QUALITY = 80
BIDS_VERSION = "1.10.0"

# Called with (scans done, a fraction counts the slices of the present one; all scans to be done).
ScansProgress = Callable[[float, int], None]


def segment_scans(
    sources: Sequence[Path],
    output: Path,
    *,
    model: str = DEFAULT_MODEL,
    backend: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    views: str | None = None,
    mirror: bool | None = None,
    keep_largest: bool | None = None,
    head_only: bool | None = None,
    skip_existing: bool = False,
    bids_suffix: str = "T1w",
    progress: ScansProgress | None = None,
    finished: Callable[[str, Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Segment all scans of files, folders and patterns; a scan that fails does not stop the others.

    For each scan, labels, a report and a small picture appear together or not at all. After each, ``volumes.csv`` is written
    anew, with all finished scans in the output folder that were made with the same settings; at the end, ``report.html``.

    Args:
        sources: see :func:`~hf_binaryformer.commands.scans.find_scans`.
        output: folder, made if it is missing.
        model, backend, dtype, device, views, mirror, keep_largest, head_only: as for
            :func:`~hf_binaryformer.commands.jobs.segment_file`.
        skip_existing: leave out scans whose results are whole and come from the same scan, checkpoint, settings and version.
        bids_suffix: which scans of a BIDS folder.
        progress: called as each scan goes on.
        finished: called with name and report of each scan that is done.

    Returns:
        "segmented" and "skipped" (names), "failed" (names and errors), "notes", "table" and "page" (files).

    Raises:
        ValueError, OSError: no scans, two with one name, an unusable output folder or model.
        WriteError: the results cannot be written, for example because the disk is full.
        BackendUnavailableError: the backend cannot run here.
    """
    scans, notes = find_scans(sources, output, bids_suffix=bids_suffix)
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(
            f"output '{output}' is a file, expected a folder for the results of {len(scans)} scan(s)"
        )
    pipeline = load_pipeline(model, backend=backend, dtype=dtype, device=device)
    options: dict[str, Any] = {"views": views, "mirror": mirror, "keep_largest": keep_largest, "head_only": head_only}
    settings = {
        "checkpoint_sha256": checkpoint_hash(model),
        **pipeline.settings(**options),
        "version": __version__,
    }
    output.mkdir(parents=True, exist_ok=True)
    table, page = check_outputs([(output / CSV, (".csv",)), (output / PAGE, (".html",))], [])
    if any(scan.is_bids for scan in scans):
        write_derivative(output, pipeline.label_names)
    rows = rows_in(output, settings)
    failed: list[tuple[str, str]] = []
    to_do = []
    for scan in scans:
        try:
            if not (skip_existing and is_finished(scan, settings)):
                to_do.append(scan)
        except (ValueError, OSError) as error:
            failed.append((scan.name, one_line(error)))
            rows.pop(scan.report, None)
    skipped = [scan.name for scan in scans if scan not in to_do and scan.name not in dict(failed)]
    segmented: list[str] = []
    try:
        for number, scan in enumerate(to_do):

            def tell(done: int, total: int, number: int = number) -> None:
                if progress is not None:
                    progress(number + done / total, len(to_do))

            try:
                report = segment_scan(pipeline, scan, settings, options, tell)
            except WriteError:
                raise
            except Exception as error:
                # Whatever one scan does, hours of others wait behind it.
                if os.environ.get(TRACEBACK_VARIABLE):
                    raise
                failed.append((scan.name, one_line(error)))
                rows.pop(scan.report, None)
                continue
            finally:
                tell(1, 1)
            rows[scan.report] = Row.of(scan.name, report, scan.picture)
            segmented.append(scan.name)
            write_csv(table, rows.values())
            if finished is not None:
                finished(scan.name, report)
    finally:
        # After Ctrl-C too: what is finished can be looked through.
        write_csv(table, rows.values())
        write_page(page, rows.values(), failed, f"Segmentation by {pipeline.name}")
    return {"segmented": segmented, "skipped": skipped, "failed": failed, "notes": notes, "table": table, "page": page}


def segment_scan(
    pipeline: VolumeSegmentationPipeline,
    scan: Scan,
    settings: Mapping[str, Any],
    options: Mapping[str, Any],
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Segment one scan and write its results, in which the report comes last: a scan with a report has the rest.

    Raises:
        ValueError, OSError: the scan cannot be used, or the results of another one lie in its place.
    """
    from hf_binaryformer.pipelines.overlay import label_strip
    from hf_binaryformer.pipelines.volumes import read_volume

    with unchanged(scan.source):
        source_hash = hash_of_source(scan.source)
        old = read_report(scan.report)
        if old.get("source") not in (None, str(scan.source.absolute())) and old.get("input_sha256") != source_hash:
            raise ValueError(
                f"'{scan.report}' is the report of another scan, '{old['source']}': choose another output folder, or move it"
            )
        volume = read_volume(scan.source)
    result = pipeline(volume, progress=progress, **options)
    for folder in {scan.labels.parent, scan.picture.parent}:
        folder.mkdir(parents=True, exist_ok=True)
    with all_or_nothing([scan.labels, scan.picture, scan.report]) as temporary:
        result.save(temporary[scan.labels])
        picture = label_strip(volume.array, result.labels, volume.spacing, result.label_names)
        picture.save(temporary[scan.picture], format="JPEG", quality=JPEG_QUALITY)
        report = {
            **result.report,
            "scan": scan.name,
            "source": str(scan.source.absolute()),
            "input_sha256": source_hash,
            "labels_sha256": file_hash(temporary[scan.labels]),
            "settings": dict(settings),
        }
        write_json(temporary[scan.report], report)
    return report


def is_finished(scan: Scan, settings: Mapping[str, Any]) -> bool:
    """Whether a scan has whole results of these settings.

    Raises:
        ValueError: it has, but the labels were changed since, by hand perhaps.
    """
    report = read_report(scan.report)
    if report.get("settings") != dict(settings) or not (scan.labels.is_file() and scan.picture.is_file()):
        return False
    if report.get("input_sha256") != hash_of_source(scan.source):
        return False
    if report.get("labels_sha256") == file_hash(scan.labels):
        return True
    from hf_binaryformer.pipelines.volumes import VolumeError, read_volume

    try:
        read_volume(scan.labels, labels=True)
    except VolumeError:
        return False
    raise ValueError(
        f"'{scan.labels}' was changed after it was written, and is kept: move it elsewhere to have the scan segmented again"
    )


def rows_in(output: Path, settings: Mapping[str, Any]) -> dict[Path, Row]:
    """Rows of all scans in a folder that earlier runs have finished with these settings, by report."""
    rows = {}
    for path in sorted((*output.rglob("*_labels.json"), *output.rglob("*_dseg.json"))):
        report = read_report(path)
        labels, picture = path.with_name(f"{path.stem}.nii.gz"), path.with_name(f"{path.stem}.jpg")
        if path.stem.endswith("_dseg"):
            picture = bids_picture(output, path.relative_to(output), path.stem)
        if report.get("settings") == dict(settings) and labels.is_file() and picture.is_file():
            with suppress(KeyError, TypeError, AttributeError):
                rows[path] = Row.of(str(report["scan"]), report, picture)
    return rows


def read_report(path: Path) -> dict[str, Any]:
    """A report; empty if there is none, or no whole one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def hash_of_source(source: Path) -> str:
    """SHA-256 of a file, or over the names and hashes of a folder's files."""
    if not source.is_dir():
        return file_hash(source)
    lines = [f"{path.name} {file_hash(path)}\n" for path in sorted(source.iterdir()) if path.is_file()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def checkpoint_hash(model: str) -> str:
    """SHA-256 over the names and hashes of a checkpoint's weights and settings."""
    from hf_binaryformer.modeling.pretrained import resolve_checkpoint

    folder = resolve_checkpoint(model)
    lines = [f"{p.name} {file_hash(p)}\n" for p in sorted((*folder.glob("*.json"), *folder.glob("*.safetensors")))]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_derivative(output: Path, label_names: Mapping[int, str]) -> None:
    """What a BIDS derivative has at its top: its description, unless there is one, and the table of labels."""
    description = output / "dataset_description.json"
    if not description.exists():
        with whole_file(description) as temporary:
            write_json(
                temporary,
                {
                    "Name": "hf-binaryformer segmentation",
                    "BIDSVersion": BIDS_VERSION,
                    "DatasetType": "derivative",
                    "GeneratedBy": [{"Name": "hf-binaryformer", "Version": __version__}],
                },
            )
    lines = [f"{label}\t{' '.join(name.split())}\n" for label, name in sorted(label_names.items())]
    write_text(output / "dseg.tsv", "index\tname\n" + "".join(lines))


def one_line(error: Exception) -> str:
    """What a user reads of an error; the kind of one that nobody foresaw comes first."""
    text = " ".join(str(error).split())
    foreseen = isinstance(error, ValueError | OSError | ImportError)
    if isinstance(error, MemoryError):
        return f"memory is not enough ({text or 'for this scan'})"
    return text if foreseen else f"{type(error).__name__}: {text}; alone, with {TRACEBACK_VARIABLE}=1, it says where"
