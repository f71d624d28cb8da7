"""Loads the compiled library of ``kernels/cpu`` and calls its plain C interface (``kernels/cpu/hamming.h``)."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_char_p, c_double, c_int, c_int64, c_uint64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

ABI_VERSION = 5
INSTRUCTION_SET_VARIABLE = "HF_BINARYFORMER_CPU_ISA"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Smallest work, in rows to pack and in channels to saturate, for which another thread is worth starting.
ROWS_PER_THREAD = 2048
CHANNELS_PER_THREAD = 65536


class Rows(ctypes.Structure):
    """``hf_rows``: (B, H, N, channels), strides in elements, channels adjacent in memory."""

    _fields_ = [("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("row", c_int64)]

    @classmethod
    def of(cls, t: Tensor) -> Rows:
        """The rows of a tensor whose last axis has stride 1."""
        return cls(t.data_ptr(), t.stride(0), t.stride(1), t.stride(2))


class Call(ctypes.Structure):
    """``hf_attention``."""

    _fields_ = [
        *[(n, c_int64) for n in ("batch", "heads", "queries", "keys", "head_dim", "value_dim", "planes")],
        ("threads", c_int64),
        ("type", c_int64),
        ("scale", c_double),
        *[(n, c_void_p) for n in ("query_bits", "key_bits", "query_weight", "key_weight")],
        ("value", Rows),
        ("output", Rows),
        ("logsumexp", c_void_p),
        ("grad_output", Rows),
        *[(n, c_void_p) for n in ("grad_logsumexp", "grad_query_weight", "grad_key_weight")],
        ("grad_value", Rows),
        *[(n, c_void_p) for n in ("grad_query", "grad_key")],
        ("straight_through", c_int64),
        ("seed", c_uint64),
    ]


class Balance(ctypes.Structure):
    """``hf_balance``."""

    _fields_ = [
        *[(n, c_int64) for n in ("batch", "heads", "tokens", "dim", "threads", "type", "centering", "norm")],
        ("epsilon", c_double),
        ("window", c_double),
        ("x", Rows),
        ("y", Rows),
        ("inverse_rms", c_void_p),
        ("bits", c_void_p),
        ("grad", Rows),
        ("grad_x", Rows),
    ]


class LibraryMissingError(RuntimeError):
    """The compiled library cannot run here. The message says why and how to fix it."""


class Library:
    """The loaded library.

    Args:
        path: file of the shared library.
        instruction_set: name of the one to use; empty for the best that this processor runs.

    Raises:
        LibraryMissingError: there is no library at ``path``, it is of another version, or the instruction set cannot run.
    """

    def __init__(self, path: Path, instruction_set: str = "") -> None:
        if not path.is_file():
            raise LibraryMissingError(not_built(sys.platform))
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise LibraryMissingError(f"{path.name} does not load ({error}); install again: pip install .") from error
        if self._library.hf_abi_version() != ABI_VERSION:
            raise LibraryMissingError(f"{path.name} was built from another version of the sources; run: pip install .")
        declare(self._library)
        self.instruction_sets = self._library.hf_instruction_sets().decode().split()
        self.runnable = [name for name in self.instruction_sets if self._library.hf_can_run(name.encode())]
        if self._library.hf_select(instruction_set.encode()):
            raise LibraryMissingError(
                f"{INSTRUCTION_SET_VARIABLE} is '{instruction_set}', this processor runs {', '.join(self.runnable)}; "
                f"choose one of those or leave the variable out"
            )
        self._team = torch_team()
        self._library.hf_set_team(self._team)

    @property
    def instruction_set(self) -> str:
        """Name of the instruction set in use."""
        return self._library.hf_selected().decode()

    @contextmanager
    def using(self, instruction_set: str) -> Iterator[None]:
        """Use another instruction set of ``runnable`` within this context, for the whole process."""
        before = self.instruction_set
        check(self._library.hf_select(instruction_set.encode()))
        try:
            yield
        finally:
            check(self._library.hf_select(before.encode()))

    def forward(self, call: Call) -> None:
        """Run ``hf_forward``."""
        check(self._library.hf_forward(ctypes.byref(call)))

    def backward(self, call: Call) -> None:
        """Run ``hf_backward``."""
        check(self._library.hf_backward(ctypes.byref(call)))

    def balance_forward(self, call: Balance) -> None:
        """Run ``hf_balance_forward``."""
        check(self._library.hf_balance_forward(ctypes.byref(call)))

    def balance_backward(self, call: Balance) -> None:
        """Run ``hf_balance_backward``."""
        check(self._library.hf_balance_backward(ctypes.byref(call)))

    def pack_sign_bits(self, x: Tensor) -> Tensor:
        """(..., d) float32, bfloat16 or float16 with up to three leading axes -> (..., ceil(d / 64)) int64."""
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            x = x.contiguous()
        head_dim = x.shape[-1]
        bits = x.new_empty((*x.shape[:-1], -(-head_dim // 64)), dtype=torch.int64)
        lead = 3 - (x.dim() - 1)
        outer = (c_int64 * 3)(*[1] * lead, *x.shape[:-1])
        stride = (c_int64 * 3)(*[0] * lead, *x.stride()[:-1])
        threads = min(torch.get_num_threads(), 1 + bits.numel() // ROWS_PER_THREAD)
        check(
            self._library.hf_pack_signs(x.data_ptr(), TYPES[x.dtype], outer, stride, head_dim, threads, bits.data_ptr())
        )
        return bits

    def saturate(self, x: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """(N, d) float32, bfloat16 or float16 -> tanh(beta x) and sgn(x), contiguous."""
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            x = x.contiguous()
        rows, channels = x.shape
        tanh, sign = x.new_empty(x.shape), x.new_empty(x.shape)
        threads = min(torch.get_num_threads(), 1 + x.numel() // CHANNELS_PER_THREAD)
        out = (tanh.data_ptr(), sign.data_ptr())
        check(self._library.hf_saturate(x.data_ptr(), TYPES[x.dtype], rows, x.stride(0), channels, beta, threads, *out))
        return tanh, sign


def not_built(system: str) -> str:
    """Why there is no library, and what to do, on an operating system as ``sys.platform`` names it."""
    if system == "win32":
        return (
            "it was not built, as there is none for Windows; the reference computes the same, more slowly. For the compiled "
            "one, pip install hf-binaryformer under Linux, for example in WSL"
        )
    return (
        "it was not built; with a C++ compiler (g++ or clang++) present, install from source: pip install --force-reinstall "
        "--no-deps --no-binary hf-binaryformer hf-binaryformer, or in a clone pip install ."
    )


def declare(library: ctypes.CDLL) -> None:
    """Declare the argument and return types of the library's functions."""
    library.hf_instruction_sets.restype = library.hf_selected.restype = c_char_p
    library.hf_can_run.argtypes = library.hf_select.argtypes = [c_char_p]
    library.hf_set_team.argtypes, library.hf_set_team.restype = [c_void_p], None
    library.hf_forward.argtypes = library.hf_backward.argtypes = [ctypes.POINTER(Call)]
    library.hf_balance_forward.argtypes = library.hf_balance_backward.argtypes = [ctypes.POINTER(Balance)]
    triple = ctypes.POINTER(c_int64)
    library.hf_pack_signs.argtypes = [c_void_p, c_int64, triple, triple, c_int64, c_int64, c_void_p]
    library.hf_pack_signs.restype = c_int
    library.hf_saturate.argtypes = [c_void_p, *[c_int64] * 4, c_double, c_int64, c_void_p, c_void_p]
    library.hf_saturate.restype = c_int


def check(status: int) -> None:
    """Raise for a status of the library other than 0."""
    if status == -2:
        raise MemoryError("the compiled Hamming attention found no memory for its tiles")
    if status:
        raise RuntimeError(f"the compiled Hamming attention refused the call (status {status}): please report this")


def torch_team() -> c_void_p | None:
    """Address of ``GOMP_parallel`` in the OpenMP runtime that torch itself uses; None if torch uses another runtime.

    A second team of threads would compete with torch's, whose idle threads keep spinning for a while.
    """
    for path in openmp_runtimes():
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, c_void_p)
        except (OSError, AttributeError):
            continue
    return None


def openmp_runtimes() -> Iterator[str]:
    """Files of GNU OpenMP that may be torch's: the one shipped with torch, or the only one in this process."""
    shipped = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    if shipped:
        yield from map(str, shipped)
        return
    maps = Path("/proc/self/maps")
    if maps.is_file():
        mapped = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line}
        if len(mapped) == 1:
            yield from mapped


def load() -> tuple[Library | None, str]:
    """The library, or None and the reason why it is missing."""
    try:
        instruction_set = os.environ.get(INSTRUCTION_SET_VARIABLE, "")
        return Library(Path(__file__).with_name("_cpu.so"), instruction_set), ""
    except LibraryMissingError as error:
        return None, str(error)


LIBRARY, MISSING_REASON = load()
