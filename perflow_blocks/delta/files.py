"""Weights by name that are read one at a time: memory-mapped files, mappings, and what is derived from these."""

from __future__ import annotations

import hashlib
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .reversible import checksum
from .tensors import describe_mismatch, floating_entries, listed, subtract

CHUNK = 1 << 20
"""Values that are changed at a time: few enough for a processor's cache, enough to keep its cores busy."""

_FLOATS = {"F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64"}


class Weights(ABC):
    """Floating-point tensors by name, of which one at a time is in memory.

    Attributes:
        label: what messages call them: a path, say.
        shapes: of the tensors, by name.
        metadata: text by key, as in a safetensors header.
    """

    label: str
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """One tensor, not to be written to."""

    @abstractmethod
    def require_unchanged(self) -> None:
        """Raises the ValueError for files that were written to since they were opened."""

    @abstractmethod
    def stamp(self) -> tuple[Any, ...] | None:
        """What spares reading again as long as it stays equal; None where nothing does."""


class Digest:
    """Identifies tensors by names, types and values, whatever they are stored in: a SHA-256 of 64-bit sums.

    A delta is known again by it at the speed of memory, where a SHA-256 of gigabytes would take longer than merging.
    It tells deltas apart; it is no protection from forgery.
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[str]] = {}

    def update(self, name: str, rows: Tensor) -> None:
        """Takes in a tensor, or its next rows, as many as one or more of its `row_chunks` have."""
        self.add(name, digest_parts(rows))

    def add(self, name: str, parts: Sequence[str]) -> None:
        """Takes in what `digest_parts` says of a tensor's next rows."""
        self._parts.setdefault(name, []).extend(parts)

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def hexdigest(self) -> str:
        """64 hexadecimal digits."""
        lines = [f"{name}: {'; '.join(parts)}" for name, parts in sorted(self._parts.items())]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def digest_parts(rows: Tensor) -> list[str]:
    """What a `Digest` takes in of a tensor, or of as many of its rows as one or more of its `row_chunks` have."""
    parts = []
    for start, stop in row_chunks(rows.shape):
        part = rows_of(rows, start, stop)
        # What 8-bit floats, which only files hold, are as half-precision numbers says the same.
        total = checksum(part if part.element_size() > 1 else part.half())
        parts.append(f"{str(part.dtype).removeprefix('torch.')} {list(part.shape)} {total:016x}")
    return parts


def digest_of(weights: Weights, names: Iterable[str]) -> str:
    """The identity of some of the weights; reads them once."""
    digest = Digest()
    for name in names:
        digest.update(name, weights.tensor(name))
    return digest.hexdigest()


def row_chunks(shape: Sequence[int], multiple: int = 1) -> list[tuple[int, int]]:
    """Ranges of rows, the first dimension, of about `multiple * CHUNK` values; without dimensions there is one row."""
    if 0 in shape:
        return []
    if not shape:
        return [(0, 1)]
    step = multiple * max(1, CHUNK // torch.Size(shape[1:]).numel())
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def rows_of(tensor: Tensor, start: int, stop: int) -> Tensor:
    """A view of some rows; a tensor without dimensions is one row."""
    return tensor[start:stop] if tensor.dim() else tensor.view(1)


class MappingWeights(Weights):
    """A model's or a mapping's own tensors, which are not copied."""

    def __init__(self, weights: nn.Module | Mapping[str, Tensor], label: str = "the mapping") -> None:
        entries = floating_entries(weights)
        if not entries:
            raise ValueError(f"{label} holds no floating-point tensors; pass what extract_delta returned.")
        self.label = label
        self.metadata: dict[str, str] = {}
        self._tensors = {name: tensor.detach() for name, tensor in entries.items()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in entries.items()}

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def require_unchanged(self) -> None:
        pass  # changes of values are noticed when a delta is taken out

    def stamp(self) -> None:
        return None


class FileWeights(Weights):
    """One safetensors file or the shards of one checkpoint, memory-mapped as long as this object lives.

    Raises:
        ValueError: a file that is missing, truncated or no safetensors file, tensors that are no floats, or a name in
            two shards.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]], label: str | os.PathLike[str] | None = None) -> None:
        self.label = str(label or paths[0])
        self._paths = [str(path) for path in paths]
        self._open()
        self._paths = [str(Path(path).resolve()) for path in paths]  # for a copy, wherever it is made

    def _open(self) -> None:
        self._descriptors: list[int] = []
        self._files: dict[str, Any] = {}
        self.shapes, self.metadata = {}, {}
        for path in self._paths:
            descriptor = _descriptor(path)
            weakref.finalize(self, os.close, descriptor)
            self._descriptors.append(descriptor)
            file, shapes, metadata = _map(path)
            twice = [name for name in shapes if name in self.shapes]
            if twice:
                raise ValueError(f"{self.label} holds {listed(twice)} in two shards; download it again.")
            self.shapes |= shapes
            self.metadata |= metadata
            self._files |= dict.fromkeys(shapes, file)
        self._opened_at = self._state()

    def tensor(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def stamp(self) -> tuple[Any, ...]:
        return (*self._paths, *self._opened_at)

    def require_unchanged(self) -> None:
        if self._state() != self._opened_at:
            raise ValueError(f"{self.label} was written to since it was opened; load the model again.")

    def _state(self) -> tuple[int, ...]:
        # Of the open file itself: it may have been renamed, replaced or deleted, and its contents are still there.
        states = [os.fstat(descriptor) for descriptor in self._descriptors]
        return tuple(value for state in states for value in (state.st_size, state.st_mtime_ns))

    def __deepcopy__(self, memo: dict[int, Any]) -> FileWeights:
        return self  # nothing in it changes, and its file may have been deleted

    def __getstate__(self) -> dict[str, Any]:
        return {"label": self.label, "paths": self._paths, "opened_at": self._opened_at}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.label, self._paths = state["label"], state["paths"]
        self._open()
        self._opened_at = state["opened_at"]


class RenamedWeights(Weights):
    """Some of the weights under other names, {new: old}."""

    def __init__(self, weights: Weights, names: Mapping[str, str]) -> None:
        self._weights, self._names = weights, dict(names)
        self.label, self.metadata = weights.label, weights.metadata
        self.shapes = {new: weights.shapes[old] for new, old in names.items()}

    def tensor(self, name: str) -> Tensor:
        return self._weights.tensor(self._names[name])

    def require_unchanged(self) -> None:
        self._weights.require_unchanged()

    def stamp(self) -> tuple[Any, ...] | None:
        return self._weights.stamp()


class DifferenceWeights(Weights):
    """`student - base` in float32, formed when it is read: a delta from two checkpoints, without a file of its own.

    Raises:
        ValueError: the two differ in names or shapes.
    """

    def __init__(self, student: Weights, base: Weights) -> None:
        mismatch = describe_mismatch(student.shapes, base.shapes, given="the student", expected="the base")
        if mismatch:
            raise ValueError(
                f"{student.label} and {base.label} are no pair: {mismatch}. Pass two models of the same architecture."
            )
        self._student, self._base = student, base
        self.label = f"{student.label} minus {base.label}"
        self.shapes, self.metadata = student.shapes, student.metadata

    def tensor(self, name: str) -> Tensor:
        return subtract(self._student.tensor(name), self._base.tensor(name))

    def require_unchanged(self) -> None:
        self._student.require_unchanged()
        self._base.require_unchanged()

    def stamp(self) -> tuple[Any, ...] | None:
        stamps = self._student.stamp(), self._base.stamp()
        return None if None in stamps else stamps


def _descriptor(path: str) -> int:
    if not Path(path).is_file():
        kind = "is a directory, not a file" if Path(path).is_dir() else "does not exist"
        raise ValueError(f"{path} {kind}; pass the path of a .safetensors file.")
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; check its permissions.") from error


def _map(path: str) -> tuple[Any, dict[str, tuple[int, ...]], dict[str, str]]:
    try:
        file: Any = safe_open(path, framework="pt", device="cpu")
        slices = {name: file.get_slice(name) for name in file.keys()}
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is no complete safetensors file ({error}); download or extract it again.") from error
    kinds = {name: part.get_dtype() for name, part in slices.items()}
    wrong = [f"{name} is {kind}" for name, kind in kinds.items() if kind not in _FLOATS]
    if wrong and len(wrong) == len(kinds):
        raise ValueError(f"{path} holds no floating-point weights ({listed(wrong)}); pass a file of weights.")
    return file, {name: shape for name, shape in shapes.items() if kinds[name] in _FLOATS}, metadata
