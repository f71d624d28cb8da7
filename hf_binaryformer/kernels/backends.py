"""Which code computes Hamming attention: a registry that compiled backends add themselves to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Order of preference when nobody asks for a backend by name.
KNOWN_BACKENDS = ("triton", "metal", "cpu", "reference")


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name that this installation cannot run; says why and what would cure it."""


@dataclass(frozen=True)
class Backend:
    """One implementation of the operator.

    Args:
        name: one of ``KNOWN_BACKENDS``.
        forward: same signature and returns as :func:`hf_binaryformer.kernels.hamming.reference_forward`.
        backward: same signature and returns as :func:`hf_binaryformer.kernels.hamming.reference_backward`.
        device_types: torch device types that it serves; empty means every one.
        description: one line for ``binaryformer info``.
    """

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    device_types: tuple[str, ...]
    description: str

    def serves(self, device_type: str) -> bool:
        """Whether tensors on this device type can be handed to the backend."""
        return not self.device_types or device_type in self.device_types


_registered: dict[str, Backend] = {}
_missing = {
    name: f"not part of this release; use backend='reference' or backend=None instead of '{name}'"
    for name in KNOWN_BACKENDS
    if name != "reference"
}


def register_backend(backend: Backend) -> None:
    """Make a backend available under its name.

    Raises:
        ValueError: the name is not one of ``KNOWN_BACKENDS``.
    """
    if backend.name not in KNOWN_BACKENDS:
        raise ValueError(f"backend name is '{backend.name}', expected one of {', '.join(KNOWN_BACKENDS)}")
    _registered[backend.name] = backend
    _missing.pop(backend.name, None)


def register_missing(name: str, reason: str) -> None:
    """Record why a backend cannot run here and what would cure it; shown by ``backend_report`` and on request."""
    _missing[name] = reason


def available_backends() -> list[str]:
    """Names of the backends that can run here, the preferred ones first."""
    return [name for name in KNOWN_BACKENDS if name in _registered]


def backend_report() -> dict[str, str]:
    """For every known backend one line: what it is, or why it is missing and the cure."""
    return {
        name: f"available: {_registered[name].description}" if name in _registered else f"missing: {_missing[name]}"
        for name in KNOWN_BACKENDS
    }


def get_backend(name: str) -> Backend:
    """The backend of this name.

    Raises:
        BackendUnavailableError: it is unknown or missing.
    """
    if name in _registered:
        return _registered[name]
    reason = _missing.get(name, f"no backend has that name; known are {', '.join(KNOWN_BACKENDS)}")
    raise BackendUnavailableError(
        f"Hamming attention backend '{name}' is not available: {reason}. Available here: {', '.join(available_backends())}."
    )


def select_backend(name: str | None, device_type: str) -> Backend:
    """The backend asked for, or the preferred one for this device type when ``name`` is None.

    Raises:
        BackendUnavailableError: ``name`` is unknown, missing, or does not serve the device type.
    """
    if name is None:
        name = next(n for n in available_backends() if _registered[n].serves(device_type))
    backend = get_backend(name)
    if not backend.serves(device_type):
        raise BackendUnavailableError(
            f"backend '{name}' serves {', '.join(backend.device_types)}, the tensors are on '{device_type}': "
            f"move them, or leave backend=None to have one chosen"
        )
    return backend
