"""Which samples of which bucket make up the batches of an epoch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Group = tuple[NDArray[np.int64], int]
"""Members, and the bucket that all of them are cut to."""


def plan_epoch(
    homes: NDArray[np.int64], aspects: NDArray[np.float64], group_size: int, rng: np.random.Generator
) -> list[Group]:
    """Groups of `group_size` samples in random order, each sample in one group at most.

    Whole groups come from one bucket; what buckets have left over is grouped with what is nearest in aspect ratio.
    Fewer samples than a group remain, drawn anew each epoch, unless they are all there are: they are then repeated.

    Args:
        homes: (count,) bucket of each sample.
        aspects: (count,) height over width of each sample.
    """
    groups: list[Group] = []
    rest = []
    for bucket in np.unique(homes):
        members = rng.permutation(np.flatnonzero(homes == bucket))
        whole = len(members) // group_size * group_size
        groups += [(group, int(bucket)) for group in members[:whole].reshape(-1, group_size)]
        rest.append(members[whole:])
    left = rng.permutation(np.concatenate(rest))
    groups += group_leftovers(left, homes[left], aspects[left], group_size, repeat=not groups)
    return [groups[number] for number in rng.permutation(len(groups))]


def group_leftovers(
    members: NDArray[np.int64],
    homes: NDArray[np.int64],
    aspects: NDArray[np.float64],
    group_size: int,
    *,
    repeat: bool,
) -> Iterator[Group]:
    """Groups of neighbours in aspect ratio, each in the bucket of its middle member; the last few members remain.

    With `repeat`, members that are fewer than a group are repeated to be one.
    """
    whole = len(members) // group_size * group_size
    chosen = np.arange(whole)
    if repeat and whole == 0:
        chosen = np.resize(np.arange(len(members)), group_size)
    order = chosen[np.argsort(aspects[chosen], kind="stable")]
    for group in order.reshape(-1, group_size):
        yield members[group], int(homes[group[group_size // 2]])
