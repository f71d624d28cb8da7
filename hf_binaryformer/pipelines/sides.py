"""Left and right of labels, told by their names."""

from __future__ import annotations

from collections.abc import Mapping

SIDES = ("left", "right")


def mirrored_labels(label_names: Mapping[int, str], *, strict: bool = True) -> dict[int, int]:
    """For every label the one that it is in a mirror: "left hippocampus" and "right hippocampus" are exchanged.

    A name without a partner, such as "left atrium" alone, is refused if ``strict``, or else stays what it is.

    Raises:
        ValueError: a name says left or right, and no other name says the other side.
    """
    by_name = {name: label for label, name in label_names.items()}
    mirrored = {}
    for label, name in label_names.items():
        side, _, rest = name.partition(" ")
        if side.lower() not in SIDES:
            mirrored[label] = label
            continue
        other = "right" if side.lower() == "left" else "left"
        partner = by_name.get(f"{other if side.islower() else other.capitalize()} {rest}")
        if partner is None and strict:
            raise ValueError(f"label {label} is '{name}' and no label is the same on the {other}: name both or neither")
        mirrored[label] = label if partner is None else partner
    return mirrored
