"""What ControlNets add to the UNet at one step: pure in its tensors, for several pictures and several batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def control_residuals(
    controlnet: Any,
    t: Tensor,
    tensors: Mapping[str, Any],
    settings: Mapping[str, Any],
    pictures: int,
    layout: Sequence[bool],
) -> dict[str, Any]:
    """The UNet's arguments from the ControlNet.

    Args:
        controlnet: a ControlNet, several as a `MultiControlNetModel`, or a ControlNet-Union.
        t: the timestep, of no dimensions.
        tensors: its arguments that have rows, also in lists and dictionaries, for the controlled batches one after the
            other.
        settings: its other arguments.
        pictures: in how many calls to do it, one for each picture; 1 for all at once.
        layout: for each of the UNet's batches whether it is controlled; the others are given zeros.
    """
    outputs = []
    for k in range(pictures):
        chosen = _every(tensors, k, pictures)
        outputs.append(controlnet(chosen.pop("sample"), t, **chosen, **settings, return_dict=False))
    down = [_spread(_interleave(parts), layout) for parts in zip(*(output[0] for output in outputs), strict=True)]
    mid = _spread(_interleave([output[1] for output in outputs]), layout)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


def _every(value: Any, first: int, step: int) -> Any:
    """Rows `first`, `first + step`, ... of each tensor, also in lists and dictionaries."""
    if isinstance(value, dict):
        return {name: _every(entry, first, step) for name, entry in value.items()}
    return value[first::step] if isinstance(value, Tensor) else [_every(entry, first, step) for entry in value]


def _interleave(parts: Sequence[Tensor]) -> Tensor:
    """The tensor whose rows `k`, `k + len(parts)`, ... are `parts[k]`."""
    return parts[0] if len(parts) == 1 else torch.stack(tuple(parts), dim=1).flatten(0, 1)


def _spread(rows: Tensor, layout: Sequence[bool]) -> Tensor:
    """`rows` of the controlled batches at their places among all batches, with zeros at the others."""
    if all(layout):
        return rows
    parts = rows.chunk(sum(layout))
    empty = torch.zeros_like(parts[0])
    chosen = iter(parts)
    return torch.cat([next(chosen) if controlled else empty for controlled in layout])
