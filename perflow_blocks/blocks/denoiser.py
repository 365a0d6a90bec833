"""The guided prediction of one step: all of the guider's batches in one UNet call, with ControlNets, in tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.guiders import BaseGuidance
from diffusers.modular_pipelines.modular_pipeline import BlockState, ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from ..core.tiles import Tiling, cut_plane
from ..core.windows import require_positive_int
from .declare import declared
from .guiders import guider_of_call, is_batchable
from .inputs import DENOISER_INPUT_FIELDS, guided_inputs, param, shared_inputs
from .loop_block import LoopBlock
from .specs import controlnet_spec, guider_spec, unet_spec, vae_spec

UNCONDITIONAL = "pred_uncond"
"""What every diffusers guider calls its unconditional batch."""

GUIDER_FIELDS = {  # what the UNet takes: the tensors' names for the guider's conditional and unconditional batches
    "encoder_hidden_states": ("prompt_embeds", "negative_prompt_embeds"),
    "text_embeds": ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
    "time_ids": ("add_time_ids", "negative_add_time_ids"),
    "image_embeds": ("ip_adapter_embeds", "negative_ip_adapter_embeds"),
}


class PeRFlowLoopDenoiser(ModularPipelineBlocks):
    """Predicts the noise with guidance: one UNet call for all the batches that the guider asks for.

    A guider that hooks the model differently for each batch (skip-layer, perturbed attention, auto guidance) gets one
    call for each. The two ways agree to rounding. The guidance formula is always the guider's own.
    """

    model_name = "stable-diffusion-xl"
    description = "Loop step that asks the guider for its batches, runs the UNet on all at once and combines them."
    expected_components = declared(guider_spec(), unet_spec())
    inputs = declared(
        *shared_inputs("latents", "num_inference_steps", required=True),
        *guided_inputs("prompt_embeds", "pooled_prompt_embeds", "add_time_ids"),
        *guided_inputs("ip_adapter_embeds", required=False),
        param("timestep_cond", Tensor, "Guidance embedding (batch, width) for UNets that were distilled with one."),
        *shared_inputs("cross_attention_kwargs", "inpaint_conditioning", "guider"),
    )
    intermediate_outputs = declared(
        OutputParam("noise_pred", Tensor, "The guided prediction of the last step, shaped like the latents.")
    )

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        guider, unet = guider_of_call(components, block_state), components.unet
        guider.set_state(step=i, num_inference_steps=block_state.num_inference_steps, timestep=t)
        batches = guider.prepare_inputs_from_block_state(block_state, GUIDER_FIELDS)
        if is_batchable(guider):
            noise_pred = self._predict(components, block_state, batches, i, t)
            for batch, rows in zip(batches, noise_pred.chunk(len(batches)), strict=True):
                batch.noise_pred = rows
        else:
            for batch in batches:
                try:
                    guider.prepare_models(unet)
                    batch.noise_pred = self._predict(components, block_state, [batch], i, t)
                finally:
                    guider.cleanup_models(unet)
        block_state.noise_pred = guider(batches).pred
        return components, block_state

    def _predict(self, components: Any, block_state: Any, batches: list[Any], i: int, t: Tensor) -> Tensor:
        """The raw prediction (len(batches) * batch, channels, height/f, width/f), from one UNet call."""
        copies = len(batches)
        sample = _samples(block_state.latents, copies, block_state.inpaint_conditioning)
        conditions = _conditions(block_state, batches)
        residuals = self._residuals(components, block_state, batches, i, t, sample, conditions)
        return components.unet(
            sample,
            t,
            encoder_hidden_states=conditions.pop("encoder_hidden_states"),
            timestep_cond=_repeated(block_state, "timestep_cond", block_state.timestep_cond, copies),
            cross_attention_kwargs=block_state.cross_attention_kwargs,
            added_cond_kwargs=conditions,
            return_dict=False,
            **residuals,
        )[0]

    def _residuals(self, *arguments: Any, **named: Any) -> dict[str, Any]:
        """Further arguments of the UNet, from a ControlNet that may use its `sample` and `conditions`; none here."""
        return {}


def _samples(latents: Tensor, copies: int, also: Tensor | None) -> Tensor:
    """The latents with the channels of `also` behind theirs, `copies` times along the batch."""
    sample = latents if also is None else torch.cat([latents, also], dim=1)
    return sample if copies == 1 else sample.repeat(copies, 1, 1, 1)


def _conditions(block_state: Any, batches: list[Any]) -> dict[str, Any]:
    """The batches' tensors by the UNet's names, joined along the batch, in a new dictionary. Omits what is None."""
    joined = {}
    for name, fields in GUIDER_FIELDS.items():
        values = [getattr(batch, name) for batch in batches]
        missing = sum(value is None for value in values)
        if 0 < missing < len(values):
            raise ValueError(
                f"the guider asks for both {' and '.join(fields)}; encode with the same guider, pass both, or pass "
                "guidance_scale=1."
            )
        if not missing:
            joined[name] = _joined(block_state, name, values)
    return joined


def _repeated(block_state: Any, name: str, value: Any, copies: int) -> Any:
    """A tensor, or each tensor of a list, `copies` times along the batch; None as it is."""
    return None if value is None else _joined(block_state, name, [value] * copies)


def _joined(block_state: Any, name: str, values: list[Any]) -> Any:
    """Tensors one after the other along the batch; lists (one tensor per IP-Adapter) entry by entry.

    The result is kept from step to step, until one of the values is another tensor or was written to in place.
    """
    if len(values) == 1:
        return values[0]
    kept, key, version = _kept(block_state), (name, len(values)), _version(values)
    if version is None or key not in kept or kept[key][0] != version:
        is_tensor = isinstance(values[0], Tensor)
        made = torch.cat(values) if is_tensor else [torch.cat(parts) for parts in zip(*values, strict=True)]
        kept[key] = (version, values, made)  # holds the values, so that no other object gets their ids
    return kept[key][2]


def _kept(block_state: Any) -> dict[Any, Any]:
    if block_state["_joined"] is None:
        block_state["_joined"] = {}
    found: dict[Any, Any] = block_state["_joined"]
    return found


def _version(value: Any) -> Any:
    """A tensor's, or a list's, identity and number of writes; None for inference tensors, which count none."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else (id(value), value._version)
    versions = [_version(entry) for entry in value]
    return None if None in versions else versions


class PeRFlowControlNetLoopDenoiser(PeRFlowLoopDenoiser):
    """The denoiser with a ControlNet, several of them or a ControlNet-Union: one call of it a step.

    A ControlNet-Union is called once for each image, since its attention would mix the images of a batch. A ControlNet
    whose scale is 0 at a step is not called. In `guess_mode` it sees the conditional batches only.
    """

    description = "Loop step that runs ControlNet and UNet once each on all batches of the guider and combines them."
    expected_components = declared(*PeRFlowLoopDenoiser.expected_components, controlnet_spec())
    inputs = declared(
        *PeRFlowLoopDenoiser.inputs,
        *shared_inputs("controlnet_cond", "conditioning_scale", "controlnet_keep", "guess_mode", required=True),
        *shared_inputs("control_type", "control_type_idx"),
    )

    def _residuals(
        self,
        components: Any,
        block_state: Any,
        batches: list[Any],
        i: int,
        t: Tensor,
        sample: Tensor,
        conditions: dict[str, Any],
    ) -> dict[str, Any]:
        scale = _scale_at(block_state, i)
        kinds = [batch[BaseGuidance._identifier_key] for batch in batches]
        controlled = [not (block_state.guess_mode and kind == UNCONDITIONAL) for kind in kinds]
        if not any(controlled) or not any(scale if isinstance(scale, list) else [scale]):
            return {}
        copies, latents = sum(controlled), block_state.latents
        if copies < len(batches):
            conditions = _conditions(block_state, [one for one, on in zip(batches, controlled, strict=True) if on])
        tensors = {
            "sample": sample[: copies * len(latents), : latents.shape[1]],  # a 9-channel UNet's further ones left out
            "encoder_hidden_states": conditions["encoder_hidden_states"],
            "controlnet_cond": _repeated(block_state, "controlnet_cond", block_state.controlnet_cond, copies),
            "added_cond_kwargs": {name: conditions[name] for name in ("text_embeds", "time_ids")},
        }
        settings = {"conditioning_scale": scale, "guess_mode": block_state.guess_mode}
        calls = 1
        if block_state.control_type is not None:
            tensors["control_type"] = _repeated(block_state, "control_type", block_state.control_type, copies)
            settings["control_type_idx"] = block_state.control_type_idx
            calls = len(latents)
        outputs = []
        for k in range(calls):
            rows = tree_map(lambda tensor, k=k: tensor[k::calls], tensors)
            outputs.append(components.controlnet(rows.pop("sample"), t, **rows, **settings, return_dict=False))
        down = [_spread(_interleave(parts), controlled) for parts in zip(*(down for down, _ in outputs), strict=True)]
        mid = _spread(_interleave([mid for _, mid in outputs]), controlled)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


def _scale_at(block_state: Any, i: int) -> float | list[float]:
    """The ControlNets' scale at step i: a number for one ControlNet, a list for several, or for a union's controls."""
    keep, scale = block_state.controlnet_keep[i], block_state.conditioning_scale
    if isinstance(keep, list):
        scales = scale if isinstance(scale, list) else [scale] * len(keep)
        return [float(s * k) for s, k in zip(scales, keep, strict=True)]
    return [float(s * keep) for s in scale] if isinstance(scale, list) else float(scale * keep)


def _interleave(parts: Sequence[Tensor]) -> Tensor:
    """The tensor whose rows `k`, `k + len(parts)`, ... are `parts[k]`."""
    return parts[0] if len(parts) == 1 else torch.stack(tuple(parts), dim=1).flatten(0, 1)


def _spread(rows: Tensor, controlled: Sequence[bool]) -> Tensor:
    """`rows` of the controlled batches at their places among all batches, with zeros at the others."""
    if all(controlled):
        return rows
    parts = rows.chunk(sum(controlled))
    empty = torch.zeros_like(parts[0])
    chosen = iter(parts)
    return torch.cat([next(chosen) if on else empty for on in controlled])


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
            for plane in tree_leaves(getattr(block_state, name)):
                if isinstance(plane, Tensor) and plane.ndim == 4 and tiling.scale(plane) is None:
                    raise ValueError(
                        f"{name} is {plane.shape[-1]}x{plane.shape[-2]}, no whole multiple of the latents' "
                        f"{width}x{height}; to cut it into tiles, pass {factor * width}x{factor * height} pixels."
                    )
        lengths = [[height, width], [tiling.rows.size, tiling.columns.size]]
        block_state.tile_sizes = factor * torch.tensor(lengths).to(latents.device)

    def _predict(self, components: Any, block_state: Any, batches: list[Any], i: int, t: Tensor) -> Tensor:
        tiling, predict = block_state.tiling, super()._predict
        if tiling is None:
            return predict(components, block_state, batches, i, t)
        _kept(block_state)  # made here, so that all tiles and steps share it
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
    if overlap not in allowed:
        rule = f"a multiple of {factor} from 0 to {allowed[-1]}, half of tile_size={size}"
        raise ValueError(f"tile_overlap={overlap!r} must be {rule}.")
    return size, overlap


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
