"""What wrong input and missing backends get: what was expected, what came, and the cure."""

import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hamming_cases import make_case, on_every_target

from hf_binaryformer.kernels import BackendUnavailableError, available_backends, backend_report, hamming_attention
from hf_binaryformer.kernels import triton as triton_backend

NAMES = ["reference", "cpu", "triton", "metal"]


def call(**changes: Any) -> torch.Tensor:
    case = make_case(9, 16, 64, 4, dtype=torch.float32)
    arguments = {
        "query_bits": case.query_bits, "key_bits": case.key_bits, "query_weight": case.query_weight,
        "key_weight": case.key_weight, "value": case.value, "head_dim": 64,
    }  # fmt: skip
    return hamming_attention(**(arguments | changes))


def test_unchanged_arguments_are_fine() -> None:
    assert call().shape == (2, 3, 9, 4)


def words(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def reals(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("changes", "expected_words"),
    [
        ({"value": reals(2, 3, 15, 4)}, ["value", "15", "key_bits", "16"]),
        ({"key_weight": reals(2, 3, 15)}, ["key_weight", "15", "16"]),
        ({"query_weight": reals(2, 3, 8)}, ["query_weight", "8", "9"]),
        ({"query_weight": reals(2, 4, 9)}, ["query_weight", "4", "3"]),
        ({"key_bits": words(2, 4, 16, 1)}, ["key_bits", "4", "3"]),
        ({"key_bits": words(1, 3, 16, 1)}, ["key_bits", "1", "2"]),
        ({"value": reals(2, 4, 16, 4)}, ["value", "4", "3"]),
        ({"value": reals(2, 3, 16)}, ["value"]),
        ({"query_bits": words(2, 3, 9)}, ["query_bits"]),
        ({"head_dim": 65}, ["head_dim", "65", "2", "1"]),
        ({"query_bits": words(2, 3, 9, 2)}, ["query_bits", "2", "1"]),
        ({"key_bits": words(2, 3, 16, 2, 1)}, ["key_bits"]),
        ({"query_bits": words(2, 3, 9, 2, 1), "key_bits": words(2, 3, 16, 2, 1)}, ["query_weight"]),
        ({"head_dim": 0}, ["head_dim", "0"]),
        ({"bit_gradient": "straight"}, ["bit_gradient", "straight", "none", "ste", "ternary"]),
        ({"bit_gradient": "ste"}, ["bit_gradient", "ste", "query"]),
        ({"bit_gradient": "ternary", "query": reals(2, 3, 9, 64)}, ["ternary", "key"]),
        ({"bit_gradient": "ste", "query": reals(2, 3, 8, 64), "key": reals(2, 3, 16, 64)}, ["query", "8", "9"]),
        ({"bit_gradient": "ste", "query": reals(2, 3, 9, 64), "key": reals(2, 3, 16, 63)}, ["key", "63", "64"]),
    ],
)  # fmt: skip
def test_mismatch_names_what_was_expected_and_what_came(changes: dict[str, Any], expected_words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        call(**changes)
    missing = [word for word in expected_words if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"


@pytest.mark.parametrize("bit_gradient", ["ste", "ternary"])
def test_two_planes_have_no_bit_gradient(bit_gradient: str) -> None:
    case = make_case(5, 7, planes=2, dtype=torch.float32)
    with pytest.raises(ValueError, match="bit_gradient") as error:
        hamming_attention(
            *case.inputs(), head_dim=64, bit_gradient=bit_gradient,
            query=reals(2, 3, 5, 64), key=reals(2, 3, 7, 64),
        )  # fmt: skip
    assert "plane" in str(error.value)


@pytest.mark.parametrize(
    "changes", [{"query_bits": words(2, 3, 9, 1).int()}, {"key_bits": reals(2, 3, 16, 1)},
                {"value": torch.zeros(2, 3, 16, 4, dtype=torch.int64)}],
)  # fmt: skip
def test_wrong_dtype(changes: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        call(**changes)
    assert next(iter(changes)) in str(error.value)
    assert str(next(iter(changes.values())).dtype).removeprefix("torch.") in str(error.value)


def test_reference_is_always_available() -> None:
    assert "reference" in available_backends()
    assert set(available_backends()) <= set(NAMES)


def test_report_covers_every_backend() -> None:
    report = backend_report()
    assert set(NAMES) <= set(report)
    for name in NAMES:
        assert str(report[name]).strip(), name


@pytest.mark.parametrize("backend", [name for name in NAMES if name not in available_backends()])
def test_missing_backend_says_why_and_what_helps(backend: str) -> None:
    with pytest.raises(BackendUnavailableError) as error:
        call(backend=backend)
    assert backend in str(error.value)
    assert "reference" in str(error.value), "the cure names what does work"
    assert len(str(error.value)) > len(backend) + 40, "a reason, not only a name"


def test_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(BackendUnavailableError) as error:
        call(backend="abacus")
    for name in ("abacus", *NAMES):
        assert name in str(error.value)


@on_every_target
def test_named_backend_gives_what_the_default_gives(backend, device) -> None:
    case = make_case(dtype=torch.float32, device=device)
    torch.testing.assert_close(case.run(backend=backend)["output"], case.run()["output"])


@pytest.mark.parametrize(
    ("installed", "version", "gpu", "words"),
    [
        (False, "", True, ["not installed", "pip install 'triton>=3.6'"]),
        (True, "3.7.0", False, ["no GPU that torch can use", "driver"]),
        (True, "3.5.1", True, ["triton 3.5.1 is too old", "triton>=3.6"]),
        (True, "3.10.0+rocm", True, []),
    ],
)
def test_why_triton_is_missing(installed, version, gpu, words, monkeypatch) -> None:
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(__version__=version))
    reason = triton_backend.missing_reason()
    assert (reason is None) == (not words)
    assert all(word in (reason or "") for word in words), reason


def test_an_old_gpu_is_named(monkeypatch) -> None:
    monkeypatch.setattr(triton_backend, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Quadro RTX 5000")
    for capability, word in (((7, 5), "Quadro RTX 5000 has compute capability 7.5, at least 8.0"), ((8, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        triton_backend.problem.cache_clear()
        assert word is None or word in triton_backend.problem()
        assert (triton_backend.problem() is None) == (word is None)
    triton_backend.problem.cache_clear()
