"""Which scans a job of many has, and where the results of each one go."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import commonpath
from pathlib import Path

from hf_binaryformer.commands.pairing import SIDE_SUFFIXES, count, files_below, shown
from hf_binaryformer.pipelines.dicom import is_dicom
from hf_binaryformer.pipelines.volumes import DICOM_SUFFIXES, VOLUME_SUFFIXES

LABELS, PICTURE = "_labels.nii.gz", "_labels.jpg"
BIDS_LABELS = "_dseg.nii.gz"


@dataclass(frozen=True)
class Scan:
    """One scan and its results.

    Args:
        source: file, or folder of one DICOM series.
        name: what it is called in tables: its place below what was given, without an ending.
        labels: label volume, below the output folder.
        report: JSON, beside it.
        picture: JPEG, below the output folder.
        is_bids: the results lie as in a BIDS derivative.
    """

    source: Path
    name: str
    labels: Path
    report: Path
    picture: Path
    is_bids: bool = False


def find_scans(sources: Sequence[Path], output: Path, *, bids_suffix: str = "T1w") -> tuple[list[Scan], list[str]]:
    """The scans of files, folders and patterns, and notes on files that are no scans.

    A BIDS folder (one with ``sub-*/[ses-*/]anat``, or such a ``sub-*`` itself) gives its
    ``sub-*/[ses-*/]anat/*_T1w.nii.gz``, and results lie as in a BIDS derivative. Any other folder is searched with its
    subfolders. In each of them, every NIfTI, .mha, .mhd, .nrrd or .mgz file is a scan; if there is none, and a file has DICOM's
    mark, the folder is one DICOM series and thus one scan. Hidden files, labels that an earlier run wrote, and what lies in
    the output folder are passed over.

    Args:
        sources: files, folders, or patterns with ``*``, ``?``, ``[]`` and ``**``, which a shell may have left to us.
        output: folder of the results, which need not exist.
        bids_suffix: of the scans of a BIDS folder, T1w, T2w or FLAIR for example.

    Returns:
        Scans in the order of the sources, sorted in each of them, no file twice; and notes.

    Raises:
        FileNotFoundError: a file does not exist, or a pattern fits none.
        ValueError: a folder has no scans, two scans would have one name, or a scan lies in the output folder itself.
    """
    notes: list[str] = []
    # Source, the folder that its name counts from, and its place below that folder.
    plain: list[tuple[Path, Path, Path]] = []
    scans: list[Scan] = []
    order: list[Path] = []
    for place in (path for source in sources for path in _expanded(source)):
        if bids := bids_scans(place, bids_suffix):
            root, found = bids
            scans += [_bids_scan(path, root, output) for path in found]
        elif place.is_dir():
            found, beside = _folder_scans(place, output)
            here = place.resolve()
            plain += [
                (p, here, p.relative_to(place)) if p != place else (p, here.parent, Path(here.name)) for p in found
            ]
            notes += [f"{count(beside)} in '{place}' not segmented ({shown(beside)})"] if beside else []
        else:
            found = [place]
            plain.append((place, place.parent.resolve(), Path(place.name)))
        if not found:
            files = f"sub-*/[ses-*/]anat/*_{bids_suffix}.nii.gz, as it is a BIDS folder: is --bids-suffix right?"
            expected = files if bids else f"files that end in {', '.join(VOLUME_SUFFIXES)}, or DICOM files"
            raise ValueError(f"no scans in '{place}'; expected {expected}")
        order += found
    if plain:
        # Names are places below the folder that all have in common, so that s1/T1.nii.gz and s2/T1.nii.gz stay apart.
        root = Path(commonpath([base for _, base, _ in plain]))
        scans += [_plain_scan(path, (base / below).relative_to(root), output) for path, base, below in plain]
    by_source = {scan.source.absolute(): scan for scan in reversed(scans)}
    unique = list(dict.fromkeys(by_source[path.absolute()] for path in order))
    _check(unique, output)
    return unique, list(dict.fromkeys(notes))


def bids_scans(folder: Path, suffix: str) -> tuple[Path, list[Path]] | None:
    """Root of the BIDS folder that this is, or that this subject is of, and its scans; None for any other folder."""
    subjects = [folder] if folder.name.startswith("sub-") else sorted(folder.glob("sub-*"))
    places = [place for subject in subjects for place in (*subject.glob("anat"), *subject.glob("ses-*/anat"))]
    if not places:
        return None
    root = folder.parent if folder.name.startswith("sub-") else folder
    return root, sorted(path for place in places for path in place.glob(f"sub-*_{suffix}.nii.gz"))


def _expanded(source: Path) -> list[Path]:
    """The source itself, or the files and folders that a pattern fits."""
    if source.exists():
        return [source]
    if not glob.has_magic(str(source)):
        raise FileNotFoundError(f"'{source}' does not exist, expected files, folders or a pattern: check the name")
    found = sorted(Path(name) for name in glob.glob(str(source), recursive=True))
    if not found:
        raise FileNotFoundError(f"no file fits '{source}': check the pattern")
    return found


def _folder_scans(folder: Path, output: Path) -> tuple[list[Path], list[str]]:
    """Scans below a folder, sorted, and the names of files that may be volumes and are not read."""
    results = output.resolve()
    by_folder: dict[Path, list[Path]] = {}
    for path in sorted(files_below(folder)):
        if not path.resolve().is_relative_to(results) or folder.resolve().is_relative_to(results):
            by_folder.setdefault(path.parent, []).append(path)
    found: list[Path] = []
    beside: list[str] = []
    for place, files in sorted(by_folder.items()):
        reports = {path.name for path in files if path.name.endswith("_labels.json")}
        own = [p for p in files if p.name.endswith(LABELS) and f"{p.name.removesuffix('.nii.gz')}.json" in reports]
        beside += [path.relative_to(folder).as_posix() for path in own]
        files = [path for path in files if path not in own]
        volumes = [path for path in files if path.name.lower().endswith(VOLUME_SUFFIXES) and not path.is_dir()]
        others = [p for p in files if p not in volumes and not p.name.lower().endswith(SIDE_SUFFIXES)]
        if not volumes and any(path.suffix.lower() in DICOM_SUFFIXES or is_dicom(path) for path in others):
            found.append(place)
        else:
            found += volumes
            beside += [path.relative_to(folder).as_posix() for path in others]
    return found, beside


def _plain_scan(source: Path, place: Path, output: Path) -> Scan:
    name = _without_ending(place.as_posix())
    return Scan(source, name, output / f"{name}{LABELS}", output / f"{name}_labels.json", output / f"{name}{PICTURE}")


def _bids_scan(source: Path, root: Path, output: Path) -> Scan:
    """A BIDS derivative names a segmentation by the entities of its source."""
    place = source.relative_to(root)
    entities = place.name.rpartition("_")[0]
    folder = output / place.parent
    return Scan(
        source,
        _without_ending(place.name),
        folder / f"{entities}{BIDS_LABELS}",
        folder / f"{entities}_dseg.json",
        bids_picture(output, place, f"{entities}_dseg"),
        is_bids=True,
    )


def bids_picture(output: Path, place: Path, stem: str) -> Path:
    """Where the picture of a BIDS scan lies: in its subject's folder of figures, as other derivatives have it."""
    return output / place.parts[0] / "figures" / f"{stem}.jpg"


def _without_ending(name: str) -> str:
    endings = sorted((*VOLUME_SUFFIXES, *DICOM_SUFFIXES), key=len, reverse=True)
    return next((name[: -len(ending)] for ending in endings if name.lower().endswith(ending)), name)


def _check(scans: Sequence[Scan], output: Path) -> None:
    for here in (scan.source for scan in scans):
        if here.parent.resolve() == output.resolve() or here.resolve() == output.resolve():
            raise ValueError(
                f"'{here}' lies in the output folder '{output}', expected a folder of its own for the results: a later run "
                f"would take them for scans"
            )
    for one, other in _same_place(scans):
        raise ValueError(
            f"'{one.source}' and '{other.source}' would have the same result, '{one.labels}': give them one after the other, "
            f"with output folders of their own"
        )


def _same_place(scans: Sequence[Scan]) -> Iterator[tuple[Scan, Scan]]:
    first: dict[str, Scan] = {}
    for scan in scans:
        # Some file systems do not tell capitals apart.
        other = first.setdefault(str(scan.labels).lower(), scan)
        if other is not scan:
            yield other, scan
