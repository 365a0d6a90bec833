"""Adding a change to weights so that it can be taken back bit for bit.

Rounding the sum to the weights' type loses what subtraction cannot bring back. The lost part is the difference of two
bit patterns, zero for most weights and small for the rest; kept, it makes the way back exact.
Every step below is one correctly rounded operation, so that all devices and chunk sizes give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

REVERSIBLE_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The types of weights that changes can be added to."""


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns of a floating-point tensor as integers of its size: a view of its shape."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are formed in: float32, or wider where the weights are."""
    return torch.promote_types(dtype, torch.float32)


def sum_of_terms(terms: Sequence[tuple[Tensor, float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """sum_i factor_i * tensor_i, in the order given: a new tensor of their common shape, in `dtype` on `device`.

    `terms` holds at least one.
    """
    total: Tensor | None = None
    for tensor, factor in terms:
        # Widened to a tensor of its own: a sum of mixed types is several times slower. Product and sum are rounded
        # one by one, since a fused multiply-add is not the same on every device.
        term = tensor.to(device).to(dtype, copy=True, memory_format=torch.contiguous_format)
        if factor != 1.0:
            term.mul_(factor)
        total = term if total is None else total.add_(term)
    assert total is not None
    return total


def add(weight: Tensor, change: Tensor) -> Tensor:
    """`weight + change`, summed in `change`'s type and rounded once to the weight's: a new contiguous tensor."""
    wide = weight.to(change.dtype, copy=True, memory_format=torch.contiguous_format)
    return wide.add_(change).to(weight.dtype)


def _subtract(merged: Tensor, change: Tensor) -> Tensor:
    wide = merged.to(change.dtype, copy=True, memory_format=torch.contiguous_format)
    return wide.sub_(change).to(merged.dtype)


def rounding_loss(weight: Tensor, merged: Tensor, change: Tensor) -> Tensor:
    """What `merged - change` lacks of `weight`: the difference of their bit patterns, integers modulo 2^bits.

    All three have one shape; `merged` is `add(weight, change)`.
    """
    return bits(weight.contiguous()).sub(bits(_subtract(merged, change)))


def restore(merged: Tensor, change: Tensor, loss: Tensor | None) -> Tensor:
    """The weight that `add(weight, change)` made `merged`, bit for bit, given its `rounding_loss`; None is zero."""
    weight = _subtract(merged, change)
    if loss is not None:
        bits(weight).add_(loss)
    return weight


def checksum(tensor: Tensor) -> int:
    """The sum of the bit patterns, eight bytes at a time, modulo 2^64: whether values changed. Waits for them."""
    patterns = bits(tensor.contiguous()).view(-1)
    if patterns.data_ptr() % 8:
        patterns = patterns.clone()  # as it must not matter where in memory the values lie
    width = 8 // patterns.element_size()
    even = patterns.numel() // width * width
    total = int(patterns[:even].view(torch.int64).sum()) + int(patterns[even:].sum(dtype=torch.int64))
    return total % (1 << 64)
