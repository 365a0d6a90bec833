"""A look at every sample before training: is there a caption, how large is the picture."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from .batch import Size
from .buckets import Buckets
from .pictures import NO_CAPTION, TOO_SMALL, UNREADABLE, BadPicture, picture_size
from .records import Records
from .skips import Skips

_CHUNK = 256
_THREADS = 8  # headers are waited for more than worked at
_WORTH_A_BAR = 20 * _CHUNK


@dataclass(frozen=True, kw_only=True)
class Scan:
    """The usable samples, each (count,): `indices` into the records, `homes` into the buckets, height over width."""

    indices: NDArray[np.int64]
    homes: NDArray[np.int64]
    aspects: NDArray[np.float64]


def scan(records: Records, buckets: Buckets, max_enlargement: float, skips: Skips, *, quiet: bool) -> Scan:
    """Reads captions and headers; what is not usable goes to `skips`. Pictures themselves are not decoded.

    Raises:
        ValueError: nothing is usable.
    """
    indices = []
    sizes = []
    for index, found in enumerate(_look_at_all(records, quiet=quiet)):
        if isinstance(found, str):
            skips.add(str(index), found)
        else:
            indices.append(index)
            sizes.append(found)
    table = np.asarray(sizes, np.int64).reshape(-1, 2)
    homes = buckets.nearest(table)
    large_enough = buckets.enlargement(table, homes) <= max_enlargement
    for index in np.asarray(indices, np.int64)[~large_enough]:
        skips.add(str(index), TOO_SMALL)
    skips.warn_if_most(len(records))
    if not large_enough.any():
        raise ValueError(
            f"{records.describe()}: no usable sample among {len(records)}, left out were: {skips.text()}; "
            "give pictures with captions, large enough for data.resolution."
        )
    return Scan(
        indices=np.asarray(indices, np.int64)[large_enough],
        homes=homes[large_enough],
        aspects=(table[:, 0] / table[:, 1])[large_enough],
    )


def _look_at_all(records: Records, *, quiet: bool) -> list[Size | str]:
    count = len(records)
    chunks = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    found: list[Size | str] = []
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        tqdm(
            total=count,
            desc="look at data",
            unit="sample",
            disable=quiet or records.size is not None or count < _WORTH_A_BAR,
        ) as progress,
    ):
        for part in pool.map(partial(_look_at, records), chunks):
            found += part
            progress.update(len(part))
    return found


def _look_at(records: Records, indices: range) -> list[Size | str]:
    return [_size_or_reason(records, index) for index in indices]


def _size_or_reason(records: Records, index: int) -> Size | str:
    try:
        if not records.captions(index):
            return NO_CAPTION
        if records.size is not None:
            return records.size
        stored = records.picture(index)
        size = picture_size(stored) if stored is not None else (0, 0)
    except BadPicture as bad:
        return bad.reason
    return size if min(size) > 0 else UNREADABLE
