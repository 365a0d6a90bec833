"""Large images predicted tile by tile, at each step of the loop (MultiDiffusion, arXiv 2302.08113)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import BlockState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..core.tiles import Tiling, cut_plane
from ..core.windows import require_positive_int
from .controlnet import PeRFlowControlNetLoopDenoiser
from .denoiser import PeRFlowLoopDenoiser, network_inputs
from .inputs import DENOISER_INPUT_FIELDS, param
from .loop_block import LoopBlock
from .specs import vae_spec


class PeRFlowTiledLoopDenoiser(PeRFlowLoopDenoiser, LoopBlock):
    """The denoiser for images larger than the UNet was made for: one UNet call a step for each of the tiles.

    At each step the raw predictions of overlapping tiles are blended into one for the whole image, which the guider
    combines: its norms and momentum are those of the image. The solver's step is linear in the prediction, so blended
    predictions are blended latents, and no seams appear.

    Tensors with four dimensions whose size is a whole multiple of the latents' are cut with them: control images, the
    conditioning of a 9-channel UNet, masks of IP-Adapters. Prompts and IP-Adapter images are the same for each tile.

    Where SDXL's size conditioning names the image's size, a tile is told its own. Other sizes that the caller chose
    stay, and so does the crop offset, since SDXL was not trained with large ones (arXiv 2307.01952).

    An image no larger than a tile takes the parent's path, to the bit. For a denoiser of your own, derived from
    `PeRFlowLoopDenoiser`: `class MyTiledDenoiser(PeRFlowTiledLoopDenoiser, MyDenoiser)`.

    Example:
        >>> blocks = PeRFlowSDXLAutoBlocks().get_workflow("image2image")
        >>> blocks.sub_blocks["denoise.denoise"].sub_blocks["denoiser"] = PeRFlowTiledLoopDenoiser()
        >>> pipe = blocks.init_pipeline("stabilityai/stable-diffusion-xl-base-1.0")

    Raises:
        ValueError: `tile_size` or `tile_overlap` does not fit, or the size of a tensor that is cut does not match.
    """

    description = "Loop step that predicts with guidance, an image larger than `tile_size` in overlapping tiles."

    @property  # properties, since a denoiser of another kind may stand behind this class
    def expected_components(self) -> list[ComponentSpec]:  # type: ignore[override]
        return [*super().expected_components, vae_spec()]

    @property
    def inputs(self) -> list[InputParam]:  # type: ignore[override]
        return [
            *super().inputs,
            param(
                "tile_size", int, "Height and width of a tile in pixels, for SDXL a multiple of 32. None: the UNet's."
            ),
            param(
                "tile_overlap",
                int,
                "Pixels that tiles share, a multiple of f, at most half of one. None: an eighth; 0 leaves seams.",
            ),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:  # type: ignore[override]
        return [
            *super().intermediate_outputs,
            OutputParam("tiling", Tiling, "How the latents are cut; None where one tile covers them."),
            OutputParam("tile_sizes", Tensor, "Height and width of the image and of a tile in pixels, (2, 2)."),
        ]

    def start(self, components: Any, block_state: Any) -> None:
        super().start(components, block_state)
        size, overlap = _tile_settings(components, block_state)
        factor, latents = components.vae_scale_factor, block_state.latents
        height, width = latents.shape[-2:]
        tiling = cut_plane(height, width, size // factor, overlap // factor, latents.device)
        block_state.tiling, block_state.tile_sizes = tiling, None
        if tiling is None:
            return
        for name in self._spatial_names():
            _map_planes(getattr(block_state, name), partial(_require_whole_multiple, name, tiling, factor))
        lengths = [[height, width], [tiling.rows.size, tiling.columns.size]]
        block_state.tile_sizes = factor * torch.tensor(lengths).to(latents.device)

    def _predict(self, components: Any, block_state: Any, batches: list[Any], i: int, t: Tensor) -> Tensor:
        tiling, predict = block_state.tiling, super()._predict
        if tiling is None:
            return predict(components, block_state, batches, i, t)
        network_inputs(block_state)  # made here, so that all tiles and steps share them
        whole = {name: getattr(block_state, name) for name in self._spatial_names()}
        told = [_as_image_of_its_own(batch, *block_state.tile_sizes) for batch in batches]

        def predict_tile(top: int, left: int) -> Tensor:
            parts = _map_planes(whole, lambda plane: tiling.cut(plane, top, left))
            return predict(components, BlockState(**{**block_state.as_dict(), **parts}), told, i, t)

        return tiling.blend(predict_tile)

    def _spatial_names(self) -> list[str]:
        """The inputs that may hold planes to cut: all but those that the guider splits, which have no place."""
        return [entry.name for entry in self.inputs if entry.kwargs_type != DENOISER_INPUT_FIELDS]


class PeRFlowTiledControlNetLoopDenoiser(PeRFlowTiledLoopDenoiser, PeRFlowControlNetLoopDenoiser):  # type: ignore[override]
    """The tiled denoiser with ControlNets or a ControlNet-Union, which are shown the tile's part of their images."""


def _tile_settings(components: Any, block_state: Any) -> tuple[int, int]:
    """Size and overlap of the tiles in pixels, checked."""
    size, overlap, factor = block_state.tile_size, block_state.tile_overlap, components.vae_scale_factor
    size = components.default_height if size is None else require_positive_int("tile_size", size)
    unit = factor * 2 ** (len(components.unet.config.block_out_channels) - 1)
    if size % unit:
        raise ValueError(f"tile_size={size} must be a multiple of {unit}, for VAE and UNet.")
    if overlap is None:
        return size, max(factor, size // 8 // factor * factor)
    allowed = range(0, size // 2 + 1, factor)
    if not isinstance(overlap, int) or isinstance(overlap, bool) or overlap not in allowed:
        rule = f"must be a multiple of {factor} from 0 to {allowed[-1]}, half of tile_size={size}"
        raise ValueError(f"tile_overlap={overlap!r} {rule}.")
    return size, overlap


def _require_whole_multiple(name: str, tiling: Tiling, factor: int, plane: Tensor) -> Tensor:
    if tiling.scale(plane) is None:
        height, width = tiling.rows.length, tiling.columns.length
        raise ValueError(
            f"{name} is {plane.shape[-1]}x{plane.shape[-2]}, which is not a whole multiple of the latents' "
            f"{width}x{height} and cannot be cut into tiles; pass {factor * width}x{factor * height} pixels."
        )
    return plane


def _map_planes(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The value with each tensor of four dimensions changed, also in lists, tuples and dictionaries."""
    return tree_map_only(Tensor, lambda tensor: change(tensor) if tensor.ndim == 4 else tensor, value)


def _as_image_of_its_own(batch: Any, image: Tensor, tile: Tensor) -> Any:
    """The guider's batch with the tile's size where its time ids name the image's, as their type rounds it.

    The ids are (batch, 6), original size, crop offset and target size; SDXL's refiner has (batch, 5), with a score in
    place of the target size.
    """
    if batch.time_ids is None:  # the parent says what is missing
        return batch
    original, crop, target = batch.time_ids.split(2, dim=1)
    sizes = [
        torch.where((rows == image).all(dim=1, keepdim=True), tile, rows) if rows.shape[1] == 2 else rows
        for rows in (original, target)
    ]
    return BlockState(**{**batch.as_dict(), "time_ids": torch.cat([sizes[0], crop, sizes[1]], dim=1)})
