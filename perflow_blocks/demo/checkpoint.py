"""Training state on disk, so that an interrupted run loses minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


class Checkpoint:
    """One file that holds the states of all `parts` (things with `state_dict`) and how far training got."""

    def __init__(self, path: Path, parts: dict[str, Any]) -> None:
        self.path = path
        self.parts = parts

    def load(self) -> int:
        """Restores the parts and returns the number of steps done; 0 when there is no file."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        return state["done"]

    def save(self, done: int) -> None:
        """Replaces the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        torch.save({**{name: part.state_dict() for name, part in self.parts.items()}, "done": done}, temporary)
        temporary.replace(self.path)
