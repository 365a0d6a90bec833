"""Putting a block of one's own into the denoising loops of assembled blocks."""

from __future__ import annotations

from collections.abc import Iterator

from diffusers.modular_pipelines.modular_pipeline import LoopSequentialPipelineBlocks, ModularPipelineBlocks


def insert_loop_block(
    blocks: ModularPipelineBlocks,
    name: str,
    block: ModularPipelineBlocks | type[ModularPipelineBlocks],
    *,
    before: str | None = None,
    after: str | None = None,
) -> int:
    """Inserts a block into every denoising loop of assembled blocks, at any depth. Do so before `init_pipeline`.

    Example:
        >>> blocks = PeRFlowSDXLAutoBlocks()
        >>> insert_loop_block(blocks, "preview", PreviewStep, before="solver")
        4
        >>> pipe = blocks.init_pipeline("stabilityai/stable-diffusion-xl-base-1.0")

    Args:
        blocks: assembled blocks, or one loop.
        name: what the block is called in the loops.
        block: called as `block(components, block_state, i=i, t=t)`. A class is made anew for each loop; an instance is
            the same one in all.
        before, after: the block of the loop that it stands next to. Pass one of the two.

    Returns:
        The number of loops.

    Raises:
        ValueError: no loop, both or neither of `before` and `after`, a loop without a block of that name, or with
            one called `name` already, or an assembled block. Nothing is inserted then.
    """
    neighbour = _neighbour(before, after)
    if not _is_block(block):
        given = getattr(block, "__name__", type(block).__name__)
        raise ValueError(f"{given} cannot be put into a loop; pass a block without blocks inside, or its class.")
    loops = list(find_loops(blocks))
    if not loops:
        raise ValueError(f"{type(blocks).__name__} holds no denoising loop; pass blocks that hold one, or a loop.")
    for loop in loops:
        present = f"the blocks of {type(loop).__name__} are {', '.join(loop.sub_blocks)}"
        if neighbour not in loop.sub_blocks:
            raise ValueError(f"{present}, none of them {neighbour!r}; pass one of these, or a single loop.")
        if name in loop.sub_blocks:
            raise ValueError(f"{present}; {name!r} is taken, pass another name.")
    for loop in loops:
        index = list(loop.sub_blocks).index(neighbour) + (after is not None)
        loop.sub_blocks.insert(name, block() if isinstance(block, type) else block, index)
    return len(loops)


def find_loops(blocks: ModularPipelineBlocks) -> Iterator[LoopSequentialPipelineBlocks]:
    """Every loop of assembled blocks, at any depth; a loop itself."""
    if isinstance(blocks, LoopSequentialPipelineBlocks):
        yield blocks
        return
    for inner in blocks.sub_blocks.values():
        yield from find_loops(inner)


def _neighbour(before: str | None, after: str | None) -> str:
    if before is not None and after is None:
        return before
    if after is not None and before is None:
        return after
    raise ValueError(f"before={before!r} and after={after!r}; pass one of them, the block to stand next to.")


def _is_block(block: object) -> bool:
    if isinstance(block, type):
        return issubclass(block, ModularPipelineBlocks) and not getattr(block, "block_classes", None)
    return isinstance(block, ModularPipelineBlocks) and not block.sub_blocks
