"""The frozen teacher: windows solved with or without guidance, in its own type."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..core.parameterization import WindowAlpha
from ..schedulers import PFODESolver
from ..schedulers.pfode_solver import Conditioning
from .conditioning import PromptEncoder, TextRow, cast
from .config import TeacherConfig
from .geometry import WindowGeometry


class Teacher:
    """Solves the probability-flow ODE of a frozen UNet across windows.

    Args:
        unet: the teacher's.
        scheduler: of the teacher.
        encoder: of its prompts.
        geometry: the windows.
        config: steps and guidance.
        at_hand: makes a context in which the UNet can be called, entered for each solve.
    """

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        encoder: PromptEncoder,
        geometry: WindowGeometry,
        config: TeacherConfig,
        at_hand: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.encoder = encoder
        self.geometry = geometry
        self.config = config
        self._unet = unet
        self._at_hand = at_hand
        self._solver = PFODESolver(scheduler)
        self._num_windows = geometry.solver_windows(config.steps_per_window)

    def solve(self, z_start: Tensor, window: WindowAlpha, rows: list[TextRow], time_ids: Tensor) -> Tensor:
        """The ends (batch, channels, height, width) of windows that begin at `z_start`, for a prompt each.

        Under "fixed" guidance a prompt that was dropped is solved like any other: guidance from it to itself is none.
        """
        start, end = (self.geometry.solver_times(torch.as_tensor(t)) for t in (window.start, window.end))
        return self._solve(z_start, start, end, rows, time_ids, self.config.steps_per_window)

    def path(
        self,
        z_start: Tensor,
        times: Tensor,
        rows: list[TextRow],
        time_ids: Tensor,
        guidance_scale: float | None = None,
    ) -> Tensor:
        """The points (steps + 1, batch, channels, height, width) of a solve with a DDIM step between two times.

        Args:
            z_start: at the first time.
            times: (steps + 1, batch), descending; the first and the last have the noise of the windows' numbers there.
            rows: a prompt each.
            time_ids: of the pictures.
            guidance_scale: by default that of `solve`.
        """
        points = [z_start]
        first, last = (self.geometry.solver_times(t).expand_as(times) for t in (times[0], times[-1]))
        shares = (times - times[0]) / (times[-1] - times[0])
        for start, end in itertools.pairwise(torch.lerp(first, last, shares)):
            points.append(self._solve(points[-1], start, end, rows, time_ids, None, guidance_scale))
        return torch.stack(points)

    @torch.no_grad()
    def _solve(
        self,
        z_start: Tensor,
        start: Tensor,
        end: Tensor,
        rows: list[TextRow],
        time_ids: Tensor,
        steps: int | None,
        guidance_scale: float | None = None,
    ) -> Tensor:
        """By the steps of a window, or for None in one step of any length."""
        scale = guidance_scale
        if scale is None:
            scale = self.config.guidance_scale if self.config.cfg_mode == "fixed" else 1.0
        dtype = getattr(torch, self.config.dtype)
        positive = cast(self.encoder.conditioning(rows, time_ids), dtype)
        negative: Conditioning | None = None
        if scale > 1.0:
            negative = cast(self.encoder.conditioning([self.encoder.empty] * len(rows), time_ids), dtype)
        with self._at_hand():
            return self._solver.solve_conditioned(
                z_start,
                self._unet,
                start,
                end,
                positive,
                negative,
                guidance_scale=scale,
                num_steps=steps or 1,
                num_windows=None if steps is None else self._num_windows,
            )


@contextmanager
def without_factors(student: Any) -> Iterator[None]:
    """A LoRA student as it was before its factors: the teacher, whose weights need not be in memory twice."""
    student.disable_adapters()
    try:
        yield
    finally:
        student.enable_adapters()


@contextmanager
def then(after: Callable[[], Any]) -> Iterator[None]:
    """Calls a function at the end, to take an offloaded model back to the host."""
    try:
        yield
    finally:
        after()
