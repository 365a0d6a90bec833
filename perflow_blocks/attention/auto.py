"""The first of several exact kernels that runs here and takes the call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .strategy import AttentionStrategy, Shape


class AutoAttention(AttentionStrategy):
    """Takes each call to the first candidate that takes it, among those that `require` found to run on its device.

    Args:
        candidates: in order of preference; all exact, and none that downloads anything.
        otherwise: what takes every call, and all of them before `require`.

    Raises:
        ValueError: a quantised candidate.
    """

    def __init__(self, candidates: Sequence[AttentionStrategy], otherwise: AttentionStrategy) -> None:
        quantised = [strategy.name for strategy in (*candidates, otherwise) if not strategy.exact]
        if quantised:
            raise ValueError(
                f"candidates={quantised} are wrong because they are not exact, and what is chosen without being asked "
                "for must not change pictures; leave them out."
            )
        self.candidates = tuple(candidates)
        self.otherwise = otherwise
        # Pairs and no dictionary, which torch.compile would have to guard entry by entry.
        self._found: tuple[tuple[torch.device, tuple[AttentionStrategy, ...]], ...] = ()
        self._take_properties()

    def require(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
        """Finds out which candidates run on this device. What does not run is left out; that is no error."""
        device = torch.empty(0, device=device).device  # "cuda" is a device with a number
        found = tuple(strategy for strategy in self.candidates if _runs(strategy, device, dtype, head_dim))
        self.otherwise.require(device, dtype, head_dim)
        self._found = (*(pair for pair in self._found if pair[0] != device), (device, found))
        self._take_properties()

    def choice(
        self,
        query_shape: Shape,
        key_shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        mask: Tensor | None = None,
    ) -> str:
        return self._chosen(query_shape, key_shape, dtype, device, mask).name

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        return self._chosen(query.shape, key.shape, query.dtype, query.device, mask)(query, key, value, mask)

    def _chosen(
        self, query_shape: Shape, key_shape: Shape, dtype: torch.dtype, device: torch.device, mask: Tensor | None
    ) -> AttentionStrategy:
        for known, strategies in self._found:
            if known == device:
                for strategy in strategies:
                    if strategy.supports(query_shape, key_shape, dtype, device, mask) is None:
                        return strategy
        return self.otherwise

    def _take_properties(self) -> None:
        used = [self.otherwise, *(strategy for _, found in self._found for strategy in found)]
        self.compilable = all(strategy.compilable for strategy in used)
        self.cuda_graphs = all(strategy.cuda_graphs for strategy in used)


def _runs(strategy: AttentionStrategy, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    try:
        strategy.require(device, dtype, head_dim)
    except (ImportError, ValueError):
        return False
    return True
