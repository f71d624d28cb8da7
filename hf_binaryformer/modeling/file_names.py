"""Names of files that stand in other files. Whoever wrote those must not decide where on this machine is read or written."""

from __future__ import annotations

import re


def stays_below(name: object) -> bool:
    r"""Whether a name leads to something below its folder on every system.

    It is no absolute path, has no drive and no part "..", and no backslash, which separates folders on Windows. Links are
    not looked at: only the owner of a folder can put them there.

    Example:
        >>> [stays_below(name) for name in ("images/a.nii.gz", "../a.nii.gz", "/etc/passwd", "..\\a", "C:a")]
        [True, False, False, False, False]
    """
    return (
        isinstance(name, str)
        and not re.match(r"$|/|[A-Za-z]:", name)
        and not re.search(r"[\\\0]", name)
        and ".." not in name.split("/")
    )
