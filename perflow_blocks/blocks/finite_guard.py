"""The guard of the loop: broken latents are an error or are computed again in float32, never a black picture."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from diffusers.utils import logging
from torch import Tensor

from .float32 import in_float32, is_float32, precision, why_not_float32
from .inputs import NONFINITE_POLICIES, latents_input, on_nonfinite_input, step_plan_input
from .loop_block import LoopBlock, Repeat
from .specs import controlnet_spec, guider_spec, unet_spec

logger = logging.get_logger(__name__)

Marks = list[int | None]
"""For each picture the number of the first step whose latents are broken at its start; None for a sound one."""


@dataclass(kw_only=True)
class FiniteRecord:
    """What the guard noted in one run.

    Attributes:
        largest: (steps + 1, pictures) on the device: the largest magnitude in each picture's latents at the start of
            each step, and of the result in the last row that was written; not finite where the latents are not.
        steps: how many steps were begun, counted from the schedule's first.
        window_starts: for the fallback, by the number of a window's first step: the latents and the guider's state.
        rerun_from: the number of the step from which the run was repeated in float32, or None.
    """

    largest: Tensor
    steps: int = 0
    window_starts: dict[int, tuple[Tensor, dict[str, Any]]] = field(default_factory=dict)
    rerun_from: int | None = None

    @classmethod
    def blank(cls, steps: int, latents: Tensor) -> FiniteRecord:
        dtype = torch.promote_types(latents.dtype, torch.float32)
        return cls(largest=latents.new_zeros(steps + 1, len(latents), dtype=dtype))

    def mark(self, latents: Tensor, i: int) -> None:
        """One reduction into the record; a maximum, unlike a sum, cannot overflow where all values are finite."""
        row = self.largest[i]
        torch.linalg.vector_norm(latents, ord=torch.inf, dim=(1, 2, 3), dtype=row.dtype, out=row)

    def first_broken(self, latents: Tensor) -> Marks:
        """For each picture the number of the first step with broken latents at its start; one read of the device.

        A picture of which only the result is broken has the number of steps, a sound one None.
        """
        self.mark(latents, self.steps)
        rows = torch.isfinite(self.largest).T.tolist()
        return [row.index(False) if False in row else None for row in rows]

    def restart(self, first: int) -> None:
        """Forgets the marks, for a run again from step `first`."""
        self.largest.zero_()
        self.rerun_from = first


class FiniteGuardStep(LoopBlock):
    """Marks the first step whose latents are not finite, on the device; reads that once, after the loop.

    Stands first in the loop: there it sees what each step starts with. With `on_nonfinite="raise"` broken latents are
    an error that names step, window and type. With `"fallback"` the run is repeated in float32 from the start of the
    last window that was still finite, with a warning; that takes room for the UNet in float32.

    Raises:
        ValueError: an unknown policy; latents that are not finite, with `"fallback"` if float32 does not help either.
    """

    models: tuple[str, ...] = ("unet",)
    """The components that predict: what the fallback makes float32."""

    @property
    def description(self) -> str:
        return (
            "Loop step that marks the first step whose latents are not finite; after the loop that is an error, "
            "or the steps are repeated in float32."
        )

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [guider_spec(), unet_spec()]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            latents_input(),
            step_plan_input(),
            on_nonfinite_input(),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("latents", Tensor, "Latents (batch, channels, height/f, width/f), all of them finite."),
            OutputParam("finite_record", FiniteRecord, "What the guard noted: which steps broke and were repeated."),
        ]

    def start(self, components: Any, block_state: Any) -> None:
        if block_state.on_nonfinite not in NONFINITE_POLICIES:
            raise ValueError(
                f"on_nonfinite={block_state.on_nonfinite!r} is unknown; pass one of {', '.join(NONFINITE_POLICIES)}."
            )
        block_state.finite_record = FiniteRecord.blank(len(block_state.step_plan), block_state.latents)

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        record, latents = block_state.finite_record, block_state.latents
        record.mark(latents, i)
        record.steps = i + 1
        begins = block_state.step_plan.begins_window(i) or not record.window_starts
        if block_state.on_nonfinite == "fallback" and begins:
            # Copies, since other blocks may write into the latents and the guider into its momentum.
            record.window_starts[i] = (latents.clone(), copy.deepcopy(vars(components.guider)))
        return components, block_state

    @torch.no_grad()
    def finish(self, components: Any, block_state: Any, repeat: Repeat) -> None:
        record = block_state.finite_record
        marks = record.first_broken(block_state.latents)
        if any(mark is not None for mark in marks):
            if block_state.on_nonfinite == "raise":
                raise ValueError(_complaint(block_state, marks, fallback=', or pass on_nonfinite="fallback"'))
            self._fall_back(components, block_state, marks, repeat)
        record.window_starts.clear()

    def _fall_back(self, components: Any, block_state: Any, marks: Marks, repeat: Repeat) -> None:
        """Repeats the run in float32 from the start of the last window that was finite."""
        record, given, broken = block_state.finite_record, block_state.latents, _earliest(marks)
        models = [getattr(components, name) for name in self.models]
        first = max((step for step in record.window_starts if step < broken), default=None)
        if first is None or is_float32(models, given):
            raise ValueError(_complaint(block_state, marks))
        obstacle = why_not_float32(models)
        if obstacle is not None:
            raise ValueError(_complaint(block_state, marks, also=f", and {obstacle}"))
        in_vain = _complaint(block_state, marks, also=", nor are they in torch.float32", wider=False)
        block_state.latents, guider_state = record.window_starts[first]
        vars(components.guider).clear()
        vars(components.guider).update(guider_state)
        record.restart(first)
        with in_float32(models, vars(block_state)):
            repeat(first)
        if any(mark is not None for mark in record.first_broken(block_state.latents)):
            raise ValueError(in_vain)
        logger.warning(
            "The latents after %s were not finite in %s; steps %d to %d were repeated in torch.float32. To spare the "
            "second run, %s.",
            _place(block_state, broken),
            precision(given),
            first + 1,
            record.steps,
            _wider(given),
        )


class ControlNetFiniteGuardStep(FiniteGuardStep):
    """The same for a loop with a ControlNet, which the fallback makes float32 as well."""

    models = ("unet", "controlnet")

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [*super().expected_components, controlnet_spec()]


def _place(block_state: Any, broken: int) -> str:
    """The step that ended with the latents that step `broken` starts with, and its window."""
    plan, step = block_state.step_plan, broken - 1
    return (
        f"step {step + 1} of {len(plan)} (window {plan.window_index[step]}, time {plan.window_start[step]:g} to "
        f"{plan.window_end[step]:g})"
    )


def _wider(latents: Tensor) -> str:
    """How to have more range than these latents had."""
    if precision(latents) != latents.dtype:
        return "run the pipeline outside torch.autocast"
    types = [str(dtype) for dtype in (torch.bfloat16, torch.float32) if dtype != latents.dtype]
    return f"load the pipeline with dtype={' or '.join(types)}"


def _earliest(marks: Marks) -> int:
    return min(mark for mark in marks if mark is not None)


def _complaint(block_state: Any, marks: Marks, *, also: str = "", wider: bool = True, fallback: str = "") -> str:
    """The error's text.

    Args:
        block_state: after the loop.
        marks: for each picture the number of the first step with broken latents at its start.
        also: what is known beyond step, window and pictures.
        wider: whether a type of more range may help.
        fallback: what else may.
    """
    latents, broken = block_state.latents, _earliest(marks)
    dtype = precision(latents)
    bad = [f"images[{index}]" for index, mark in enumerate(marks) if mark is not None]
    which = f"for {', '.join(bad[:8])}{' and more' if len(bad) > 8 else ''} of {len(marks)}"
    if broken == 0:
        return (
            f"the latents that the run starts with are not finite in {dtype} {which}; check the latents that were "
            "passed, or the VAE that encoded the given picture."
        )
    remedy = "check the delta, the LoRAs and the latents that were passed (the VAE is not the cause)"
    if wider and dtype != torch.float32:
        remedy = f"{_wider(latents)}{fallback}; if that does not help, {remedy}"
    return f"the latents after {_place(block_state, broken)} are not finite in {dtype} {which}{also}; {remedy}."
