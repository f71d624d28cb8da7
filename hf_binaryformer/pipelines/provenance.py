"""What every report says of its own making."""

from __future__ import annotations

import platform
from importlib import metadata

from hf_binaryformer import __version__

NOTICE = "Research only, not for clinical use."
LIBRARIES = ("torch", "timm", "transformers", "diffusers", "monai", "nibabel", "numpy")


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that results depend on; "missing" for one not installed."""
    found = {"hf-binaryformer": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found
