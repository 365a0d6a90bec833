"""Changing assembled blocks: a block of one's own in the denoising loops, and compiled networks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
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
        block: called as `block(components, block_state, i=i, t=t)`. Each loop gets an instance of a class; all loops
            share an instance.
        before, after: the block of the loop that it stands next to. Pass one of the two.

    Returns:
        The number of loops.

    Raises:
        ValueError: no loop is found, a loop lacks the neighbour or already has a block called `name`, or `block`
            cannot run in a loop. Nothing is inserted then.
    """
    neighbour = after if before is None else before
    if neighbour is None or (before is not None and after is not None):
        raise ValueError(f"before={before!r} and after={after!r}; exactly one of them must be a block's name.")
    kind = block if isinstance(block, type) else type(block)
    if not issubclass(kind, ModularPipelineBlocks) or getattr(block, "block_classes", None):
        raise ValueError(f"{kind.__name__} cannot be put into a loop; pass a block without sub-blocks, or its class.")
    loops = list(find_loops(blocks))
    if not loops:
        raise ValueError(f"{type(blocks).__name__} holds no denoising loop; pass blocks that hold one, or a loop.")
    for loop in loops:
        present = f"the blocks of {type(loop).__name__} are {', '.join(loop.sub_blocks)}"
        if neighbour not in loop.sub_blocks:
            raise ValueError(f"{present}, none of them {neighbour!r}; name one of these, or pass a single loop.")
        if name in loop.sub_blocks:
            raise ValueError(f"{present}; {name!r} is taken, choose another name.")
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


def compile_loops(pipe: Any, *, full: bool = False, vae: bool = True, **options: Any) -> list[str]:
    """Compiles UNet, ControlNets and the VAE's decoder in place, at their first call. Do so after loading.

    By default only the transformer blocks of UNet and ControlNets are compiled, each kind once: seconds where a whole
    SDXL UNet takes minutes (https://docs.pytorch.org/tutorials/recipes/regional_compilation.html).

    Example:
        >>> pipe.load_components(dtype=torch.float16)
        >>> compile_loops(pipe)
        ['unet', 'vae.decoder']

    Args:
        pipe: a pipeline whose `unet` is loaded.
        full: whether UNet and ControlNets are compiled whole, for the last bit of speed and `mode="reduce-overhead"`.
        vae: whether the VAE's decoder is compiled.
        options: arguments of `torch.compile`; `fullgraph` is True for UNet and ControlNets unless given.

    Returns:
        The names of what is compiled.

    Raises:
        ValueError: the UNet is not loaded.
    """
    components = pipe.components
    if components.get("unet") is None:
        raise ValueError("unet=None cannot be compiled; call pipe.load_components() first.")
    compiled = [name for name in ("unet", "controlnet") if components.get(name) is not None]
    for name in compiled:
        model = components[name]
        for part in [model] if full else model.modules():
            if full or isinstance(part, BasicTransformerBlock):
                part.compile(**{"fullgraph": True, **options})
    decoder = getattr(components.get("vae"), "decoder", None)
    if vae and decoder is not None:
        decoder.compile(**options)
        compiled.append("vae.decoder")
    return compiled
