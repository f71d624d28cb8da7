"""The same seed gives the same bytes, where that is promised (docs/reliability.md)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import determinism

RECORD = Path(__file__).parents[2] / "model_cards" / "evidence" / "reliability" / "determinism.json"
# Sums that torch splits over threads, or a library over a batch, are rounded in another order.
ROUNDED = {"2 threads", "batches of 3", "batches of 16"}


def check(name: str, figures: dict) -> None:
    for way, found in figures.items():
        if way not in ROUNDED or name == "attention":
            assert not found["differ"], (name, way, found)
        assert found["largest_difference"] < 1e-3, (name, way, found)


@pytest.mark.slow
def test_the_operator_is_the_same_in_any_number_of_threads():
    check("attention", determinism.measure("attention", ["2 threads"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in determinism.RESULTS if name != "attention"])
def test_other_results(name):
    figures = determinism.measure(name)
    assert figures.keys() == set(determinism.RESULTS[name][1])
    check(name, figures)


def test_differences_are_noticed():
    first = {"a": np.zeros((2, 4), np.float32), "b": np.arange(3)}
    second = {"a": first["a"].copy(), "b": np.arange(3)}
    assert determinism.compare(first, second)["differ"] == 0
    second["a"][1, 2] = 0.5
    found = determinism.compare(first, second)
    assert found == {"arrays": 2, "differ": 1, "largest_share": 0.125, "largest_difference": 0.5}


@pytest.mark.skipif(not RECORD.is_file(), reason="there is no record here")
def test_the_record_keeps_the_promises():
    results = json.loads(RECORD.read_text())["results"]
    assert results.keys() == determinism.RESULTS.keys()
    for name, figures in results.items():
        check(name, figures)
