"""The backend "triton": Hamming attention on GPUs, forward and backward in O(N) memory (kernels: ``triton_kernels.py``).

With ``TRITON_INTERPRET=1`` in the environment, Triton's interpreter runs the same kernels on the CPU, slowly: for tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from hf_binaryformer.kernels import self_check
from hf_binaryformer.kernels.backends import Backend, register_backend, register_missing
from hf_binaryformer.kernels.bits import words_for
from hf_binaryformer.kernels.draws import seed_hash
from hf_binaryformer.kernels.layout import channels_adjacent, token_major
from hf_binaryformer.kernels.self_check import Kind
from hf_binaryformer.kernels.triton_tiles import BOUND_LIMITS, INTERPRETED, Sizes, on_its_device

MINIMUM_VERSION = (3, 6)
# int8 products on matrix units: NVIDIA's Ampere.
MINIMUM_CAPABILITY = (8, 0)
MAXIMUM_HEAD_DIM, MAXIMUM_VALUE_DIM = 512, 256


class Problem:
    """What forward and backward share: shapes, expanded signs, weights, and the arguments of a launch."""

    def __init__(
        self,
        query_bits: Tensor,
        key_bits: Tensor,
        query_weight: Tensor,
        key_weight: Tensor,
        value: Tensor,
        head_dim: int,
        scale: float,
        **sizes: Any,
    ) -> None:
        self.batch, self.heads, self.queries = query_bits.shape[:3]
        self.keys, self.value_dim = value.shape[2:]
        self.planes = query_bits.shape[3] if query_bits.dim() == 5 else 1
        self.scale, self.value = scale, channels_adjacent(value)
        self.sizes = Sizes(head_dim, self.value_dim, self.planes, value.dtype, **sizes, unit=unit_of(value.device))
        self.query_signs, self.key_signs = self._signs(query_bits), self._signs(key_bits)
        self.query_weight, self.key_weight = self._by_plane(query_weight), self._by_plane(key_weight)

    def _by_plane(self, weight: Tensor) -> Tensor:
        """(B, H, N) or (B, H, N, 2) to (B·H, planes, N), float32."""
        weight = weight.float() if weight.dim() == 3 else weight.float().movedim(3, 2)
        return weight.reshape(self.batch * self.heads, self.planes, -1).contiguous()

    def _signs(self, bits: Tensor) -> Tensor:
        """(B·H, planes, N, d) int8 of ±1."""
        bits, d = (bits if bits.dim() == 4 else bits.movedim(3, 2)).contiguous(), self.sizes.d
        signs = bits.new_empty((self.batch * self.heads, self.planes, bits.shape[-2], d), dtype=torch.int8)
        count, height = signs.numel() // d, max(1, 4096 // d)
        kernels.expand_signs[(-(-count // height),)](
            bits, signs, count, WORDS=bits.shape[-1], HEAD_DIM=self.sizes.head_dim, D=d, R=height
        )
        return signs

    def hashes(self, seed: Tensor) -> Tensor:
        """Hashes (B·H, Nq) int32 of the queries, from which the ternary draws are made."""
        # A seed on the GPU is read there, so that nothing waits for it and a CUDA graph draws anew when it is replayed.
        on_device = seed.device.type != "cpu"
        start = seed_hash(seed) if on_device else int(seed_hash(seed))
        found = self.value.new_empty((self.batch * self.heads, self.queries), dtype=torch.int32)
        triton_draws.hash_rows[self.grid(self.queries, 256)](
            found, start, self.queries, SEED_ON_DEVICE=on_device, R=256
        )
        return found

    def weight_like(self, weight: Tensor, found: Tensor) -> Tensor:
        """(B·H, planes, N) back to the layout of a weight."""
        found = found.view(self.batch, self.heads, self.planes, -1)
        return found.squeeze(2) if weight.dim() == 3 else found.movedim(2, 3).contiguous()

    def grid(self, tokens: int, tile: int) -> tuple[int]:
        """Programs: tiles of tokens of each head."""
        return (-(-tokens // tile) * self.batch * self.heads,)

    def numbers(self) -> tuple[int | float, ...]:
        """Arguments that all kernels begin their numbers with."""
        return self.heads, self.queries, self.keys, self.scale


def forward(
    query_bits: Tensor,
    key_bits: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value: Tensor,
    head_dim: int,
    scale: float,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """As :func:`hf_binaryformer.kernels.reference.reference_forward`; None for what :func:`served` excludes."""
    if not served(query_bits, value, head_dim) or not trusted(
        query_bits, value, head_dim, masked=key_lengths is not None
    ):
        return None
    return run_forward(query_bits, key_bits, query_weight, key_weight, value, head_dim, scale, key_lengths)


@on_its_device
def run_forward(
    query_bits: Tensor,
    key_bits: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value: Tensor,
    head_dim: int,
    scale: float,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`forward` without questions."""
    one = Problem(query_bits, key_bits, query_weight, key_weight, value, head_dim, scale)
    output = token_major(value, (*query_bits.shape[:3], one.value_dim), value.dtype)
    logsumexp = value.new_empty(query_bits.shape[:3], dtype=torch.float32)
    largest = one.key_weight.abs().sum(1).amax(1)
    tiles = one.sizes.forward_tiles()
    kernels.attend[one.grid(one.queries, tiles.M)](
        *(one.query_signs, one.key_signs, one.query_weight, one.key_weight, largest, one.value, output, logsumexp),
        key_lengths,
        *(*one.numbers(), *one.value.stride()[:3], *output.stride()[:3]),
        **one.sizes.constants(tiles, backward=False),
    )
    return output, logsumexp


def backward(
    grad_output: Tensor,
    query_bits: Tensor,
    key_bits: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    grad_logsumexp: Tensor | None,
    seed: Tensor,
    head_dim: int,
    scale: float,
    bit_gradient: str,
    weight_gradient: bool,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """As :func:`hf_binaryformer.kernels.reference.reference_backward`; None for what :func:`served` excludes."""
    kind = bit_gradient, weight_gradient, key_lengths is not None
    if not served(query_bits, value, head_dim) or not trusted(query_bits, value, head_dim, *kind):
        return None
    tensors = grad_output, query_bits, key_bits, query_weight, key_weight, value, output, logsumexp, grad_logsumexp
    return run_backward(*tensors, seed, head_dim, scale, bit_gradient, weight_gradient, key_lengths)


@on_its_device
def run_backward(
    grad_output: Tensor,
    query_bits: Tensor,
    key_bits: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    grad_logsumexp: Tensor | None,
    seed: Tensor,
    head_dim: int,
    scale: float,
    bit_gradient: str,
    weight_gradient: bool,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`backward` without questions."""
    options = {"bit_gradient": bit_gradient, "weight_gradient": weight_gradient}
    one = Problem(query_bits, key_bits, query_weight, key_weight, value, head_dim, scale, **options)
    grad_output, logsumexp = channels_adjacent(grad_output.to(value.dtype)), logsumexp.contiguous()
    delta = (grad_output.float() * output).sum(-1)
    if grad_logsumexp is not None:
        delta -= grad_logsumexp
    signs = bit_gradient != "none"
    grad_value = token_major(value, value.shape, value.dtype)
    d_query_weight, d_key_weight = (
        torch.empty_like(weight) if weight_gradient else weight.new_empty(0)
        for weight in (one.query_weight, one.key_weight)
    )
    d_query, d_key = (
        value.new_empty((*bits.shape[:3], head_dim) if signs else (0,), dtype=torch.float32)
        for bits in (query_bits, key_bits)
    )
    hashes = one.hashes(seed) if bit_gradient == "ternary" else None
    inputs = (
        *(one.query_signs, one.key_signs, one.query_weight, one.key_weight, one.value, grad_output),
        *(logsumexp, delta, key_lengths),
    )
    numbers = *one.numbers(), *one.value.stride()[:3], *grad_output.stride()[:3]
    tiles = one.sizes.key_tiles()
    kernels.backward_of_keys[one.grid(one.keys, tiles.N)](
        *(*inputs, grad_value, d_key_weight, d_key, hashes, *numbers, *grad_value.stride()[:3]),
        **one.sizes.constants(tiles, backward=True),
    )
    if weight_gradient or signs:
        tiles = one.sizes.query_tiles()
        kernels.backward_of_queries[one.grid(one.queries, tiles.M)](
            *(*inputs, d_query_weight, d_query, hashes, *numbers),
            **one.sizes.constants(tiles, backward=True),
        )
    if weight_gradient:
        d_query_weight = one.weight_like(query_weight, d_query_weight)
        d_key_weight = one.weight_like(key_weight, d_key_weight)
    return d_query_weight, d_key_weight, grad_value, d_query, d_key


@on_its_device
def pack_sign_bits(x: Tensor) -> Tensor | None:
    """As :func:`hf_binaryformer.kernels.pack_sign_bits`; None for float64 and for empty inputs."""
    if x.dtype not in BOUND_LIMITS or not x.numel():
        return None
    flat = channels_adjacent(x.reshape(-1, x.shape[-1]))
    words = words_for(x.shape[-1])
    bits = x.new_empty((*x.shape[:-1], words), dtype=torch.int64)
    count, height = flat.shape[0], 32
    kernels.pack_signs[(-(-count // height), words)](flat, bits, count, flat.stride(0), x.shape[-1], words, height)
    return bits


def served(query_bits: Tensor, value: Tensor, head_dim: int) -> bool:
    """Whether the kernels compute it: no float64, no empty tensor, d at most 512, d_v at most 256, 2^31 signs a head."""
    return (
        value.dtype in BOUND_LIMITS
        and min(query_bits.shape[:3]) > 0
        and min(value.shape) > 0
        and head_dim <= MAXIMUM_HEAD_DIM
        and value.shape[3] <= MAXIMUM_VALUE_DIM
        and 2 * max(query_bits.shape[2], value.shape[2]) * MAXIMUM_HEAD_DIM < 2**31
    )


def trusted(
    query_bits: Tensor,
    value: Tensor,
    head_dim: int,
    bit_gradient: str = "none",
    weight_gradient: bool = True,
    masked: bool = False,
) -> bool:
    """Whether this kind of problem may run on this device."""
    planes = query_bits.shape[3] if query_bits.dim() == 5 else 1
    kind = Kind(value.device, head_dim, value.shape[3], planes, value.dtype, bit_gradient, weight_gradient, masked)
    return self_check.trusted(kind, lambda: self_check.difference(run_forward, run_backward, kind))


def unit_of(device: torch.device) -> str:
    """What multiplies on a device: the field ``unit`` of :class:`~hf_binaryformer.kernels.triton_tiles.Sizes`."""
    if device.type == "cpu" or torch.version.hip is not None:
        return "mfma"
    return {9: "wgmma", 10: "tcgen05"}.get(torch.cuda.get_device_capability(device)[0], "mma")


def missing_reason() -> str | None:
    """Why the backend cannot be loaded here and how to cure it; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'triton>=3.6' (Linux, NVIDIA or AMD GPU)"
    if not INTERPRETED and not torch.cuda.is_available():
        return "no GPU that torch can use: a CUDA or ROCm build of torch and its driver are needed"
    # Not the version of the package: it has another name in ROCm builds.
    found = importlib.import_module("triton").__version__
    if tuple(int(part) for part in found.split(".")[:2]) < MINIMUM_VERSION:
        return f"triton {found} is too old: pip install 'triton>={'.'.join(map(str, MINIMUM_VERSION))}'"
    return None


@functools.cache
def problem() -> str | None:
    """Why the GPU cannot run it; None if it can."""
    if INTERPRETED or torch.version.hip is not None or torch.cuda.get_device_capability() >= MINIMUM_CAPABILITY:
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, at least 8.0 (Ampere) is needed"


if (REASON := missing_reason()) is not None:
    register_missing("triton", REASON)
else:
    import triton

    from hf_binaryformer.kernels import triton_balance, triton_draws
    from hf_binaryformer.kernels import triton_kernels as kernels

    register_backend(
        Backend(
            "triton",
            forward,
            backward,
            pack_sign_bits,
            balance=triton_balance.balance,
            balance_backward=triton_balance.balance_backward,
            takes_key_lengths=True,
            device_types=("cuda", "cpu") if INTERPRETED else ("cuda",),
            problem=problem,
            priority=-1 if INTERPRETED else 20,
            description=f"Triton {triton.__version__}" + (", interpreted: for tests" if INTERPRETED else ""),
        )
    )
