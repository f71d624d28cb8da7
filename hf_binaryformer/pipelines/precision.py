"""Number formats that a network can be run in."""

from __future__ import annotations

import torch

DTYPES = ("float32", "bfloat16", "float16")
AUTO = "auto"


def number_format(dtype: torch.dtype | str | None, device: torch.device | str = "cpu") -> torch.dtype:
    """The torch type for a name or type in :data:`DTYPES`; None means float32, :data:`AUTO` the device's :func:`fast_format`.

    Raises:
        ValueError: it is not one of them.
    """
    name = str(dtype or torch.float32).removeprefix("torch.")
    if name == AUTO:
        return fast_format(device)
    if name not in DTYPES:
        raise ValueError(f"dtype is {dtype}, expected one of {AUTO}, {', '.join(DTYPES)}")
    return getattr(torch, name)


def fast_format(device: torch.device | str) -> torch.dtype:
    """bfloat16 on a device that multiplies it in hardware (AVX-512-BF16; CUDA from compute capability 8.0), else float32."""
    kind = torch.device(device).type
    if kind == "cpu":
        in_hardware = torch.cpu._is_avx512_bf16_supported()
    else:
        in_hardware = kind == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if in_hardware else torch.float32


def mixed_precision(name: str, device: torch.device | str) -> str:
    """Accelerate's word for a recipe's ``mixed_precision``; :data:`AUTO` is bf16 where :func:`fast_format` says so."""
    if name != AUTO:
        return name
    return "bf16" if fast_format(device) == torch.bfloat16 else "no"
