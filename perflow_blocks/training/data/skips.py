"""Samples that are left out, counted once each."""

from __future__ import annotations

import logging
from collections import Counter

logger = logging.getLogger(__name__)


class Skips:
    """Reasons by the name of the sample; warns once if more than half of what was looked at is bad."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._reasons: dict[str, str] = {}
        self._warned = False

    def add(self, name: str, reason: str) -> None:
        self._reasons[name] = reason

    def __len__(self) -> int:
        return len(self._reasons)

    def __contains__(self, name: str) -> bool:
        return name in self._reasons

    def counts(self) -> Counter[str]:
        return Counter(self._reasons.values())

    def state(self) -> dict[str, str]:
        """Name and reason of each, to be handed to `add` again."""
        return dict(self._reasons)

    def warn_if_most(self, looked_at: int) -> None:
        """Logs a warning, the first time that more than half of `looked_at` samples are bad."""
        if not self._warned and 2 * len(self) > looked_at:
            self._warned = True
            logger.warning(
                "%s: %d of %d samples are left out (%s); look at the data.",
                self._where, len(self), looked_at, self.text(),
            )  # fmt: skip

    def text(self) -> str:
        """Such as "3 truncated, 1 no caption"; "none" if there are none."""
        return ", ".join(f"{count} {reason}" for reason, count in self.counts().most_common()) or "none"
