"""Text embeddings that were made before: bounded, and dropped when what made them is gone or changed."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

from torch import Tensor

DEFAULT_MAX_ENTRIES = 64
"""About 41 MB of SDXL's embeddings in half precision with guidance, less than one percent of its UNet."""

Embeddings = dict[str, Tensor | None]
Owner = tuple["weakref.ref[Any] | None", ...]


class EmbeddingCache:
    """Embeddings of the last requests, for each set of encoders that they were made with.

    Deep copies are the same cache: `init_pipeline` and `pipe.blocks` copy blocks, and so what a user holds is what
    the pipeline uses. Pickled it becomes an empty one. Threads may share it.

    Args:
        max_entries: how many requests to keep, at least 1; the one that was not used for longest goes first.

    Attributes:
        hits: how many requests were answered from here.
        misses: how many were not, so that the encoders ran.

    Raises:
        ValueError: `max_entries` is not a positive whole number.
    """

    def __init__(self, max_entries: int = DEFAULT_MAX_ENTRIES) -> None:
        if not isinstance(max_entries, int) or isinstance(max_entries, bool) or max_entries < 1:
            raise ValueError(
                f"max_entries={max_entries!r} is wrong because a cache keeps a whole number of requests, at least 1; "
                f"pass one such as {DEFAULT_MAX_ENTRIES}, or use PeRFlowAutoTextEncoderStep to keep none."
            )
        self.max_entries = max_entries
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Forgets all embeddings and counts from zero."""
        with self._lock:
            self._entries: OrderedDict[tuple[Owner, Hashable], Embeddings] = OrderedDict()
            self._states: dict[Owner, Any] = {}
            self.hits = self.misses = 0

    def get(self, owner: Owner, state: Any, request: Hashable | None) -> Embeddings | None:
        """Copies of what is kept for a request, or None; a state other than the last empties the owner's part.

        Args:
            owner: weak references to whatever makes the embeddings; the part of a dead one is dropped.
            state: what they depend on beside the request.
            request: what was asked for, or None for something that cannot be kept.
        """
        with self._lock:
            for known in [known for known in self._states if any(ref is not None and ref() is None for ref in known)]:
                self._drop(known)
            self._enter(owner, state)
            found = self._entries.get((owner, request))
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self._entries.move_to_end((owner, request))
            return _copies(found)

    def put(self, owner: Owner, state: Any, request: Hashable | None, embeddings: Embeddings) -> None:
        """Keeps copies for a request, and as long as the owner is in the state that making them left it in."""
        with self._lock:
            if request is None:
                return
            self._enter(owner, state)
            self._entries[owner, request] = _copies(embeddings)
            while len(self._entries) > self.max_entries:
                self._entries.popitem(last=False)

    def _enter(self, owner: Owner, state: Any) -> None:
        if self._states.get(owner) != state:
            self._drop(owner)
            self._states[owner] = state

    def _drop(self, owner: Owner) -> None:
        self._states.pop(owner, None)
        for key in [key for key in self._entries if key[0] == owner]:
            del self._entries[key]

    def __len__(self) -> int:
        return len(self._entries)

    def __deepcopy__(self, memo: dict[int, Any]) -> EmbeddingCache:
        return self

    def __reduce__(self) -> tuple[type[EmbeddingCache], tuple[int]]:
        return type(self), (self.max_entries,)


def _copies(embeddings: Embeddings) -> Embeddings:
    return {name: None if tensor is None else tensor.clone() for name, tensor in embeddings.items()}
