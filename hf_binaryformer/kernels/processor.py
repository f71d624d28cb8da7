"""The name of this processor, for records of timings."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name of the processor, with family and model where the system tells them, because vendors reuse names."""
    if cpuinfo.is_file():
        first = cpuinfo.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
        if name := fields.get("model name"):
            known = [
                f"{word} {fields[key]}" for key, word in (("cpu family", "family"), ("model", "model")) if key in fields
            ]
            return f"{name} ({' '.join(known)})" if known else name
    if sys.platform == "darwin":
        words = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    return platform.processor() or platform.machine()
