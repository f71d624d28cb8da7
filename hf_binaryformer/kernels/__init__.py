"""1-bit attention as an operator: bit packing, Hamming attention, and the backends that compute it.

:mod:`.hamming` has the formulas, schema, fake and autograd. :mod:`.checks` has what arguments must fulfil,
:mod:`.differentiation` what ``torch.func`` needs. :mod:`.reference` has the readable code that every backend is tested
against. :mod:`.backends` is the registry that backends add themselves to. This subpackage imports only torch,
and triton where it can run.
"""

from hf_binaryformer.kernels import cpu, triton  # noqa: F401 (register themselves)
from hf_binaryformer.kernels.backends import (
    Backend,
    BackendUnavailableError,
    available_backends,
    backend_report,
    register_backend,
)
from hf_binaryformer.kernels.bits import pack_sign_bits, unpack_sign_bits
from hf_binaryformer.kernels.hamming import hamming_attention
from hf_binaryformer.kernels.sign import sign_attention

__all__ = [
    "Backend",
    "BackendUnavailableError",
    "available_backends",
    "backend_report",
    "hamming_attention",
    "pack_sign_bits",
    "register_backend",
    "sign_attention",
    "unpack_sign_bits",
]
