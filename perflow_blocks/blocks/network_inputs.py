"""What the networks are given at each step, made once where it can be: nothing but the samples changes in a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class NetworkInputs:
    """Joined conditions that stay from step to step, and one buffer that each step writes its samples into.

    So a step allocates nothing before the network runs, and what the network is given lies at the same addresses,
    which is what a CUDA graph needs. A value is made again once what it was made from is another tensor or was written
    to in place. Serves one run of the loop: it holds on to what it was given.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Any, Any, Any]] = {}
        self._buffer: Tensor | None = None

    def join(self, name: str, values: Sequence[Any]) -> Any:
        """Tensors one after the other along the batch; lists (one tensor per IP-Adapter) entry by entry."""
        if len(values) == 1:
            return values[0]
        return self._keep(f"{name} of {len(values)}", list(values), lambda: _concatenate(values))

    def repeat(self, name: str, value: Any, copies: int) -> Any:
        """A tensor, or each tensor of a list, `copies` times along the batch; None as it is."""
        if value is None or copies == 1:
            return value
        return self._keep(f"{name} x{copies}", value, lambda: _repeat(value, copies))

    def samples(self, latents: Tensor, copies: int, also: Tensor | None = None) -> Tensor:
        """The latents `copies` times along the batch, with the channels of `also` behind theirs.

        Args:
            latents: (batch, channels, height, width).
            copies: at least 1.
            also: (batch, further channels, height, width), for UNets made for inpainting.

        Returns:
            (copies * batch, channels + further channels, height, width): the buffer, valid until the next call; the
            latents themselves where they are all there is.
        """
        if also is None and copies == 1:
            return latents
        batch, channels, *plane = latents.shape
        shape = (copies, batch, channels + (0 if also is None else also.shape[1]), *plane)
        buffer = self._buffer
        if buffer is None or buffer.shape != shape or buffer.dtype != latents.dtype or buffer.device != latents.device:
            self._buffer = buffer = latents.new_empty(shape)
            self._kept.pop("also", None)
        if also is not None:
            self._keep("also", also, lambda: buffer[:, :, channels:].copy_(also))
        buffer[:, :, :channels].copy_(latents)
        return buffer.flatten(0, 1)

    def _keep(self, name: str, source: Any, make: Callable[[], T]) -> T:
        """What `make` made of the source the last time, if that is the same and unchanged."""
        state = _state(source)
        before = self._kept.get(name)
        if before is not None and before[0] == state:
            return before[2]
        made = make()
        if state is not None:
            self._kept[name] = (state, source, made)  # holds the source, so that its id stays its own
        return made


def _state(value: Any) -> Any:
    """Tells one tensor, or list of them, and what was written to it from another; None where that cannot be told."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else (id(value), value._version)
    states = [_state(entry) for entry in value]
    return None if None in states else states


def _concatenate(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.cat(list(values))
    return [torch.cat(parts) for parts in zip(*values, strict=True)]


def _repeat(value: Any, copies: int) -> Any:
    return torch.cat([value] * copies) if isinstance(value, Tensor) else [_repeat(entry, copies) for entry in value]
