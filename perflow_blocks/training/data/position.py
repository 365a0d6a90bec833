"""Positions in a source of batches, and what they hold for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Position = tuple[int, int]
"""Epoch, and batches of it that were handed out."""


def check_state(saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Compares the settings that a position was saved with to the present ones.

    Raises:
        ValueError: they differ.
    """
    changed = [
        f"{name} was {saved.get(name)} and is {present.get(name)}"
        for name in sorted({*saved, *present})
        if saved.get(name) != present.get(name)
    ]
    if changed:
        raise ValueError(
            f"the position in the data belongs to other data or settings ({'; '.join(changed)}); resume with those, "
            "or start the data from its beginning."
        )
