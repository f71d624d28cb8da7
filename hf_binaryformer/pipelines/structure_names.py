"""What names of structures say: which side, which group, whether they make up a brain."""

from __future__ import annotations

import re
from collections.abc import Mapping

# "left hippocampus" as this package writes it, "Left-Hippocampus" as FreeSurfer does.
SIDE = re.compile(r"(left|right)[ _-]+(?=\S)", re.IGNORECASE)
# A structure whose name has the word belongs to the group.
GROUP_OF_WORD = {"cerebell": "cerebellum", "ventricle": "ventricles"}


def side_of(name: str) -> str | None:
    """The side, "left" or "right", that a name begins with; None for a structure of the midline, or of both sides."""
    found = SIDE.match(name)
    return found.group(1).lower() if found else None


def without_side(name: str) -> str:
    """The name without its side: "left hippocampus" becomes "hippocampus"."""
    return SIDE.sub("", name, count=1) if SIDE.match(name) else name


def structure_groups(label_names: Mapping[int, str]) -> dict[str, list[int]]:
    """Labels of each group of structures, in the order of the names.

    Both sides of a structure are one group, and so are all parts of the cerebellum, and all ventricles. Background, 0, is in
    none.

    Example:
        >>> structure_groups({0: "background", 17: "left hippocampus", 47: "right cerebellum cortex", 53: "right hippocampus"})
        {'hippocampus': [17, 53], 'cerebellum': [47]}
    """
    groups: dict[str, list[int]] = {}
    for label, name in label_names.items():
        if label:
            plain = without_side(name)
            group = next((group for word, group in GROUP_OF_WORD.items() if word in plain.lower()), plain)
            groups.setdefault(group, []).append(label)
    return groups


def is_brain(label_names: Mapping[int, str]) -> bool:
    """Whether the labels make up a brain: white matter and cortex of the cerebrum are among them."""
    names = {without_side(name).lower() for name in label_names.values()}
    return {"cerebral white matter", "cerebral cortex"} <= names
