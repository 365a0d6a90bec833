"""Blocks such as users write."""

from __future__ import annotations

import enum
from typing import Any

import torch
from diffusers.modular_pipelines import (
    AutoPipelineBlocks,
    ConditionalPipelineBlocks,
    InputParam,
    ModularPipelineBlocks,
    OutputParam,
    SequentialPipelineBlocks,
)

from perflow_blocks import TimeWindows, WindowLogStep


def a_function() -> None:
    """Something to refer to."""


class Colour(enum.Enum):
    RED = 1


class Settled(ModularPipelineBlocks):
    """A block with arguments of many kinds."""

    def __init__(self, number: float, *, name: str = "x", **options: Any) -> None:
        super().__init__()
        self.number, self._name, self.options = number, name, options

    @property
    def description(self) -> str:
        return f"Knows {self.number}."

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        return components, state


class Inherits(Settled):
    """Hands its arguments on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class Forgetful(ModularPipelineBlocks):
    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.area = size * size


class Counting(ModularPipelineBlocks):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0


class ByPicture(ConditionalPipelineBlocks):
    """Chooses by a picture."""

    block_classes = [Counting, WindowLogStep]  # noqa: RUF012
    block_names = ["count", "log"]  # noqa: RUF012
    block_trigger_inputs = ["image", "mask", "strength"]  # noqa: RUF012
    default_block_name = "count"

    def select_block(self, **kwargs: Any) -> str | None:
        return "log" if kwargs["image"] is not None else None


class ByMask(AutoPipelineBlocks):
    """Chooses by a mask."""

    block_classes = [Counting, WindowLogStep]  # noqa: RUF012
    block_names = ["count", "log"]  # noqa: RUF012
    block_trigger_inputs = ["mask", None]  # noqa: RUF012


class Doubling(ModularPipelineBlocks):
    """Doubles the latents after the first steps."""

    def __init__(self, steps: int = 1) -> None:
        super().__init__()
        self.steps = steps

    @property
    def description(self) -> str:
        return "Loop step that doubles the latents."

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("latents", required=True, description="Latents of this step.")]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("latents", description="Latents, doubled in the first steps.")]

    def __call__(self, components: Any, block_state: Any, i: int, t: Any) -> tuple[Any, Any]:
        if i < self.steps:
            block_state.latents = 2 * block_state.latents
        return components, block_state


def many_settings() -> SequentialPipelineBlocks:
    """Blocks whose arguments are of every kind that can be written down."""
    return SequentialPipelineBlocks.from_blocks_dict(
        {
            "a": Settled(float("inf"), name='it\'s "quoted"\n', options_of={"k": (1, [None, {"b", "a", "c"}], b"x")}),
            "b": Inherits(2, dtype=torch.float16, device=torch.device("cpu"), colour=Colour.RED),
            "c": Inherits(
                3,
                windows=TimeWindows(boundaries=(1.0, 0.5, 0.0)),
                kind=Settled,
                function=a_function,
                parts=frozenset(),
            ),
        }
    )


class MakesItsBlocks(SequentialPipelineBlocks):
    """Puts its own block in, whatever its lists say."""

    block_classes = [Counting]  # noqa: RUF012
    block_names = ["first"]  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.sub_blocks["first"] = Counting()


class Demanding(Counting):
    """Says what it needs."""

    _requirements = {"kornia": ">=0.7"}  # noqa: RUF012
