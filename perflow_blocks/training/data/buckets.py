"""Picture sizes of about one area, so that a batch can hold pictures of one shape (SDXL, arXiv 2307.01952)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .batch import Size
from .config import DataConfig


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """The sizes that pictures are cut to, widest first."""

    sizes: tuple[Size, ...]

    @classmethod
    def of(cls, config: DataConfig) -> Buckets:
        """Those of a configuration; a single square where there are no pictures or no buckets are wanted."""
        if not config.bucketing or config.kind == "prompts":
            return cls(sizes=((config.resolution, config.resolution),))
        return cls(sizes=bucket_sizes(config.resolution, config.bucket_step, config.max_aspect))

    def nearest(self, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """For pictures of `sizes` (count, 2) the numbers (count,) of the buckets whose aspect ratio is nearest."""
        own = np.log([height / width for height, width in self.sizes])
        wanted = np.log(sizes[:, 0] / sizes[:, 1])
        return np.abs(wanted[:, None] - own).argmin(axis=1)

    def enlargement(self, sizes: NDArray[np.int64], homes: NDArray[np.int64]) -> NDArray[np.float64]:
        """By how much pictures have to grow to cover their buckets; below 1 they shrink."""
        return (np.asarray(self.sizes)[homes] / sizes).max(axis=1)


def bucket_sizes(resolution: int, step: int, max_aspect: float) -> tuple[Size, ...]:
    """Sizes in multiples of `step`: for each side the longest other side that keeps within `resolution` squared.

    None has more pixels than the square, which is what a GPU's memory has to hold; none is longer than `max_aspect`
    times its width, or wider than that times its height.
    """
    found = set()
    for side in range(step, int(resolution * max_aspect) + 1, step):
        other = resolution * resolution // side // step * step
        if other and max(side, other) <= max_aspect * min(side, other):
            found |= {(side, other), (other, side)}
    return tuple(sorted(found, key=lambda size: (size[0] / size[1], size)))
