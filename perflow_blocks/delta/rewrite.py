"""Exchanging the deltas in a model's weights for others: all of it, or nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import cycle
from threading import Lock

import torch
from torch import Tensor

from .ahead import computed_ahead
from .corrections import Corrections, Piece, encode
from .files import Digest, Weights, digest_parts, row_chunks, rows_of
from .reversible import Scratch, add, checksum, restore, rounding_loss, sum_of_terms
from .rows import all_finite, same_bits, touch, write

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
    base: Weights | None = None,
) -> None:
    """Turns base plus `before` into base plus `after`, in place, and hands what rounding lost to `commit`.

    The weights are base plus the float32 sum of the terms, rounded once, whatever was merged earlier. If anything
    fails, an interrupt included, they are put back bit for bit. Besides a chunk's intermediate results only
    corrections are held, and these not for rows that equal those of `base`, which can be read again.

    Args:
        targets: by name, the weights to change.
        before: what they hold; `corrections` belongs to it.
        after: what they shall hold.
        commit: called when all weights are changed; if it fails they are put back.
        digest: takes in what is read of the last term.
        base: the weights without any delta, as far as they can be read again; counts if `corrections` knows none.

    Raises:
        NotFiniteError: weights would not be finite.
        HalfMergedError: the weights could not be put back; they are useless.
        ValueError: weights, deltas or base have changed since `before` was merged, or there is no space for
            corrections.
    """
    work = _Rewrite(targets, before, after, corrections, digest, corrections.base or base)
    try:
        work.run()
        commit(work.fresh)
    except BaseException as error:
        try:
            work.undo()
        except BaseException as second:
            raise HalfMergedError(repr(second)) from error
        raise


@contextmanager
def _room() -> Iterator[None]:
    """For writing corrections down."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"no room for what rounding lost ({error}); set TMPDIR to a directory with free space."
        ) from error


Part = tuple[Tensor, float]


@dataclass(frozen=True)
class _Given:
    """What is known of some rows of a weight.

    Attributes:
        name, piece: which rows.
        before, after: what the terms have for them, with the factors.
        base: what they are without any delta, where that can be read again.
    """

    name: str
    piece: Piece
    before: list[Part]
    after: list[Part]
    base: Tensor | None


@dataclass(frozen=True)
class _Change:
    """What some rows of a weight become.

    Attributes:
        name, piece: which rows.
        checksum: of the rows without any delta.
        result: what they become; belongs to a scratch. None where they are that already.
        loss: what rounding lost, likewise; None where the rows are without a delta then, or can be read again.
        reread: whether they can.
        identity: what a digest of the new delta takes in.
    """

    name: str
    piece: Piece
    checksum: int
    result: Tensor | None
    loss: Tensor | None
    reread: bool
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
        base: Weights | None,
    ) -> None:
        self.targets = {name: target.detach() for name, target in targets.items()}
        self.before, self.after = before, after
        self.corrections, self.fresh, self.digest = corrections, Corrections(base), digest
        self._done: list[tuple[str, Piece]] = []
        self._pending: tuple[str, Piece, Tensor] | None = None
        self._begun: list[tuple[str, Piece]] = []  # what is changed where it is, and can be read again
        self._changing, self._undoing = Lock(), False
        self._read = _Reader()

    def run(self) -> None:
        changing = {name for name in self.targets if _factors(name, self.before) != _factors(name, self.after)}
        for name in (*self.corrections.names(), *self.targets):
            if name not in changing and not self.fresh.pieces(name):
                with _room():
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
                    yield self._given(name, piece)

    def _given(self, name: str, piece: Piece) -> _Given:
        before, after = (self._parts(name, piece, terms) for terms in (self.before, self.after))
        for tensor, _ in (*before, *after):
            touch(tensor)
        base = self._base(name, piece) if piece.reread or not before else None
        if base is not None:
            touch(base)
        return _Given(name, piece, before, after, base)

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
        reread = given.base is not None and (piece.reread or same_bits(given.base, rows))
        base = self._without_deltas(given, rows, scratch) if given.before else rows
        total = checksum(base)
        if given.before and (total != piece.checksum or not self._as_merged(given, rows, scratch)):
            raise ValueError(
                f"{name}, or the delta in it, has changed since the merge, or its base has; undo what changed it, a "
                "fused LoRA say, or load the model again."
            )
        if not after:
            return _Change(name, piece, total, base, None, False, identity)
        change = sum_of_terms(after, rows, scratch, "terms after")
        in_place = reread and not rows.is_inference()
        result = self._added(name, piece, base, change, scratch) if in_place else add(base, change, scratch)
        if not all_finite(result):
            raise NotFiniteError(name)
        loss = None if reread else rounding_loss(base, result, change, scratch)
        return _Change(name, piece, total, None if in_place else result, loss, reread, identity)

    def _added(self, name: str, piece: Piece, base: Tensor, change: Tensor, scratch: Scratch) -> Tensor:
        """Changes the rows where they are."""
        with self._changing:
            if self._undoing:
                raise InterruptedError("what is computed here is not wanted any more")
            self._begun.append((name, piece))
            return add(base, change, scratch, out=self._rows(name, piece))

    def _without_deltas(self, given: _Given, rows: Tensor, scratch: Scratch) -> Tensor:
        if given.base is not None:
            return given.base
        change = sum_of_terms(given.before, rows, scratch, "terms before")
        return restore(rows, change, self.corrections.loss(given.piece, rows), scratch)

    def _as_merged(self, given: _Given, rows: Tensor, scratch: Scratch) -> bool:
        """Whether the rows are what the deltas made them; corrections of changed ones give another checksum."""
        if given.base is None:
            return True
        change = sum_of_terms(given.before, rows, scratch, "terms before")
        return same_bits(rows, add(given.base, change, scratch))

    def _write(self, change: _Change) -> None:
        name, start, stop = change.name, change.piece.start, change.piece.stop
        if self.digest is not None and change.identity:
            self.digest.add(name, change.identity)
        done = Piece(start, stop, change.checksum, reread=change.reread)
        if change.loss is not None:
            with _room():
                done = self.fresh.add(name, start, stop, change.checksum, encode(change.loss))
        elif change.reread:
            self.fresh.note(name, done)
        if change.result is not None:
            self._pending = name, done, change.result
            write(change.result, self._rows(name, done))
            self._done.append((name, done))
            self._pending = None

    def undo(self) -> None:
        """Puts the weights back; they are then what they were before `run`."""
        with self._changing:
            self._undoing = True
        done = list(self._done)
        if self._pending is not None:
            # An interrupt came before the weights were written or after; where the two look alike, they are.
            name, piece, result = self._pending
            if (name, piece) not in done[-1:] and same_bits(self._rows(name, piece), result):
                done.append((name, piece))
        scratch, self._read = Scratch(), _Reader()  # another thread may still be at work with those before
        for name, piece in reversed(done):
            self._put_back(name, piece, self._base(name, piece) if piece.reread else None, scratch)
        for name, piece in self._begun:
            self._put_back(name, piece, self._base(name, piece), scratch)

    def _put_back(self, name: str, piece: Piece, base: Tensor | None, scratch: Scratch) -> None:
        rows = self._rows(name, piece)
        before, after = (self._parts(name, piece, terms) for terms in (self.before, self.after))
        if base is None:
            base = rows
            if after:
                change = sum_of_terms(after, rows, scratch, "terms after")
                base = restore(rows, change, self.fresh.loss(piece, rows), scratch)
        write(add(base, sum_of_terms(before, rows, scratch, "terms before"), scratch) if before else base, rows)

    def _rows(self, name: str, piece: Piece) -> Tensor:
        return rows_of(self.targets[name], piece.start, piece.stop)

    def _base(self, name: str, piece: Piece) -> Tensor | None:
        """The rows without any delta, where they can be read again, in the model's type and on its device."""
        if self.fresh.base is None or name not in self.fresh.base.shapes:
            return None
        rows, base = self._rows(name, piece), self._read(self.fresh.base, name, piece)
        part = tuple(map(slice, rows.shape))  # of a weight that a delta goes into in part
        return base[part].to(rows.device, rows.dtype)

    def _parts(self, name: str, piece: Piece, terms: Sequence[Term]) -> list[Part]:
        """What the terms have for some rows, with the factors."""
        return [(self._read(term.weights, name, piece), factor) for term in terms if (factor := term.factor(name))]


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


def _factors(name: str, terms: Sequence[Term]) -> list[tuple[int, float]]:
    return [(id(term.weights), factor) for term in terms if (factor := term.factor(name))]


def _division(target: Tensor) -> list[Piece]:
    multiple = 1 if target.device.type == "cpu" else GPU_CHUNKS
    return [Piece(start, stop, 0) for start, stop in row_chunks(target.shape, multiple)]
