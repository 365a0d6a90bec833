"""The blocks of the pipeline: a preset or the user's, with what the steps put in, reduced to a workflow."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks, SequentialPipelineBlocks

from ..blocks.auto_blocks import PeRFlowSDXLAutoBlocks
from ..blocks.encode import PeRFlowAutoTextEncoderStep
from ..blocks.merge_delta import PeRFlowMergeDeltaStep
from ..blocks.prompt_cache import PromptCacheStep
from ..blocks.recombine import find_loops, insert_loop_block
from .problems import Problems
from .settings import BuilderSettings, Insertion

TEXT_ENCODER = "text_encoder"


def arrange_blocks(settings: BuilderSettings, problems: Problems) -> Any:
    """New blocks as the settings ask for; where they cannot be had, the nearest that can, and a problem."""
    blocks = _chosen(settings.blocks, problems)
    with problems.noted():
        _require_merge_step(blocks, settings)
    with problems.noted():
        _remember_prompts(blocks, settings.prompt_cache)
    _insert_all(blocks, settings.insertions, problems)
    if settings.workflow is not None:
        with problems.noted():
            blocks = _reduced(blocks, settings.workflow)
    if settings.compile is not None:
        with problems.noted(about="with_compile: "):
            _require_compile_options(settings.compile)
    return blocks


def _chosen(given: Any, problems: Problems) -> Any:
    if given is None:
        return PeRFlowSDXLAutoBlocks()
    if isinstance(given, type) and issubclass(given, ModularPipelineBlocks):
        with problems.noted(TypeError, about=f"with_blocks({given.__name__}): "):
            return given()
    elif isinstance(given, ModularPipelineBlocks):
        return deepcopy(given)
    else:
        problems.add(
            f"with_blocks({given!r}) is wrong because these are no blocks; pass PeRFlowSDXLAutoBlocks(), say."
        )
    return PeRFlowSDXLAutoBlocks()


def _require_merge_step(blocks: Any, settings: BuilderSettings) -> None:
    if settings.delta is None:
        return
    steps = [block for block in blocks.sub_blocks.values() if isinstance(block, PeRFlowMergeDeltaStep)]
    if not steps:
        raise ValueError(
            f"with_delta has no effect on {type(blocks).__name__}, which has no PeRFlowMergeDeltaStep at its top; "
            "insert one, or leave the delta out."
        )
    known = {spec.name: spec.default for spec in blocks.expected_configs}
    for name, value in settings.config_values.items():
        if name.startswith("delta") and name not in known and value not in (None, 1):
            raise ValueError(
                f"with_delta: {type(steps[0]).__name__} takes no {name}={value!r} from the configuration; leave it "
                "out, or let the block declare it."
            )


def _remember_prompts(blocks: Any, max_entries: int | None) -> None:
    if max_entries is None:
        return
    cache = PromptCacheStep(max_entries)
    found = blocks.sub_blocks.get(TEXT_ENCODER)
    if type(found) is not PeRFlowAutoTextEncoderStep:
        present = "none" if found is None else type(found).__name__
        raise ValueError(
            f"with_prompt_cache: the block {TEXT_ENCODER!r} of {type(blocks).__name__} is {present}, where the cache "
            "takes the place of PeRFlowAutoTextEncoderStep; put a PromptCacheStep into the blocks yourself."
        )
    blocks.sub_blocks[TEXT_ENCODER] = cache


def _insert_all(blocks: Any, insertions: Mapping[str, Insertion], problems: Problems) -> None:
    """Inserts each block once its neighbour is there, so that a block may stand next to another inserted one."""
    waiting = dict(insertions)
    for names in _rivals(insertions):
        problems.add(
            f"insert_block: {' and '.join(names)} ask for the same place; let one of them stand next to the other."
        )
        for name in names:
            del waiting[name]
    while waiting:
        to_come = [_landing(name, insertion) for name, insertion in waiting.items()]
        # By name, not by call: the order of calls says nothing.
        ready = [name for name in sorted(waiting) if not _waits(waiting[name], to_come)]
        for name in ready or sorted(waiting):  # where two wait for each other, each says what it misses
            with problems.noted(TypeError, about=f"insert_block({name!r}): "):
                _insert(blocks, name, waiting[name])
            del waiting[name]


def _landing(name: str, insertion: Insertion) -> str:
    """The dotted path that the block will have; its name for one in the loops."""
    parent = (insertion.before or insertion.after or "").rpartition(".")[0]
    return f"{parent}.{name}" if parent else name


def _waits(insertion: Insertion, to_come: Iterable[str]) -> bool:
    """Whether the neighbour is one of the blocks to come, or inside one."""
    places = [f"{place}." for place in (insertion.before, insertion.after) if place is not None]
    return any(place.startswith(f"{coming}.") for place in places for coming in to_come)


def _rivals(insertions: Mapping[str, Insertion]) -> Iterator[list[str]]:
    """The names of blocks that ask for one place."""
    places: dict[tuple[str | None, str | None], list[str]] = {}
    for name, insertion in insertions.items():
        places.setdefault((insertion.before, insertion.after), []).append(name)
    return (sorted(names) for place, names in places.items() if len(names) > 1 and place.count(None) == 1)


def _insert(blocks: Any, name: str, insertion: Insertion) -> None:
    neighbours = [place for place in (insertion.before, insertion.after) if place is not None]
    if len(neighbours) != 1:
        raise ValueError(f"before={insertion.before!r} and after={insertion.after!r}; pass one of the two.")
    parent, neighbour = _parent(blocks, neighbours[0])
    block = deepcopy(insertion.block)  # others may go into it
    if parent is None:
        insert_loop_block(blocks, name, block, before=insertion.before, after=insertion.after)
        return
    if name in parent.sub_blocks:
        raise ValueError(f"{name!r} is taken by {type(parent.sub_blocks[name]).__name__}; pass another name.")
    block = block() if isinstance(block, type) else block
    if not isinstance(block, ModularPipelineBlocks):
        raise ValueError(f"{block!r} is no block; pass a ModularPipelineBlocks, or its class.")
    index = list(parent.sub_blocks).index(neighbour) + (insertion.after is not None)
    parent.sub_blocks.insert(name, block, index)


def _parent(blocks: Any, place: str) -> tuple[Any, str]:
    """The sequence that holds the block of this name, or dotted path, and its name there; None for the loops."""
    if place in blocks.sub_blocks:
        return blocks, place
    *path, name = place.split(".")
    parent: Any = blocks
    for step in path:
        parent = parent.sub_blocks.get(step) if parent is not None else None
    if path and isinstance(parent, SequentialPipelineBlocks) and name in parent.sub_blocks:
        return parent, name
    in_loops = list(dict.fromkeys(inner for loop in find_loops(blocks) for inner in loop.sub_blocks))
    if place not in in_loops:
        raise ValueError(
            f"there is no block {place!r} to stand next to; the blocks are {', '.join(blocks.sub_blocks)}, and in the "
            f"denoising loops {', '.join(in_loops) or 'none'}."
        )
    return None, name


def _reduced(blocks: Any, workflow: str) -> Any:
    known: list[str] = []
    with suppress(NotImplementedError):  # blocks without workflows
        known = blocks.available_workflows
    if workflow not in known:
        raise ValueError(
            f"with_workflow: {type(blocks).__name__} has no workflow {workflow!r}; pass one of "
            f"{', '.join(known) or 'PeRFlowSDXLAutoBlocks'}."
        )
    return blocks.get_workflow(workflow)


def _require_compile_options(options: Mapping[str, Any]) -> None:
    known = ["full", "vae", *(name for name in inspect.signature(torch.compile).parameters if name != "model")]
    for name in options:
        if name not in known:
            raise ValueError(f"{name}={options[name]!r} is no option; pass some of {', '.join(known)}.")
    mode = options.get("mode")
    modes = ["default", *torch._inductor.list_mode_options()] if mode is not None else []
    if mode is not None and mode not in modes:
        raise ValueError(f"mode={mode!r} is unknown; pass one of {', '.join(dict.fromkeys(modes))}.")
