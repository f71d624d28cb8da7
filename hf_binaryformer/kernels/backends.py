"""Which code computes the operators: a registry that backends add themselves to, the package's own and others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name that this installation cannot run; says why and what would cure it."""


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators.

    A function returns None for arguments that it does not compute (a type, a size, a kind of gradient): the reference
    computes those. Outputs and gradients of values lie as :func:`~hf_binaryformer.kernels.layout.token_major` lays them out,
    all others are contiguous.

    Args:
        name: what ``backend=`` asks for.
        forward: same signature and returns as :func:`hf_binaryformer.kernels.reference.reference_forward`.
        backward: same signature and returns as :func:`hf_binaryformer.kernels.reference.reference_backward`.
        pack_sign_bits: see :func:`hf_binaryformer.kernels.pack_sign_bits`; None: it has none.
        saturate_and_sign: see :func:`hf_binaryformer.kernels.saturation.saturate_and_sign`; None: it has none.
        balance: (x, centering, norm) -> (y, bits, factors), see :func:`hf_binaryformer.kernels.balance.reference_balance`.
        balance_backward: (y, grad, factors, centering, norm, window) -> gradient of x.
        device_types: torch device types that it serves; empty means every one.
        priority: of those that serve a device, the one with the highest is taken when nobody asks for another.
        description: one line for ``binaryformer info``.

    Example:
        >>> from hf_binaryformer.kernels import Backend, register_backend
        >>> from hf_binaryformer.kernels.reference import reference_backward, reference_forward
        >>> register_backend(Backend("mine", reference_forward, reference_backward, priority=-1, description="a copy"))
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor] | None]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None]
    pack_sign_bits: Callable[[Tensor], Tensor | None] | None = None
    saturate_and_sign: Callable[[Tensor, float], tuple[Tensor, Tensor] | None] | None = None
    balance: Callable[[Tensor, bool, bool], tuple[Tensor, Tensor, Tensor] | None] | None = None
    balance_backward: Callable[[Tensor, Tensor, Tensor, bool, bool, float], Tensor | None] | None = None
    device_types: tuple[str, ...] = ()
    priority: int = 0
    description: str = ""

    def serves(self, device_type: str) -> bool:
        """Whether tensors on this device type can be handed to the backend."""
        return not self.device_types or device_type in self.device_types


_registered: dict[str, Backend] = {}
_missing = {
    name: f"not part of this release; use backend='reference' or backend=None instead of '{name}'"
    for name in ("triton", "metal")
}


def register_backend(backend: Backend) -> None:
    """Make a backend available under its name; one of the same name is replaced."""
    _registered[backend.name] = backend
    _missing.pop(backend.name, None)


def register_missing(name: str, reason: str) -> None:
    """Record why a backend cannot run here and what would cure it; shown by ``backend_report`` and on request."""
    _missing[name] = reason


def available_backends() -> list[str]:
    """Names of the backends that can run here, the preferred ones first."""
    return [backend.name for backend in sorted(_registered.values(), key=lambda one: -one.priority)]


def backend_report() -> dict[str, str]:
    """For every known backend one line: what it is, or why it is missing and the cure."""
    return {name: f"missing: {reason}" for name, reason in _missing.items()} | {
        name: f"available: {_registered[name].description}" for name in available_backends()
    }


def get_backend(name: str) -> Backend:
    """The backend of this name.

    Raises:
        BackendUnavailableError: it is unknown or missing.
    """
    if name in _registered:
        return _registered[name]
    known = ", ".join([*_missing, *available_backends()])
    reason = _missing.get(name, f"no backend has that name; known are {known}")
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


def first_result(function: str, x: Tensor, *arguments: Any) -> Any:
    """What the preferred backend that has ``function`` makes of x, or None where none of them computes it.

    Args:
        function: name of one of a backend's functions that take a tensor first.
        x: the tensor whose device decides.
        arguments: the function's others.
    """
    for name in available_backends():
        backend = _registered[name]
        compute = getattr(backend, function)
        if compute and backend.serves(x.device.type) and (result := compute(x, *arguments)) is not None:
            return result
    return None
