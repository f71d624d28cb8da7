"""The benchmark of balanced bits, on few tokens."""

from __future__ import annotations

import json

import pytest
import torch
import typer

import balance as balance_benchmark
import measure

TOY = {"tokens": 17, "dtypes": "float32", "blocks": 1, "rounds": 2, "threads": 1}


@pytest.fixture(autouse=True)
def one_thread_only_here(monkeypatch):
    monkeypatch.setattr(measure, "REST_SECONDS", 0.0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_way_is_measured(tmp_path, capsys):
    path = tmp_path / "out.json"
    balance_benchmark.main(path, **TOY)
    record = json.loads(path.read_text())
    settings = {(row["family"], row["pass"], row["name"]) for row in record["rows"]}
    passes = ("forward", "forward_backward")
    assert settings == {(f, p, w) for f in ("pass", "encoder") for p in passes for w in balance_benchmark.WAYS}
    assert all(row["to_without"] == 1 for row in record["rows"] if row["name"] == "without")
    assert record["errors"] and all(e["output"] <= e["tolerance"] for e in record["errors"])
    assert "of the time without" in capsys.readouterr().out and record["command"].endswith("--blocks 1 --rounds 2")


def test_nothing_is_timed_when_the_pass_is_wrong(monkeypatch):
    right = balance_benchmark.balance
    monkeypatch.setattr(balance_benchmark, "balance", lambda x, **o: (1.001 * right(x, **o)[0], right(x, **o)[1]))
    monkeypatch.setattr(balance_benchmark, "time_interleaved", None)
    with pytest.raises(typer.Exit):
        balance_benchmark.main(**TOY)
