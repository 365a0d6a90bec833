"""What an export will hold: found out, with all that stands in its way, before anything is written."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import diffusers
from diffusers.modular_pipelines.modular_pipeline import ModularPipeline, ModularPipelineBlocks

from ..blocks.auto_blocks import Preset
from ..blocks.block_source import preset_of
from ..blocks.merge_delta import guidance_in_effect
from ..blocks.pipeline import PeRFlowModularPipeline
from ..blocks.settings import complaint, config_values, kept_guider
from ..blocks.specs import DEFAULT_NUM_INFERENCE_STEPS
from ..builder.problems import Problems
from ..delta.recipe import DeltaRecipe
from .delta import choose_delta, delta_settings, recipe_of
from .entries import Entry, WeightsMode, component_entries
from .sources import Mode, WorkflowSources, workflow_sources


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """What an export holds.

    Attributes:
        pipe: the pipeline; one without components for blocks alone.
        blocks: a copy of its blocks.
        class_name: their class in the repository.
        sources: the code.
        preset: the name of the preset of this package that the class is, unchanged.
        entries: components of the index.
        config: configuration values of the index.
        delta: the file to copy, if any.
    """

    pipe: Any
    blocks: Any
    class_name: str
    sources: WorkflowSources
    preset: str | None
    entries: list[Entry]
    config: dict[str, Any]
    delta: Path | None


def make_plan(
    given: Any,
    target: Path,
    mode: Mode,
    weights: WeightsMode,
    name: str | None,
    delta: str | os.PathLike[str] | None,
    description: str | None,
    exclude: Collection[str],
) -> ExportPlan:
    """All that is known before anything is written; arguments as of `export_workflow`.

    Raises:
        ValueError: names all that cannot be exported.
    """
    _require_choice("mode", mode, get_args(Mode))
    _require_choice("weights", weights, get_args(WeightsMode))
    if not isinstance(given, (ModularPipeline, ModularPipelineBlocks)):
        raise ValueError(f"{given!r} is neither a modular pipeline nor blocks; pass one of them.")
    pipe: Any = given if isinstance(given, ModularPipeline) else given.init_pipeline()
    blocks: Any = pipe.blocks
    problems = Problems()
    if weights == "include" and pipe is not given:
        problems.add("blocks have no weights to include; pass a pipeline, or weights='reference'.")
    if type(pipe).__name__ not in (PeRFlowModularPipeline.__name__, *dir(diffusers)):
        problems.add(
            f"the pipeline is a {type(pipe).__qualname__}, which no index can name; use blocks.init_pipeline."
        )
    entries = component_entries(pipe, blocks, weights, exclude, problems)
    guider = None if "guider" in exclude else kept_guider(pipe, blocks, problems.add)
    if guider is not None:
        place: dict[str, Any] = {"location": None, "subfolder": "guider", "component": guider}
        entries.append(Entry(name="guider", kind=type(guider), **place))
    config: dict[str, Any] = {}
    with problems.noted():
        config = config_values(pipe, blocks, problems.add)
    for setting, value in config.items():
        if isinstance(value, str) and Path(value).is_absolute():
            problems.add(f"the configuration value {setting}={value!r} is a path of this machine; set a relative one.")
    source = choose_delta(pipe, blocks, weights, delta, problems)
    if source is not None:
        config |= delta_settings(pipe)
    class_name, sources = name or _class_name(blocks, target), None
    if not class_name.isidentifier():
        problems.add(f"name={class_name!r} is no name of a class; pass one such as MyWorkflow.")
    else:
        with problems.noted():
            sources = workflow_sources(blocks, class_name, mode, description=description)
    if problems or sources is None:
        raise ValueError(complaint("exported", list(problems)))
    is_preset = mode == "thin" and description is None and class_name == type(blocks).__name__
    return ExportPlan(
        pipe=pipe,
        blocks=blocks,
        class_name=class_name,
        sources=sources,
        preset=preset_of(blocks) if is_preset else None,
        entries=entries,
        config=config,
        delta=source,
    )


def _class_name(blocks: Any, target: Path) -> str:
    """That of the blocks; of blocks that were put together from parts, one after the directory."""
    kind = type(blocks)
    if kind is not Preset and kind.__module__.split(".")[0] != "diffusers":
        return kind.__name__
    words = re.findall("[A-Za-z0-9]+", target.absolute().name)
    return "".join(word[:1].upper() + word[1:] for word in words) + "Blocks"


def _require_choice(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{option}={value!r} is unknown; pass one of {', '.join(known)}.")


def recipe_table(plan: ExportPlan) -> dict[str, str]:
    """The sampling settings that a call without any will run with, for blocks of this package."""
    declared = {spec.name for spec in plan.blocks.expected_configs}
    if not {"prediction_type", "default_num_inference_steps"} <= declared:
        return {}
    recipe, config = recipe_of(plan.pipe, plan.delta), plan.config
    steps = config.get("default_num_inference_steps") or recipe.num_inference_steps or DEFAULT_NUM_INFERENCE_STEPS
    return {
        "steps": str(steps),
        "guidance": _guidance(plan, recipe),
        "prediction type": config.get("prediction_type") or recipe.prediction_type or "ddim_eps",
        "time windows": _window_text(config, recipe),
    }


def _guidance(plan: ExportPlan, recipe: DeltaRecipe) -> str:
    guider = next((entry.component for entry in plan.entries if entry.name == "guider"), None)
    if guider is not None:
        return type(guider).__name__
    return f"{guidance_in_effect(plan.pipe.guider, plan.config.get('guidance_scale'), recipe):g}"


def _window_text(config: dict[str, Any], recipe: DeltaRecipe) -> str:
    named = config if {"num_time_windows", "window_boundaries"} & config.keys() else vars(recipe)
    boundaries = named.get("window_boundaries")
    if boundaries is not None:
        return f"{len(boundaries) - 1}, from {', '.join(f'{time:g}' for time in boundaries)}"
    return f"{named.get('num_time_windows') or 4}, equal"
