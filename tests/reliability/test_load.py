"""Many volumes in one process take no more memory than a few."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import load

RECORD = Path(__file__).parents[2] / "model_cards" / "evidence" / "reliability" / "load.json"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of its process in /proc")
def test_memory_is_flat():
    found = load.segment_many(50)
    assert found["growth"] <= load.GROWTH
    assert found["rows"] == 50 and found["failed"] == ["damaged"]


@pytest.mark.skipif(not RECORD.is_file(), reason="there is no record here")
def test_the_record_has_a_hundred_volumes():
    record = json.loads(RECORD.read_text())
    assert record["volumes"] >= 100 and record["growth"] <= load.GROWTH
