"""What makes two trees of blocks the same: names, order, types, triggers, defaults and settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from diffusers.modular_pipelines.modular_pipeline import (
    AutoPipelineBlocks,
    ConditionalPipelineBlocks,
    ModularPipelineBlocks,
)

from .arguments import UnreadableArgumentError, same_settings, settings


@dataclass(frozen=True, kw_only=True)
class BlockTree:
    """A block as far as it matters to a pipeline, with the blocks inside.

    Attributes:
        kind: its class; for one in `generated`, the class that it was generated from.
        triggers: for blocks that choose, what is looked at; for automatic ones in the order of their blocks.
        default: the block that runs without a trigger.
        settings: see `arguments.settings`.
    """

    kind: type
    triggers: tuple[Any, ...]
    default: str | None
    settings: dict[str, Any]
    inside: dict[str, BlockTree]


def describe_tree(
    block: ModularPipelineBlocks, generated: frozenset[type] = frozenset(), place: str = ""
) -> BlockTree:
    """The tree of a block.

    Raises:
        ValueError: a block does not tell its constructor arguments; names it.
    """
    kind = type(block)
    while kind in generated:
        kind = kind.__bases__[0]
    try:
        own = settings(block, kind)
    except UnreadableArgumentError as error:
        raise ValueError(f"{label(block, place)} cannot be exported: {error}.") from None
    inside = {
        name: describe_tree(inner, generated, f"{place}.{name}" if place else name)
        for name, inner in block.sub_blocks.items()
    }
    chooses = isinstance(block, ConditionalPipelineBlocks)
    return BlockTree(
        kind=kind,
        triggers=tuple(triggers(block, place)) if chooses else (),
        default=block.default_block_name if chooses and block.default_block_name in inside else None,
        settings=own,
        inside=inside,
    )


def triggers(block: ConditionalPipelineBlocks, place: str) -> list[Any]:
    """`block_trigger_inputs`, of automatic blocks for each block inside, in the order of these.

    Raises:
        ValueError: a block inside an automatic one has no trigger.
    """
    if not isinstance(block, AutoPipelineBlocks):
        return list(block.block_trigger_inputs)
    known = dict(zip(block.block_names, block.block_trigger_inputs, strict=True))
    for name in block.sub_blocks:
        if name not in known:
            raise ValueError(
                f"{label(block, place)} cannot be exported: nothing triggers its block {name!r}, which was put in "
                "later; write a class that names it in block_names and block_trigger_inputs."
            )
    return [known[name] for name in block.sub_blocks]


def differences(one: BlockTree, other: BlockTree, place: str = "") -> Iterator[tuple[str, str]]:
    """Where two trees are not the same: the place of a block (parts joined by dots) and what differs there."""
    if one.kind is not other.kind:
        yield place, f"its class {one.kind.__name__} comes out as {other.kind.__name__}"
        return
    for name in same_settings(one.settings, other.settings):
        yield place, f"its {name} does not come out of its constructor; make it an argument that __init__ keeps"
    if (one.triggers, one.default) != (other.triggers, other.default):
        yield place, f"its triggers {one.triggers} come out as {other.triggers}"
    if list(one.inside) != list(other.inside):
        yield place, f"its blocks {', '.join(one.inside)} come out as {', '.join(other.inside) or 'none'}"
        return
    for name, inner in one.inside.items():
        yield from differences(inner, other.inside[name], f"{place}.{name}" if place else name)


def label(block: ModularPipelineBlocks, place: str) -> str:
    """How messages name a block: by its place in the tree, and class."""
    return f"block {place!r} ({type(block).__name__})" if place else type(block).__name__
