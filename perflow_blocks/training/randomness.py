"""Random numbers that depend on nothing but where in the training they are drawn."""

from __future__ import annotations

import numpy as np
import torch


def generator_for(seed: int, process_index: int, number: int, purpose: int = 0) -> torch.Generator:
    """A generator on the host for one micro-step of one process.

    A run that is resumed draws what an unbroken one would have, with no state to keep. Numbers come from the host,
    so that they are the same on every device.
    """
    state = np.random.SeedSequence([seed, process_index, number, purpose]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
