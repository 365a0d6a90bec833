"""What turning a delta into a LoRA kept and lost, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LoraLayer:
    """One layer of the LoRA.

    Attributes:
        name: the UNet's module.
        shape: of its weight: (out, in), or (out, in, k, k).
        rank: of the factors; 0 for a layer that the delta does not change, which the LoRA leaves out.
        full_rank: the most that the shape allows, min(out, in * k * k).
        energy: share of dW's squared Frobenius norm in the singular values that were kept, in [0, 1].
        squared_norm: dW's squared Frobenius norm.
        squared_error: that of dW less the product of the factors as they are stored, so with their rounding.
        note: why the rank is not the one asked for; empty where it is.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    full_rank: int
    energy: float
    squared_norm: float
    squared_error: float
    note: str = ""

    @property
    def relative_error(self) -> float:
        """Norm of the error over norm of dW, at least 0; 0 for a layer that the delta does not change."""
        return _ratio(self.squared_error, self.squared_norm)

    @property
    def parameters(self) -> int:
        """Numbers in both factors."""
        return self.rank * (self.shape[0] + math.prod(self.shape[1:]))


@dataclass(frozen=True, kw_only=True)
class LoraReport:
    """The layers of a LoRA in the delta's order, and what stands beside it; printed as a Markdown table.

    Without arguments that of a LoRA which no delta was turned into, as of one that was trained.

    Attributes:
        layers: of the LoRA.
        residual: number of tensors kept in full.
        residual_parameters: numbers in them.
        residual_squared_norm: sum of their squares.
        delta_parameters: numbers in the whole delta.
    """

    layers: tuple[LoraLayer, ...] = ()
    residual: int = 0
    residual_parameters: int = 0
    residual_squared_norm: float = 0.0
    delta_parameters: int = 0

    @property
    def energy(self) -> float:
        """Share of the squared norm of all factorised layers that was kept, in [0, 1]."""
        total = sum(layer.squared_norm for layer in self.layers)
        return sum(layer.energy * layer.squared_norm for layer in self.layers) / total if total else 1.0

    @property
    def relative_error(self) -> float:
        """Norm of the error over that of the whole delta, the residual's part included, which has no error."""
        error = sum(layer.squared_error for layer in self.layers)
        return _ratio(error, sum(layer.squared_norm for layer in self.layers) + self.residual_squared_norm)

    @property
    def parameters(self) -> int:
        """Numbers in the LoRA, without the residual."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def adjusted(self) -> tuple[LoraLayer, ...]:
        """The layers whose rank is not the one asked for."""
        return tuple(layer for layer in self.layers if layer.note)

    def summary(self) -> str:
        """The whole in one line of text."""
        ranks = [layer.rank for layer in self.layers if layer.rank]
        span = f"rank {min(ranks)} to {max(ranks)}" if ranks else "no rank"
        return (
            f"{len(ranks)} layers, {span}, {self.parameters:,} numbers; {self.residual} tensors kept in full, "
            f"{self.residual_parameters:,} numbers; of {self.delta_parameters:,} in the delta. "
            f"Energy kept {100 * self.energy:.2f} %, relative error {self.relative_error:.4f}, "
            f"{len(self.adjusted)} layers of another rank than asked for."
        )

    def table(self, layers: Sequence[LoraLayer] | None = None) -> str:
        """The given layers, by default all, as a Markdown table, energy in per cent."""
        lines = ["| layer | shape | rank | energy kept % | relative error | note |", "|---|---|---|---|---|---|"]
        for layer in self.layers if layers is None else layers:
            shape = " x ".join(map(str, layer.shape))
            lines.append(
                f"| {layer.name} | {shape} | {layer.rank} of {layer.full_rank} | {100 * layer.energy:.2f} | "
                f"{layer.relative_error:.4f} | {layer.note} |"
            )
        return "\n".join(lines)

    def worst(self, count: int) -> tuple[LoraLayer, ...]:
        """The `count` layers that lose most of their energy, worst first."""
        return tuple(sorted(self.layers, key=lambda layer: layer.energy)[:count])

    def __str__(self) -> str:
        return f"{self.table()}\n\n{self.summary()}"


def _ratio(error: float, whole: float) -> float:
    return math.sqrt(error / whole) if whole else 0.0
