"""python scripts/release/check_version.py v0.2.0

Ends with an error unless the tag, the package's version, and a heading of CHANGELOG.md agree. Needs nothing installed.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def problems(tag: str, source: str, changelog: str) -> list[str]:
    """What does not agree with the tag."""
    version = re.search(r'^__version__ = "(.*)"$', source, re.MULTILINE)
    found = []
    if not version or tag != f"v{version[1]}":
        found.append(f"the tag is {tag}, the package's version {version[1] if version else 'missing'}: make them agree")
    if not re.search(rf"^## {re.escape(tag.removeprefix('v'))}\b", changelog, re.MULTILINE):
        found.append(f"CHANGELOG.md has no heading '## {tag.removeprefix('v')}': name its unreleased part so")
    return found


def main() -> None:
    """Compare the files of this clone with the tag."""
    files = (ROOT / name for name in ("hf_binaryformer/__init__.py", "CHANGELOG.md"))
    if found := problems(sys.argv[1], *(path.read_text(encoding="utf-8") for path in files)):
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
