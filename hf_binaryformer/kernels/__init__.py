"""1-bit attention as an operator: bit packing, Hamming attention, and the backends that compute it.

The whole contract (schema, fake, autograd, readable reference) stands in :mod:`hf_binaryformer.kernels.hamming`; backends only
register into :mod:`hf_binaryformer.kernels.backends`. This subpackage imports torch and nothing else.
"""

from hf_binaryformer.kernels import cpu  # noqa: F401 (registers itself)
from hf_binaryformer.kernels.backends import BackendUnavailableError, available_backends, backend_report
from hf_binaryformer.kernels.bits import pack_sign_bits, unpack_sign_bits
from hf_binaryformer.kernels.hamming import hamming_attention

__all__ = [
    "BackendUnavailableError",
    "available_backends",
    "backend_report",
    "hamming_attention",
    "pack_sign_bits",
    "unpack_sign_bits",
]
