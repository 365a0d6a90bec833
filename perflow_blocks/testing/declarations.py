"""What a block says of itself: that it is described, and that no name is declared twice."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any

from diffusers.modular_pipelines.modular_pipeline import LoopSequentialPipelineBlocks, ModularPipelineBlocks

LISTS = {
    "inputs": "InputParam",
    "intermediate_outputs": "OutputParam",
    "expected_components": "ComponentSpec",
    "expected_configs": "ConfigSpec",
}


def declaration_faults(block: ModularPipelineBlocks) -> Iterator[str]:
    """What is wrong with the declarations of a block and of those inside it, as "rule and names; remedy".

    What diffusers' own blocks declare is taken as it is, also where a block inherits it.
    """
    if not hasattr(block, "sub_blocks"):
        yield "was not initialised; call super().__init__() in its __init__"
        return
    if not callable(block):
        yield "cannot be called; define __call__(self, components, state), or (self, components, block_state, i, t)"
    for attribute in ["inputs"] if block.sub_blocks else LISTS:
        names = Counter(entry.name for entry in getattr(block, attribute) if entry.name)
        twice = sorted(name for name, count in names.items() if count > 1)
        if twice:
            yield f"declares {_quoted(twice)} more than once in `{attribute}`; keep one of each"
    if is_stock(type(block)):
        return
    if not block.description:
        yield "has no description; add a property `description` that says what the block does"
    yield from _undescribed(block)
    for inner in block.sub_blocks.values():
        for fault in declaration_faults(inner):
            yield f"holds {type(inner).__name__}, which {fault}"


def own_declarations(block: ModularPipelineBlocks, attribute: str) -> list[Any]:
    """What a block itself declares in one of `LISTS`: not what blocks inside it do, nor a diffusers class above it."""
    if isinstance(block, LoopSequentialPipelineBlocks):
        attribute = f"loop_{attribute}"
    elif block.sub_blocks:
        return []
    stock = next(kind for kind in type(block).__mro__ if is_stock(kind))
    inherited = inspect.getattr_static(stock, attribute).__get__(block)
    return [entry for entry in getattr(block, attribute) if entry not in inherited]


def _undescribed(block: ModularPipelineBlocks) -> Iterator[str]:
    for attribute, kind in LISTS.items():
        declared = own_declarations(block, attribute)
        untyped = [entry for entry in declared if getattr(entry, "type_hint", entry) is None]
        silent = [entry for entry in declared if not (entry.description or "").strip()]
        if untyped:
            yield f"declares {_names(untyped)} in `{attribute}` without a type; pass type_hint= to {kind}"
        if silent:
            yield f"declares {_names(silent)} in `{attribute}` without a description; pass description= to {kind}"


def is_stock(kind: type) -> bool:
    """Whether a class is one of diffusers'."""
    return kind.__module__.startswith("diffusers.")


def _names(entries: list[Any]) -> str:
    return _quoted([entry.name or entry.kwargs_type for entry in entries])


def _quoted(names: list[str]) -> str:
    return ", ".join(map(repr, names))
