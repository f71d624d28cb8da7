"""The registry of backends, which compute the operators. The package's own backends and others add themselves to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class BackendUnavailableError(RuntimeError):
    """This installation cannot run the requested backend. The message says why and how to fix it."""


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators.

    A function returns None for arguments that it does not support (a type, a size, a kind of gradient); the reference
    computes those. Outputs and gradients of values have the memory layout of
    :func:`~hf_binaryformer.kernels.layout.token_major`. All other results are contiguous.

    Args:
        name: selects the backend as ``backend=``.
        forward: same signature and returns as :func:`hf_binaryformer.kernels.reference.reference_forward`.
        backward: same signature and returns as :func:`hf_binaryformer.kernels.reference.reference_backward`.
        pack_sign_bits: see :func:`hf_binaryformer.kernels.pack_sign_bits`; None: it has none.
        saturate_and_sign: see :func:`hf_binaryformer.kernels.saturation.saturate_and_sign`; None: it has none.
        balance: (x, centering, norm) -> (y, bits, factors), see :func:`hf_binaryformer.kernels.balance.reference_balance`.
        balance_backward: (y, grad, factors, centering, norm, window) -> gradient of x.
        takes_key_lengths: whether ``forward`` and ``backward`` take ``key_lengths=`` (B,) int64, the number of keys of each
            sample, of which only the first ones take part. Others are called once for each sample of a masked batch.
        device_types: torch device types that it serves; empty means all.
        problem: why it cannot run on the devices that are there and how to fix it, or None if it can. It is asked when the
            backend is looked at, because looking at a GPU starts its driver.
        priority: of the backends that serve a device, the one with the highest priority is used if none is requested.
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
    takes_key_lengths: bool = False
    device_types: tuple[str, ...] = ()
    problem: Callable[[], str | None] = lambda: None
    priority: int = 0
    description: str = ""

    def serves(self, device_type: str) -> bool:
        """Whether the backend accepts tensors on this device type."""
        return not self.device_types or device_type in self.device_types


_registered: dict[str, Backend] = {}
_missing = {"metal": "not part of this release; use backend='reference' or backend=None instead of 'metal'"}


def register_backend(backend: Backend) -> None:
    """Make a backend available under its name; a backend of the same name is replaced."""
    _registered[backend.name] = backend
    _missing.pop(backend.name, None)


def register_missing(name: str, reason: str) -> None:
    """Record why a backend cannot run here and how to fix it; shown by ``backend_report`` and on request."""
    _missing[name] = reason


def available_backends() -> list[str]:
    """Names of the backends that can run here, the preferred ones first."""
    return [backend.name for backend in _preferred() if backend.problem() is None]


def _preferred(device_type: str | None = None) -> Iterator[Backend]:
    """Registered backends, the preferred ones first; with a device type those that serve it and can run."""
    for backend in sorted(_registered.values(), key=lambda one: -one.priority):
        if device_type is None or (backend.serves(device_type) and backend.problem() is None):
            yield backend


def backend_report() -> dict[str, str]:
    """One line for every known backend: what it is, or why it is missing and how to fix that."""
    report = {name: f"missing: {reason}" for name, reason in _missing.items()}
    for backend in _preferred():
        problem = backend.problem()
        report[backend.name] = f"available: {backend.description}" if problem is None else f"missing: {problem}"
    return report


def get_backend(name: str) -> Backend:
    """The backend of this name.

    Raises:
        BackendUnavailableError: it is unknown or missing.
    """
    problem = _registered[name].problem() if name in _registered else None
    if name in _registered and problem is None:
        return _registered[name]
    known = ", ".join([*_missing, *_registered])
    reason = problem or _missing.get(name, f"no backend has that name; known are {known}")
    raise BackendUnavailableError(
        f"Hamming attention backend '{name}' is not available: {reason}. Available here: {', '.join(available_backends())}."
    )


def select_backend(name: str | None, device_type: str) -> Backend:
    """The requested backend, or the preferred one for this device type if ``name`` is None.

    Raises:
        BackendUnavailableError: ``name`` is unknown, missing, or does not serve the device type.
    """
    if name is None:
        return next(_preferred(device_type))
    backend = get_backend(name)
    if not backend.serves(device_type):
        raise BackendUnavailableError(
            f"backend '{name}' serves {', '.join(backend.device_types)}, the tensors are on '{device_type}': "
            f"move them, or leave backend=None to have one chosen"
        )
    return backend


def own_precision(device: torch.device) -> AbstractContextManager[None]:
    """Context without autocast, so that a backend's products are taken in the types that its formulas name."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def first_result(function: str, x: Tensor, *arguments: Any) -> Any:
    """The result of ``function`` for x, from the most preferred backend that computes it; None if none does.

    Args:
        function: name of a backend's function whose first argument is a tensor.
        x: that tensor; its device decides which backends can compute the result.
        arguments: the function's other arguments.
    """
    for backend in _preferred(x.device.type):
        compute = getattr(backend, function)
        if compute and (result := compute(x, *arguments)) is not None:
            return result
    return None
