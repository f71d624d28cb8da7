"""Finds the volumes of a folder or pattern, and which label map belongs to which image, by their names."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path

from hf_binaryformer.pipelines.volumes import VOLUME_SUFFIXES

SEPARATORS = re.compile(r"([^A-Za-z0-9]+)")
# nnU-Net's number of the channel, at the end of an image's name.
CHANNEL = re.compile(r"_(\d{4})$")
SUBJECT = re.compile(r"(?:^|[/_])sub-([A-Za-z0-9]+)")
# Names that a message lists before it says "...".
SHOWN = 5


def find_volumes(where: str) -> dict[str, Path]:
    """Volumes by name: their path below the folder that holds them all, without ending.

    Args:
        where: a folder, which is searched with its subfolders, or a pattern such as ``scans/*/t1.nii.gz``. Hidden files,
            and files that are no NIfTI, MetaImage or NRRD, are left out.

    Raises:
        ValueError: there are none, or two have one name.
    """
    folder = Path(where)
    if folder.is_dir():
        walked = [Path(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names]
    else:
        walked = [Path(name) for name in glob.glob(where, recursive=True)]
        folder = Path(os.path.commonpath([path.parent for path in walked])) if walked else folder
    found: dict[str, Path] = {}
    for path in sorted(walked):
        below = path.relative_to(folder)
        suffix = next((end for end in VOLUME_SUFFIXES if path.name.lower().endswith(end)), None)
        if suffix is None or not path.is_file() or any(part.startswith(".") for part in below.parts):
            continue
        name = below.as_posix()[: -len(suffix)]
        if name in found:
            raise ValueError(f"'{found[name]}' and '{path}' have one name, expected one file: remove one of them")
        found[name] = path
    if not found:
        raise ValueError(
            f"no volumes in '{where}'; expected a folder, or a pattern in quotes, with files that end in "
            f"{', '.join(VOLUME_SUFFIXES)}"
        )
    return found


def pair_names(images: Iterable[str], labels: Iterable[str]) -> dict[str, str]:
    """The name of the label map of each image.

    Names are equal as they are, or after nnU-Net's ``_0000`` is taken off the images, or after the words are taken off
    that all images, or all label maps, begin or end with: ``P1_t1`` and ``P1_mask`` are a pair if the others end so too.

    Raises:
        ValueError: an image has several channels, or one file has no partner.
    """
    images, labels = sorted(images), sorted(labels)
    channels = without_channel(images)
    ways = [
        ({name: name for name in images}, {name: name for name in labels}),
        (channels, {name: name for name in labels}),
        (different_parts(images, channels), different_parts(labels)),
    ]
    for ours, theirs in ways:
        if set(ours.values()) == set(theirs.values()) and len({*ours.values()}) == len(ours):
            partner = {key: name for name, key in theirs.items()}
            return {name: partner[key] for name, key in ours.items()}
    ours, theirs = max(ways, key=lambda way: len({*way[0].values()} & {*way[1].values()}))
    lonely = [name for name, key in ours.items() if key not in theirs.values()]
    alone = [name for name, key in theirs.items() if key not in ours.values()]
    raise ValueError(
        f"{len(images)} images and {len(labels)} label maps do not make pairs: {len(lonely)} images without labels "
        f"({shown(lonely)}), {len(alone)} label maps without an image ({shown(alone)}). Name the two files of a pair alike, "
        f"such as P1_t1 and P1_mask, and move files without a partner elsewhere"
    )


def without_channel(images: list[str]) -> dict[str, str]:
    """Each image's name without nnU-Net's ``_0000``; as it is if no image ends so.

    Raises:
        ValueError: an image has several channels.
    """
    if not any(name.endswith("_0000") for name in images):
        return {name: name for name in images}
    stems = {name: CHANNEL.sub("", name) for name in images}
    counts = {stem: [name for name in images if stems[name] == stem] for stem in stems.values()}
    if several := [names for names in counts.values() if len(names) > 1]:
        raise ValueError(
            f"{len(several)} images have several channels, such as {', '.join(several[0])}; expected one: move all files "
            f"but those of one channel elsewhere, or give a pattern such as 'imagesTr/*_0000.nii.gz'"
        )
    return stems


def different_parts(names: list[str], before: dict[str, str] | None = None) -> dict[str, str]:
    """Each name without the whole words that all of them begin or end with; one name alone becomes nothing."""
    words = {name: SEPARATORS.split(before[name] if before else name) for name in names}
    first, shortest = next(iter(words.values())), min(map(len, words.values()))
    if len(names) == 1:
        return {name: "" for name in names}
    start = next((n for n in range(shortest) if any(one[n] != first[n] for one in words.values())), shortest)
    end = next(
        (n for n in range(shortest - start) if any(one[-1 - n] != first[-1 - n] for one in words.values())),
        shortest - start,
    )
    return {name: "".join(one[start : len(one) - end]) for name, one in words.items()}


def people_of(names: list[str], rule: str | None) -> dict[str, str]:
    """The person of each image, so that all scans of one person come into one split.

    Args:
        names: of images.
        rule: regular expression; its first group, or else all that it matches, is the person. None: what follows ``sub-``
            (BIDS) if every name has that, or else each image is another person.

    Raises:
        ValueError: the expression is none, or a name does not match.
    """
    if rule is None:
        found = {name: SUBJECT.search(name) for name in names}
        if all(found.values()):
            return {name: f"sub-{match[1]}" for name, match in found.items() if match}
        return {name: name for name in names}
    try:
        pattern = re.compile(rule)
    except re.error as error:
        raise ValueError(
            rf"--subject '{rule}' is no regular expression ({error}); expected one such as '(P\d+)_'"
        ) from None
    matches = {name: pattern.search(name) for name in names}
    people = {name: match[min(1, pattern.groups)] for name, match in matches.items() if match}
    if other := [name for name in names if not people.get(name)]:
        raise ValueError(f"--subject '{rule}' finds no person in {len(other)} names ({shown(other)}): widen it")
    return people


def shown(names: list[str]) -> str:
    """The first names."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "") if names else "none"
