"""A small call that shows whether a strategy runs on a device, and computes attention there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from .strategy import AttentionStrategy

TOLERANCES = {torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""The largest relative error (in the Euclidean norm) of an exact kernel. Loose: this finds nonsense, not rounding."""
QUANTISED_TOLERANCE = 0.2
"""The same for one that computes with 8 or 4 bits."""


@torch.no_grad()
def probe(strategy: AttentionStrategy, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Calls the strategy on small random tensors, and compares with float32.

    Uses `dtype` and `head_dim` where the strategy takes them, else one that it does take; leaves out a call that it
    does not take at all. No global random state is read or changed.

    Raises:
        ValueError: the call fails, with the kernel's message; its result is wrong; or it writes into its inputs.
    """
    allowed = strategy.constraints
    if allowed.dtypes is not None and dtype not in allowed.dtypes:
        dtype = allowed.dtypes[0]
    if allowed.head_dims is not None and head_dim not in allowed.head_dims:
        head_dim = allowed.head_dims[0]
    queries = _sequence(strategy, 128)
    for keys in {queries, _sequence(strategy, 77)}:  # 77 is a prompt's length, and no multiple of a kernel's block
        shape = (2, queries, 3, head_dim)
        if strategy.supports(shape, (2, keys, 3, head_dim), dtype, device) is None:
            _compare(strategy, device, dtype, shape, keys)


def _sequence(strategy: AttentionStrategy, length: int) -> int:
    """A length that the strategy takes, `length` or little more."""
    multiple = strategy.constraints.key_multiple
    return -(-max(length, strategy.constraints.min_sequence) // multiple) * multiple


def _compare(
    strategy: AttentionStrategy, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int], keys: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    batch, _, heads, head_dim = shape
    shapes = (shape, (batch, keys, heads, head_dim), (batch, keys, heads, head_dim))
    try:
        inputs = [torch.randn(size, generator=generator).to(device, dtype) for size in shapes]
        given = [tensor.clone() for tensor in inputs]
        query, key, value = (tensor.float().transpose(1, 2) for tensor in inputs)
        expected = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        result = strategy(*given).float()
    except Exception as error:  # a kernel's or a driver's error may be of any kind
        raise ValueError(f"{_subject(strategy)} fails on {device}: {error}; {_REMEDY}.") from error
    if result.shape != expected.shape:
        raise ValueError(
            f"{_subject(strategy)} gives {tuple(result.shape)} for a query of {shape} on {device}; {_REMEDY}."
        )
    if not all(torch.equal(*pair) for pair in zip(inputs, given, strict=True)):
        raise ValueError(f"{_subject(strategy)} writes into its inputs, which others still need; {_REMEDY}.")
    distance = float((result - expected).norm() / expected.norm())
    limit = TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16]) if strategy.exact else QUANTISED_TOLERANCE
    if not distance <= limit:  # nan included
        raise ValueError(
            f"{_subject(strategy)} computes something else than attention on {device}: a relative error of "
            f"{distance:.2g} in {dtype} with {keys} keys, where {limit:g} is allowed; {_REMEDY}."
        )


_REMEDY = "choose another one such as 'native'"


def _subject(strategy: AttentionStrategy) -> str:
    return f"attention strategy {strategy.name!r}"
