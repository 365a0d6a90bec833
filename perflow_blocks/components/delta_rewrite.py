"""Exchanging the deltas in a model's weights for others: all of it, or nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from ..core.reversible import add, checksum, restore, rounding_loss, sum_of_terms, wide_type
from .delta_corrections import Corrections, Piece
from .weight_files import Digest, Weights, row_chunks, rows_of

GPU_CHUNKS = 32
"""How many chunks at a time on a GPU, where every one costs some waiting."""


class NotFiniteError(ArithmeticError):
    """Weights would not be finite."""


class HalfMergedError(RuntimeError):
    """A rewrite failed and the weights could not be put back."""


@dataclass(frozen=True)
class Term:
    """A delta, under the model's names, with its factors."""

    weights: Weights
    scale: float
    scales: tuple[tuple[str, float], ...] = ()

    def factor(self, name: str) -> float:
        """Of one weight; 0 where the delta does not hold it."""
        if name not in self.weights.shapes:
            return 0.0
        return self.scale * next((factor for pattern, factor in self.scales if fnmatchcase(name, pattern)), 1.0)


@torch.no_grad()
def rewrite(
    targets: Mapping[str, Tensor],
    before: Sequence[Term],
    after: Sequence[Term],
    corrections: Corrections,
    commit: Callable[[Corrections], None],
    digest: Digest | None = None,
) -> None:
    """Turns base plus `before` into base plus `after`, in place, and hands what rounding lost to `commit`.

    The weights are base plus the float32 sum of the terms, rounded once, whatever was merged earlier. If anything
    fails, an interrupt included, they are put back bit for bit. Besides a chunk's intermediate results only
    corrections are held.

    Args:
        targets: by name, the weights to change.
        before: what they hold; `corrections` belongs to it.
        after: what they shall hold.
        digest: takes in what is read of the last term.
        commit: called when all weights are changed; if it fails they are put back.

    Raises:
        NotFiniteError: weights would not be finite.
        HalfMergedError: the weights could not be put back; they are useless.
        ValueError: weights or deltas have changed since `before` was merged, or there is no space for corrections.
    """
    work = _Rewrite(targets, before, after, corrections, digest)
    try:
        work.run()
        commit(work.fresh)
    except BaseException as error:
        try:
            work.undo()
        except BaseException as second:
            raise HalfMergedError(str(second)) from error
        if isinstance(error, OSError):
            raise ValueError(
                f"no room for what rounding lost ({error}); set TMPDIR to a directory with free space."
            ) from error
        raise


class _Rewrite:
    """One run of `rewrite`, with what it takes to undo it."""

    def __init__(
        self,
        targets: Mapping[str, Tensor],
        before: Sequence[Term],
        after: Sequence[Term],
        corrections: Corrections,
        digest: Digest | None,
    ) -> None:
        self.targets = {name: target.detach() for name, target in targets.items()}
        self.before, self.after = before, after
        self.corrections, self.fresh, self.digest = corrections, Corrections(), digest
        self._done: list[tuple[str, Piece]] = []
        self._pending: tuple[Tensor, Tensor] | None = None

    def run(self) -> None:
        for name in self.corrections.names():
            if name not in self.targets:
                self.fresh.take(self.corrections, name)
        for name, target in self.targets.items():
            old, new = _factors(name, self.before), _factors(name, self.after)
            if old == new:
                self.fresh.take(self.corrections, name)
            else:
                for piece in self.corrections.pieces(name) or _division(target):
                    self._change(name, piece)

    def _change(self, name: str, piece: Piece) -> None:
        rows = rows_of(self.targets[name], piece.start, piece.stop)
        old, new = (_change_of(name, piece, rows, terms) for terms in (self.before, self.after))
        if self.digest is not None and self.after[-1].factor(name):
            self.digest.update(name, rows_of(self.after[-1].weights.tensor(name), piece.start, piece.stop))
        base = rows if old is None else restore(rows, old, self.corrections.loss(piece, rows))
        total = checksum(base)
        if old is not None and total != piece.checksum:
            raise ValueError(
                f"{name}, or the delta in it, has changed since the merge; undo what changed it, a fused LoRA say, or "
                "load the model again."
            )
        result = base if new is None else add(base, new)
        if new is not None:
            low, high = torch.aminmax(result)
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                raise NotFiniteError(name)
            self.fresh.add(name, piece.start, piece.stop, total, rounding_loss(base, result, new))
            done = self.fresh.pieces(name)[-1]
        else:
            done = Piece(piece.start, piece.stop, total)
        self._pending = rows, rows.clone()
        rows.copy_(result)
        self._done.append((name, done))
        self._pending = None

    def undo(self) -> None:
        """Puts the weights back; they are then what they were before `run`."""
        if self._pending is not None:
            rows, backup = self._pending
            rows.copy_(backup)
            if self._done and rows.data_ptr() == self._rows(*self._done[-1]).data_ptr():
                self._done.pop()
            self._pending = None
        while self._done:
            name, piece = self._done[-1]
            rows = self._rows(name, piece)
            old, new = (_change_of(name, piece, rows, terms) for terms in (self.before, self.after))
            base = rows if new is None else restore(rows, new, self.fresh.loss(piece, rows))
            rows.copy_(base if old is None else add(base, old))
            self._done.pop()

    def _rows(self, name: str, piece: Piece) -> Tensor:
        return rows_of(self.targets[name], piece.start, piece.stop)


def _factors(name: str, terms: Sequence[Term]) -> list[tuple[int, float]]:
    return [(id(term.weights), factor) for term in terms if (factor := term.factor(name))]


def _division(target: Tensor) -> list[Piece]:
    multiple = 1 if target.device.type == "cpu" else GPU_CHUNKS
    return [Piece(start, stop, 0) for start, stop in row_chunks(target.shape, multiple)]


def _change_of(name: str, piece: Piece, rows: Tensor, terms: Sequence[Term]) -> Tensor | None:
    """The sum that is added to some rows; None where nothing is."""
    parts = [
        (rows_of(term.weights.tensor(name), piece.start, piece.stop), factor)
        for term in terms
        if (factor := term.factor(name))
    ]
    return sum_of_terms(parts, wide_type(rows.dtype), rows.device) if parts else None
