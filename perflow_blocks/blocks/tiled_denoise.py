"""Large pictures predicted tile by tile, at each step of the loop (MultiDiffusion, arXiv 2302.08113)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import BlockState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from torch import Tensor

from ..core.tiles import Tiling, cut_plane
from ..core.windows import require_positive_int
from .controlnet_denoiser import PeRFlowControlNetLoopDenoiser
from .denoiser import PeRFlowLoopDenoiser
from .inputs import DENOISER_INPUT_FIELDS, param
from .loop_block import LoopBlock
from .specs import vae_spec


class PeRFlowTiledLoopDenoiser(PeRFlowLoopDenoiser, LoopBlock):
    """The denoiser for pictures larger than the UNet was made for: one UNet call a step for each of the tiles.

    At every step the raw predictions of overlapping tiles are blended into one for the whole picture, and the guider
    combines those. So there is one state of the guider, and its norms, projections and momentum are those of the
    picture, not of a tile. A step of the solver is linear in the prediction, so blended predictions are blended
    latents: seams are closed at every step, not once at the end.

    What has the latents' size, or a whole multiple of it, is cut with them: control pictures, the conditioning of a
    9-channel UNet, masks of IP-Adapters. Prompts and IP-Adapter pictures are the same for each tile.

    Each tile is told to be a picture of its own: where SDXL's size conditioning names the picture's size, it names the
    tile's, and the crop offset stays the caller's, (0, 0) unless given, not the tile's place. Offsets of thousands of
    pixels are beyond what SDXL was trained with (arXiv 2307.01952). Sizes that the caller chose stay, too.

    A picture no larger than a tile takes the parent's path, to the bit. For a denoiser of your own:
    `class MyTiledDenoiser(PeRFlowTiledLoopDenoiser, MyDenoiser)`, if that is a `PeRFlowLoopDenoiser`.

    Example:
        >>> blocks = PeRFlowSDXLAutoBlocks().get_workflow("image2image")
        >>> blocks.sub_blocks["denoise.denoise"].sub_blocks["denoiser"] = PeRFlowTiledLoopDenoiser()
        >>> pipe = blocks.init_pipeline("stabilityai/stable-diffusion-xl-base-1.0")

    Raises:
        ValueError: before the first step, for a tile or an overlap of a size that does not work, or control pictures
            and the like that do not match the latents.
    """

    @property
    def description(self) -> str:
        return f"{super().description} A picture larger than `tile_size` is predicted in overlapping tiles."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [*super().expected_components, vae_spec()]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            *super().inputs,
            param(
                "tile_size",
                int,
                "Height and width of a tile in pixels, a multiple of the VAE's factor times the UNet's (32 for SDXL). "
                "None: the UNet's own size, 1024 for SDXL.",
            ),
            param(
                "tile_overlap",
                int,
                "How many pixels neighbouring tiles share and are blended over, a multiple of the VAE's factor, at "
                "most half a tile; 0 leaves seams. None: an eighth of a tile.",
            ),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            *super().intermediate_outputs,
            OutputParam("tiling", Tiling, "How the latents are cut; None where one tile covers them."),
            OutputParam("tile_sizes", Tensor, "Height and width of the picture and of a tile in pixels, (2, 2)."),
        ]

    def start(self, components: Any, block_state: Any) -> None:
        super().start(components, block_state)
        size, overlap = _tile_settings(components, block_state)
        factor, device = components.vae_scale_factor, block_state.latents.device
        height, width = block_state.latents.shape[-2:]
        tiling = cut_plane(height, width, size // factor, overlap // factor, device)
        block_state.tiling, block_state.tile_sizes = tiling, None
        if tiling is None:
            return
        for name in self._spatial_names():
            _require_whole_multiples(name, getattr(block_state, name), tiling, factor)
        lengths = [[tiling.rows.length, tiling.columns.length], [tiling.rows.size, tiling.columns.size]]
        block_state.tile_sizes = factor * torch.tensor(lengths).to(device)

    def _predict(self, components: Any, block_state: Any, batches: list[Any], i: int, t: Tensor) -> Tensor:
        tiling, predict = block_state.tiling, super()._predict
        if tiling is None:
            return predict(components, block_state, batches, i, t)
        whole = {name: getattr(block_state, name) for name in self._spatial_names()}
        told = [_as_picture_of_its_own(batch, *block_state.tile_sizes.unbind()) for batch in batches]

        def predict_tile(top: int, left: int) -> Tensor:
            cut = {name: _cut(value, tiling, top, left) for name, value in whole.items()}
            return predict(components, BlockState(**{**block_state.as_dict(), **cut}), told, i, t)

        return tiling.blend(predict_tile)

    def _spatial_names(self) -> list[str]:
        """The inputs among which something may be cut: what the guider splits has no place in the picture."""
        return [entry.name for entry in self.inputs if entry.kwargs_type != DENOISER_INPUT_FIELDS]


class PeRFlowTiledControlNetLoopDenoiser(PeRFlowTiledLoopDenoiser, PeRFlowControlNetLoopDenoiser):
    """The same with a ControlNet, several of them or a ControlNet-Union, each shown the tile's part of its picture."""


def _tile_settings(components: Any, block_state: Any) -> tuple[int, int]:
    """Size and overlap of the tiles in pixels.

    Raises:
        ValueError: either does not fit VAE and UNet, or the overlap the tile.
    """
    factor, levels = components.vae_scale_factor, len(components.unet.config.block_out_channels)
    size, overlap = block_state.tile_size, block_state.tile_overlap
    size = components.default_height if size is None else require_positive_int("tile_size", size)
    unit = factor * 2 ** (levels - 1)
    if size % unit:
        raise ValueError(
            f"tile_size={size} is no multiple of {unit}, which VAE and UNet need; pass {_nearest(size, unit)}."
        )
    if overlap is None:
        return size, max(factor, size // 8 // factor * factor)
    if isinstance(overlap, bool) or not isinstance(overlap, int) or overlap < 0:
        raise ValueError(f"tile_overlap={overlap!r} is no whole number of pixels; pass one from 0 to {size // 2}.")
    if overlap > size // 2:
        most = size // 2 // factor * factor
        raise ValueError(f"tile_overlap={overlap} is more than half of tile_size={size}; pass at most {most}.")
    if overlap % factor:
        raise ValueError(
            f"tile_overlap={overlap} is no multiple of the VAE's factor {factor}; pass {overlap // factor * factor}."
        )
    return size, overlap


def _nearest(value: int, unit: int) -> int:
    return max(unit, round(value / unit) * unit)


def _require_whole_multiples(name: str, value: Any, tiling: Tiling, factor: int) -> None:
    """
    Raises:
        ValueError: a picture-like tensor, alone or in a list or dictionary, of which a tile cannot be cut.
    """
    if isinstance(value, (list, tuple, dict)):
        for entry in value.values() if isinstance(value, dict) else value:
            _require_whole_multiples(name, entry, tiling, factor)
    elif isinstance(value, Tensor) and value.ndim == 4 and tiling.scale(value) is None:
        height, width = tiling.rows.length, tiling.columns.length
        raise ValueError(
            f"{name} is {value.shape[-1]}x{value.shape[-2]}, no whole multiple of the latents' {width}x{height}, and "
            f"cannot be cut into tiles; pass one of {factor * width}x{factor * height}."
        )


def _cut(value: Any, tiling: Tiling, top: int, left: int) -> Any:
    """What a tile sees of a value: its part of each picture-like tensor, also in lists and dictionaries."""
    if isinstance(value, Tensor) and value.ndim == 4:
        return tiling.cut(value, top, left)
    if isinstance(value, (list, tuple)):
        return [_cut(entry, tiling, top, left) for entry in value]
    if isinstance(value, dict):
        return {name: _cut(entry, tiling, top, left) for name, entry in value.items()}
    return value


def _as_picture_of_its_own(batch: Any, picture: Tensor, tile: Tensor) -> Any:
    """The guider's batch with the tile's size where its time ids name the picture's.

    The ids are (batch, 6), original size, crop offset and target size; SDXL's refiner has (batch, 5), with a score in
    place of the target size.
    """
    if batch.time_ids is None:  # the parent says what is missing
        return batch
    original, crop, last = batch.time_ids.split(2, dim=1)
    original = _replace_rows(original, picture, tile)
    if last.shape[1] == 2:
        last = _replace_rows(last, picture, tile)
    return BlockState(**{**batch.as_dict(), "time_ids": torch.cat([original, crop, last], dim=1)})


def _replace_rows(rows: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """`rows` (batch, 2) with the integers `new` for each row that equals `old`, as the rows' type rounds it."""
    return torch.where((rows == old).all(dim=1, keepdim=True), new, rows)
