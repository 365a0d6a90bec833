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


class Scratch:
    """Memory for intermediate results that is used again: to get it anew each time costs more than the arithmetic."""

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, use: str, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous tensor of a tensor's shape and device, and of its type or another, with whatever is in it.

        It is valid until the next request for the same use.
        """
        key = use, dtype or like.dtype, like.device
        flat = self._flat.get(key)
        if flat is None or flat.numel() < like.numel():
            flat = self._flat[key] = torch.empty(like.numel(), dtype=key[1], device=like.device)
        return flat[: like.numel()].view(like.shape)


def sum_of_terms(
    terms: Sequence[tuple[Tensor, float]], weight: Tensor, scratch: Scratch | None = None, use: str = "terms"
) -> Tensor:
    """sum_i factor_i * tensor_i, in the order given, to be added to `weight`, whose shape they have; to be read only.

    `terms` holds at least one. The sum is in the `wide_type` of the weight, but for a single tensor of the weight's
    own type with the factor 1, which is its own sum.
    """
    scratch = scratch or Scratch()
    first, factor = terms[0]
    if len(terms) == 1 and factor == 1.0 and first.dtype == weight.dtype:
        return first.to(weight.device)
    wide = wide_type(weight.dtype)
    total = scratch.take(use, weight, wide)
    for number, (tensor, factor) in enumerate(terms):
        # Widened to a tensor of its own: a sum of mixed types is several times slower. Product and sum are rounded
        # one by one, since a fused multiply-add is not the same on every device.
        term = (scratch.take(f"one of the {use}", weight, wide) if number else total).copy_(tensor)
        if factor != 1.0:
            term.mul_(factor)
        if number:
            total.add_(term)
    return total


def add(weight: Tensor, change: Tensor, scratch: Scratch | None = None, out: Tensor | None = None) -> Tensor:
    """`weight + change`, summed in the wide type and rounded once to the weight's.

    It is in `out`, which may be the weight, or else the scratch's "sum", which is contiguous.
    """
    scratch = scratch or Scratch()
    result = scratch.take("sum", weight) if out is None else out
    if change.dtype == weight.dtype:
        # Torch's kernels form sums of half-precision numbers in float32 too: the same bits in one pass.
        return torch.add(weight, change, out=result)
    return result.copy_(scratch.take("wide", weight, change.dtype).copy_(weight).add_(change))


def _subtract(merged: Tensor, change: Tensor, scratch: Scratch, use: str) -> Tensor:
    result = scratch.take(use, merged)
    if change.dtype == merged.dtype:
        return torch.sub(merged, change, out=result)
    return result.copy_(scratch.take("wide", merged, change.dtype).copy_(merged).sub_(change))


def rounding_loss(weight: Tensor, merged: Tensor, change: Tensor, scratch: Scratch | None = None) -> Tensor:
    """What `merged - change` lacks of `weight`: the difference of their bit patterns, integers modulo 2^bits.

    All three have one shape; `merged` is `add(weight, change)`. The result is the scratch's "loss".
    """
    loss = bits(_subtract(merged, change, scratch or Scratch(), "loss"))
    return torch.sub(bits(weight), loss, out=loss)


def restore(merged: Tensor, change: Tensor, loss: Tensor | None, scratch: Scratch | None = None) -> Tensor:
    """The weight that `add(weight, change)` made `merged`, bit for bit, given its `rounding_loss`; None is zero.

    The result is the scratch's "base".
    """
    weight = _subtract(merged, change, scratch or Scratch(), "base")
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
    total = int(patterns[:even].view(torch.int64).sum())
    if even < patterns.numel():
        total += int(patterns[even:].sum(dtype=torch.int64))
    return total % (1 << 64)
