"""The form of all records in model_cards/evidence/reliability."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_binaryformer.kernels.processor import processor_name
from hf_binaryformer.pipelines.provenance import versions
from hf_binaryformer.pipelines.whole_files import write_text


def write_record(path: Path | None, seed: int, figures: dict[str, Any]) -> None:
    """Write figures with seed, processor and versions; None: nothing."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {**figures, "seed": seed, "processor": processor_name(), "versions": versions()}
        write_text(path, json.dumps(content, indent=1) + "\n")
