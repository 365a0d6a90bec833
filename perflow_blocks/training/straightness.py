"""The honest figure of progress: how straight the student's own path is in each window, and whether it leads there.

The loss says how far the student's outputs are from the teacher's lines at points on those lines. What sampling needs
is another thing: that the path the student takes is straight, since then more steps change nothing, and that it ends
where the teacher's does. Both are measured on fixed prompts and noise.

The straightness of rectified flow (arXiv 2209.03003, section 2) over a window from s (start) to e (end),

    S = 1/|e - s| int E ||(z_e - z_s)/(e - s) - dz_t/dt||^2 dt,

is divided here by E ||(z_e - z_s)/(e - s)||^2, so that it has no unit. At 0 one Euler step solves the window exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.distillation import window_endpoint
from ..core.parameterization import WindowAlpha
from ..core.step_plan import apply_step
from .conditioning import TextRow
from .step import UNet, predict
from .teacher import Teacher

PATH_STEPS = 8
"""Euler steps of the student, DDIM steps of the teacher, in which a path through a window is followed."""


Predictor = Callable[[Tensor, Tensor], Tensor]
"""Called as `predict(z_t, t)` with z_t (batch, ...) and t (batch,); returns the network's output."""


class Straightness(NamedTuple):
    """For each path, (batch,) float32: mean squared deviation of its velocity from the chord's, and the chord's."""

    deviation: Tensor
    chord: Tensor

    def relative(self) -> Tensor:
        """E deviation / E chord over all paths, a scalar of at least 0: 0 for straight lines."""
        return self.deviation.mean() / self.chord.mean()


def path_straightness(points: Tensor, times: Tensor) -> Straightness:
    """The straightness of polylines with the given points (steps + 1, batch, ...).

    The velocity is constant between two points; their times (steps + 1, batch) are strictly monotonic.
    """
    points, times = points.float().flatten(2), times.float()[..., None]
    spans = times[1:] - times[:-1]
    velocities = (points[1:] - points[:-1]) / spans
    chord = (points[-1] - points[0]) / (times[-1] - times[0])
    deviations = (velocities - chord).square().mean(-1)
    shares = spans[..., 0] / (times[-1] - times[0])[..., 0]
    return Straightness(deviation=(deviations * shares).sum(0), chord=chord.square().mean(-1))


def window_times(window: WindowAlpha, num_steps: int) -> Tensor:
    """The times (num_steps + 1, batch) of equal steps from the windows' starts to their ends, both included."""
    start, end = torch.as_tensor(window.start), torch.as_tensor(window.end)
    shares = torch.arange(num_steps + 1, device=start.device) / num_steps
    times = torch.lerp(start.expand(num_steps + 1, -1), end.expand(num_steps + 1, -1), shares[:, None])
    times[0], times[-1] = start, end
    return times


def student_path(
    predict: Predictor, z_start: Tensor, window: WindowAlpha, prediction_type: str, *, num_steps: int
) -> Tensor:
    """The points (num_steps + 1, batch, ...) that a student passes in equal Euler steps through its windows.

    `z_start` (batch, ...) is where the windows start; `window` holds the numbers of each row as tensors (batch,).
    """
    times = window_times(window, num_steps)
    points = [z_start]
    for t, following in itertools.pairwise(times):
        z_end = window_endpoint(points[-1], predict(points[-1], t), window, prediction_type, t)
        share = (following - t) / (torch.as_tensor(window.end) - t)
        points.append(apply_step(points[-1], z_end, 1.0 - share, share))
    return torch.stack(points)


@dataclass(frozen=True, kw_only=True)
class FixedInputs:
    """Prompts and noise that stay the same during a training.

    Attributes:
        prompts: their texts.
        rows: their embeddings.
        time_ids: SDXL's, (count, 6).
        noise: (count, channels, height, width) float32.
    """

    prompts: tuple[str, ...]
    rows: list[TextRow]
    time_ids: Tensor
    noise: Tensor

    def chunks(self, size: int) -> Iterator[FixedInputs]:
        """The same in parts of at most `size` prompts."""
        for start in range(0, len(self.rows), size):
            part = slice(start, start + size)
            yield FixedInputs(
                prompts=self.prompts[part],
                rows=self.rows[part],
                time_ids=self.time_ids[part],
                noise=self.noise[part],
            )


@dataclass(frozen=True, kw_only=True)
class StraightnessReading:
    """What was measured after `step` updates, a number for each window, noisiest first.

    Attributes:
        step: updates done.
        student: relative straightness of the student's path from pure noise through all windows; 0 is a line.
        teacher: that of the teacher's path, which the student replaces.
        endpoint_error: squared distance between where one step of the student and where the teacher end, both from
            the teacher's start of the window, over the squared length of the teacher's chord. 1 is as bad as staying.
    """

    step: int
    student: tuple[float, ...]
    teacher: tuple[float, ...]
    endpoint_error: tuple[float, ...]

    def figures(self) -> dict[str, float]:
        """Numbers by name, for a tracker."""
        named = {"student": self.student, "teacher": self.teacher, "endpoint_error": self.endpoint_error}
        return {f"straightness/{name}_{i}": value for name, values in named.items() for i, value in enumerate(values)}


class StraightnessProbe:
    """Measures students against a teacher whose paths are followed once.

    Args:
        teacher: with the windows.
        inputs: where the paths start and what their prompts are.
        rows_at_once: prompts that go through a UNet together.
    """

    def __init__(self, teacher: Teacher, inputs: FixedInputs, rows_at_once: int) -> None:
        self._teacher = teacher
        self._chunks = list(inputs.chunks(rows_at_once))
        self._solved = [self._solve(chunk) for chunk in self._chunks]
        found = [self._teacher_straightness(*pair) for pair in zip(self._chunks, self._solved, strict=True)]
        self._straightness = _relative(found)

    @torch.no_grad()
    def measure(self, student: UNet, step: int) -> StraightnessReading:
        """The student's straightness and errors; a few numbers are read from the device at the end."""
        pairs = list(zip(self._chunks, self._solved, strict=True))
        own = [self._student_straightness(student, chunk) for chunk in self._chunks]
        errors = [self._endpoint_errors(student, *pair) for pair in pairs]
        missed = torch.cat([missed for missed, _ in errors], 1).mean(1)
        length = torch.cat([length for _, length in errors], 1).mean(1)
        return StraightnessReading(
            step=step,
            student=_relative(own),
            teacher=self._straightness,
            endpoint_error=tuple((missed / length).tolist()),
        )

    def _windows(self, count: int) -> Iterator[WindowAlpha]:
        geometry = self._teacher.geometry
        for number in range(geometry.num_windows):
            yield geometry.rows(torch.full((count,), number, device=self._chunks[0].noise.device))

    def _solve(self, chunk: FixedInputs) -> Tensor:
        """Where the teacher is at the windows' edges, (windows + 1, batch, ...), solved as for training."""
        points = [chunk.noise]
        for window in self._windows(len(chunk.noise)):
            points.append(self._teacher.solve(points[-1], window, chunk.rows, chunk.time_ids))
        return torch.stack(points)

    def _teacher_straightness(self, chunk: FixedInputs, edges: Tensor) -> list[Straightness]:
        found = []
        for window, z_start in zip(self._windows(len(chunk.noise)), edges[:-1], strict=True):
            times = window_times(window, PATH_STEPS)
            found.append(path_straightness(self._teacher.path(z_start, times, chunk.rows, chunk.time_ids), times))
        return found

    def _student_straightness(self, student: UNet, chunk: FixedInputs) -> list[Straightness]:
        found, z = [], chunk.noise
        for window in self._windows(len(z)):
            points = student_path(
                lambda z_t, t: self._output(student, z_t, t, chunk),
                z,
                window,
                self._teacher.geometry.config.prediction_type,
                num_steps=PATH_STEPS,
            )
            found.append(path_straightness(points, window_times(window, PATH_STEPS)))
            z = points[-1]
        return found

    def _endpoint_errors(self, student: UNet, chunk: FixedInputs, edges: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distances missed and squared lengths of the chords, (windows, batch) each."""
        ends = []
        for window, z_start in zip(self._windows(len(chunk.noise)), edges[:-1], strict=True):
            output = self._output(student, z_start, torch.as_tensor(window.start), chunk)
            ends.append(window_endpoint(z_start, output, window, self._teacher.geometry.config.prediction_type))
        missed = (torch.stack(ends) - edges[1:]).flatten(2).square().mean(-1)
        return missed, (edges[1:] - edges[:-1]).flatten(2).square().mean(-1)

    def _output(self, student: UNet, z: Tensor, t: Tensor, chunk: FixedInputs) -> Tensor:
        conditioning = self._teacher.encoder.conditioning(chunk.rows, chunk.time_ids)
        return predict(student, z, t * self._teacher.geometry.num_train_timesteps, conditioning).float()


def _relative(chunks: Sequence[Sequence[Straightness]]) -> tuple[float, ...]:
    """The relative straightness of each window over the rows of all chunks."""
    windows = [
        Straightness(*(torch.cat(parts) for parts in zip(*found, strict=True))) for found in zip(*chunks, strict=True)
    ]
    return tuple(torch.stack([window.relative() for window in windows]).tolist())
