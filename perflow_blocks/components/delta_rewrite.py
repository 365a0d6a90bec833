"""Exchanging the deltas in a model's weights for others: all of it, or nothing of it."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import cycle

import numpy as np
import torch
from torch import Tensor

from ..core.reversible import Scratch, add, bits, checksum, restore, rounding_loss, sum_of_terms
from .ahead import computed_ahead
from .delta_corrections import Corrections, Piece, encode
from .delta_fit import BaseDiffersError
from .weight_files import Digest, Weights, digest_parts, row_chunks, rows_of

GPU_CHUNKS = 8
"""How many chunks at a time on a GPU, where every one costs some waiting."""

READ_AHEAD = 8
"""How many chunks are read from files before they are wanted."""


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
    corrections are held, and not even these where `corrections` knows where to read the base again.

    Args:
        targets: by name, the weights to change.
        before: what they hold; `corrections` belongs to it.
        after: what they shall hold.
        digest: takes in what is read of the last term.
        commit: called when all weights are changed; if it fails they are put back.

    Raises:
        NotFiniteError: weights would not be finite.
        HalfMergedError: the weights could not be put back; they are useless.
        BaseDiffersError: the base that can be read again is not what the weights are.
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


Part = tuple[Tensor, float]


@dataclass(frozen=True)
class _Given:
    """What is known of some rows of a weight.

    Attributes:
        name, piece: which rows.
        holding: whether a delta is in them.
        before, after: what the terms have for them, with the factors; `before` is left empty where `base` is there.
        base: what they are without any delta, where that can be read again.
        checksum: of that; without it None.
    """

    name: str
    piece: Piece
    holding: bool
    before: list[Part]
    after: list[Part]
    base: Tensor | None
    checksum: int | None


@dataclass(frozen=True)
class _Change:
    """What some rows of a weight become.

    Attributes:
        name, piece: which rows.
        checksum: of the rows without any delta.
        result: what they become; belongs to a scratch.
        merged: checksum of the result, where the base can be read again and a delta is in it.
        loss: what rounding lost, in a scratch, where the base cannot; None where the rows are without a delta then.
        identity: what a digest of the new delta takes in.
    """

    name: str
    piece: Piece
    checksum: int
    result: Tensor
    merged: int | None
    loss: Tensor | None
    identity: Sequence[str]


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
        self.corrections, self.fresh, self.digest = corrections, Corrections(corrections.base), digest
        self._done: list[tuple[str, Piece]] = []
        self._pending: tuple[str, Piece, Tensor] | None = None
        self._read = _Reader()

    def run(self) -> None:
        changing = {name for name in self.targets if _factors(name, self.before) != _factors(name, self.after)}
        for name in (*self.corrections.names(), *self.targets):
            if name not in changing and not self.fresh.pieces(name):
                self.fresh.take(self.corrections, name)
        on_cpu = all(target.device.type == "cpu" for target in self.targets.values())
        given = self._given_of(changing)
        changes = self._changes(computed_ahead(given, READ_AHEAD) if on_cpu else given)
        with closing(computed_ahead(changes) if on_cpu else changes) as changes:
            for change in changes:
                self._write(change)

    def _given_of(self, names: Collection[str]) -> Generator[_Given, None, None]:
        """What is known of the weights, in their order, read from where it is."""
        for name, target in self.targets.items():
            if name in names:
                for piece in self.corrections.pieces(name) or _division(target):
                    given = self._given(name, piece)
                    for tensor, _ in (*given.before, *given.after):
                        _touch(tensor)
                    yield given

    def _given(self, name: str, piece: Piece) -> _Given:
        base, after = self._base(name, piece), self._parts(name, piece, self.after)
        before = [] if base is not None else self._parts(name, piece, self.before)
        total = None if base is None else checksum(base)
        return _Given(name, piece, bool(_factors(name, self.before)), before, after, base, total)

    def _changes(self, everything: Generator[_Given, None, None]) -> Generator[_Change, None, None]:
        """What becomes of the weights, in their order; each is valid until the next but one is asked for."""
        scratches = cycle((Scratch(), Scratch()))
        with closing(everything):
            for given in everything:
                yield self._changed(given, next(scratches))

    @torch.no_grad()
    def _changed(self, given: _Given, scratch: Scratch) -> _Change:
        """What some rows become, and what it takes to go back."""
        name, piece, after = given.name, given.piece, given.after
        rows = self._rows(name, piece)
        taken_in = self.digest is not None and self.after[-1].factor(name)
        identity = digest_parts(after[-1][0]) if taken_in else ()
        if given.holding:
            base, total = self._without_deltas(given, rows, scratch)
        else:
            base, total = rows, checksum(rows)
            if given.checksum not in (None, total):
                raise BaseDiffersError(name)
        if not after:
            return _Change(name, piece, total, base, None, None, identity)
        change = sum_of_terms(after, rows, scratch, "terms after")
        result = add(base, change, scratch)
        if not _is_finite(result):
            raise NotFiniteError(name)
        if given.base is not None:
            return _Change(name, piece, total, result, checksum(result), None, identity)
        return _Change(name, piece, total, result, None, rounding_loss(base, result, change, scratch), identity)

    def _without_deltas(self, given: _Given, rows: Tensor, scratch: Scratch) -> tuple[Tensor, int]:
        """What the rows are without the deltas that are in them, and its checksum, once neither was changed."""
        name, piece = given.name, given.piece
        if given.base is None or given.checksum is None:
            base = _restored(self.corrections, piece, given.before, rows, scratch)
            total = checksum(base)
            unchanged = total == piece.checksum
        else:
            base, total = given.base, given.checksum
            if total != piece.checksum:
                raise ValueError(f"{name} of the base has changed since the merge; load the model again.")
            unchanged = checksum(rows) == piece.merged
        if not unchanged:
            raise ValueError(
                f"{name}, or the delta in it, has changed since the merge; undo what changed it, a fused LoRA say, or "
                "load the model again."
            )
        return base, total

    def _write(self, change: _Change) -> None:
        name, start, stop = change.name, change.piece.start, change.piece.stop
        if self.digest is not None and change.identity:
            self.digest.add(name, change.identity)
        done = Piece(start, stop, change.checksum, merged=change.merged)
        if change.loss is not None:
            done = self.fresh.add(name, start, stop, change.checksum, encode(change.loss))
        elif change.merged is not None:
            self.fresh.note(name, done)
        self._pending = name, done, change.result
        _write(change.result, self._rows(name, done))
        self._done.append((name, done))
        self._pending = None

    def undo(self) -> None:
        """Puts the weights back; they are then what they were before `run`."""
        done = list(self._done)
        if self._pending is not None:
            # An interrupt came before the weights were written or after; where the two look alike, they are.
            name, piece, result = self._pending
            if (name, piece) not in done[-1:] and torch.equal(bits(self._rows(name, piece)), bits(result)):
                done.append((name, piece))
        scratch = Scratch()
        for name, piece in reversed(done):
            rows, base = self._rows(name, piece), self._base(name, piece)
            before, after = (self._parts(name, piece, terms) for terms in (self.before, self.after))
            if base is None:
                base = _restored(self.fresh, piece, after, rows, scratch) if after else rows
            rows.copy_(add(base, sum_of_terms(before, rows, scratch, "terms before"), scratch) if before else base)

    def _rows(self, name: str, piece: Piece) -> Tensor:
        return rows_of(self.targets[name], piece.start, piece.stop)

    def _base(self, name: str, piece: Piece) -> Tensor | None:
        """The rows without any delta, where they can be read again, in the model's type and on its device."""
        if self.corrections.base is None:
            return None
        rows, base = self._rows(name, piece), self._read(self.corrections.base, name, piece)
        part = tuple(map(slice, rows.shape))  # of a weight that a delta goes into in part
        return base[part].to(rows.device, rows.dtype)

    def _parts(self, name: str, piece: Piece, terms: Sequence[Term]) -> list[Part]:
        """What the terms have for some rows, with the factors."""
        return [(self._read(term.weights, name, piece), factor) for term in terms if (factor := term.factor(name))]


def _restored(corrections: Corrections, piece: Piece, terms: Sequence[Part], rows: Tensor, scratch: Scratch) -> Tensor:
    """The rows without the terms that are in them, by what rounding lost."""
    change = sum_of_terms(terms, rows, scratch, "terms before")
    return restore(rows, change, corrections.loss(piece, rows), scratch)


class _Reader:
    """Rows of deltas and of the base; a delta that is computed when it is read is so once per tensor."""

    def __init__(self) -> None:
        self._name, self._tensors = "", dict[int, Tensor]()

    def __call__(self, weights: Weights, name: str, piece: Piece) -> Tensor:
        if name != self._name:
            self._name, self._tensors = name, {}
        key = id(weights)
        if key not in self._tensors:
            self._tensors[key] = weights.tensor(name)
        return rows_of(self._tensors[key], piece.start, piece.stop)


def _touch(values: Tensor) -> None:
    """Has the pages of a mapped file read; nothing is copied."""
    if values.device.type == "cpu" and values.is_contiguous():
        values.view(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()


def _factors(name: str, terms: Sequence[Term]) -> list[tuple[int, float]]:
    return [(id(term.weights), factor) for term in terms if (factor := term.factor(name))]


def _is_finite(values: Tensor) -> bool:
    """Whether no value is infinite or NaN; waits for the device."""
    if values.device.type != "cpu":
        return all(math.isfinite(extreme.item()) for extreme in torch.aminmax(values))
    # The patterns of infinities and NaN are the highest of either sign; integers are compared in half the time.
    patterns = bits(values).numpy()
    infinity = int(bits(torch.tensor(math.inf, dtype=values.dtype)))
    sign = 1 << (8 * patterns.itemsize - 1)
    unsigned = patterns.view(f"u{patterns.itemsize}")
    return not patterns.size or bool(patterns.max() < infinity and unsigned.max() < sign + infinity)


def _write(source: Tensor, target: Tensor) -> None:
    if target.device.type == "cpu":
        # Torch's threads wait awake for work after every operation of theirs, and here comes none for a while.
        np.copyto(bits(target).numpy(), bits(source).numpy())
    else:
        target.copy_(source)


def _division(target: Tensor) -> list[Piece]:
    multiple = 1 if target.device.type == "cpu" else GPU_CHUNKS
    return [Piece(start, stop, 0) for start, stop in row_chunks(target.shape, multiple)]
