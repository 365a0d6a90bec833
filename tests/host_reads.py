"""A guard against reading the device: what would stall a GPU fails on the CPU as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class _NoReadingOperators(TorchDispatchMode):
    """Refuses what `.item()`, `bool(tensor)` and boolean indexing come down to, in libraries' code too."""

    REFUSED = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.REFUSED:
            raise AssertionError(f"{func} reads from the device")
        return func(*args, **(kwargs or {}))


class _NoReadingMethods(TorchFunctionMode):
    """Refuses the methods that copy to the host, which on CPU tensors reach no operator."""

    REFUSED = (Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.item)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.REFUSED:
            raise AssertionError(f"{func.__name__} reads from the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_reads(*, methods: bool = True) -> Iterator[None]:
    """Everything inside must leave tensors where they are; `methods=False` allows `.tolist()` of host tensors."""
    with _NoReadingOperators():
        if not methods:
            yield
            return
        with _NoReadingMethods():
            yield
