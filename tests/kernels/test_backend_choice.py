"""Which backend serves which device: the registry alone, with backends that compute nothing."""

from __future__ import annotations

import pytest

from hf_binaryformer.kernels import backends
from hf_binaryformer.kernels.backends import Backend, BackendUnavailableError, register_backend, select_backend


def nothing(*arguments: object) -> None:
    return None


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_registered", {})
    register_backend(Backend("anywhere", nothing, nothing, priority=0))
    register_backend(Backend("cards", nothing, nothing, device_types=("cuda", "xpu"), priority=9))
    register_backend(Backend("processor", nothing, nothing, device_types=("cpu",), priority=5))


@pytest.mark.parametrize(
    ("device", "chosen"), [("cuda", "cards"), ("xpu", "cards"), ("cpu", "processor"), ("mps", "anywhere")]
)
def test_the_preferred_backend_that_serves_the_device_is_chosen(device: str, chosen: str) -> None:
    assert select_backend(None, device).name == chosen
    assert select_backend("anywhere", device).name == "anywhere", "no device types means all"


@pytest.mark.parametrize(("name", "device"), [("cards", "cpu"), ("processor", "cuda"), ("processor", "mps")])
def test_a_backend_is_not_given_tensors_of_another_device(name: str, device: str) -> None:
    with pytest.raises(BackendUnavailableError, match=f"backend '{name}' serves .*the tensors are on '{device}'"):
        select_backend(name, device)
