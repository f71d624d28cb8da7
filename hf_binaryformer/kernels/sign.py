"""1-bit attention of ordinary tensors, which handles signs, bits and weights itself."""

from __future__ import annotations

from torch import Tensor

from hf_binaryformer.kernels.bits import pack_sign_bits
from hf_binaryformer.kernels.hamming import hamming_attention


def sign_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bit_gradient: str = "ternary",
    scale: float | None = None,
    seed: int | Tensor | None = None,
    key_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``softmax(scale * sgn(query) sgn(key)^T) value``, with a gradient for all three (paper Sec. 2.1; "sign").

    The 1-bit counterpart of ``torch.nn.functional.scaled_dot_product_attention``: O(N) memory, forward and backward.

    Args:
        query: (B, H, Nq, d) real numbers; only their signs count, sgn(0) = +1.
        key: (B, H, Nk, d).
        value: (B, H, Nk, d_v), any d_v >= 1.
        bit_gradient: the gradient of query and key: "ternary" (unbiased, 1-2 bits), "ste" (paper Eq. 3), "none". The
            first two pass where abs(x) <= 1, so keep queries and keys of about that size.
        scale: factor of the scores, which are integers from -d to d; None means 1 / sqrt(d).
        seed: seed of the ternary draws; None draws one from torch's generator.
        key_mask: (B, Nk) bool, True for keys that take part, False for padding; None: all take part.
        backend: a name from :func:`available_backends`; None chooses the fastest.

    Returns:
        (B, H, Nq, d_v) in the type of ``value``.

    Raises:
        ValueError: shapes, types or options do not fit together.
        BackendUnavailableError: the requested backend cannot run here.

    Example:
        >>> query, key, value = (torch.randn(1, 6, 100, 64, requires_grad=True) for _ in range(3))
        >>> sign_attention(query, key, value).sum().backward()
        >>> query.grad.shape
        torch.Size([1, 6, 100, 64])
    """
    return hamming_attention(
        pack_sign_bits(query.detach()),
        pack_sign_bits(key.detach()),
        value.new_ones(query.shape[:3]),
        value.new_ones(key.shape[:3]),
        value,
        head_dim=query.shape[-1],
        scale=scale,
        query=query,
        key=key,
        bit_gradient=bit_gradient,
        seed=seed,
        key_mask=key_mask,
        backend=backend,
    )
