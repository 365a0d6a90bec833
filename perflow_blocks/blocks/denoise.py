"""The denoising loop: the guider's batches in one UNet call a step, in tiles if need be, then one linear combination.

Blocks inserted into a loop are called as `block(components, block_state, i=i, t=t)`: i is the number of the step, an
int, and t its timestep, a tensor of no dimensions on the device. On `block_state` they find

- `latents`: after the solver those of step i + 1;
- `noise_pred`: the guided prediction of the last denoiser call, None before the first;
- `window_index`: the number of the time window of step i, an int;
- `step_plan`, `step_coefficients`, `timesteps`, `num_inference_steps`: the whole schedule;
- `earlier_step`: in a plan of second order what the solver kept of the step before, None before the first;
- `guider`: this call's guider;
- `stop_requested`: set it to True, and the loop ends after this step with the clean latents that it predicts;
- the conditioning tensors, such as `prompt_embeds`.

The loop reads nothing back from the device; an `.item()` in an inserted block would be the first to do so.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import (
    BlockState,
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
    PipelineState,
)
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ..core.step_plan import EarlierStep, apply_step, second_order_step
from ..core.tiles import Tiling, cut_plane
from ..core.windows import require_positive_int
from ..delta.merge import MergeRecord, merge_records
from ..delta.model_lock import model_lock
from .declare import Assembled, declared
from .finite_guard import FiniteGuardStep
from .guiders import forget_step, guider_of_call, is_batchable, warn_about_few_steps
from .inputs import DENOISER_INPUT_FIELDS, guided_inputs, param, shared_inputs
from .loop_block import LOOP_PROVIDES, LoopBlock, Repeat
from .specs import guider_spec, unet_spec, vae_spec

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
        *guided_inputs("prompt_embeds"),
        *guided_inputs("pooled_prompt_embeds", "add_time_ids", "ip_adapter_embeds", required=False),
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
        conditions = joined_conditions(block_state, batches)
        residuals = self._residuals(components, block_state, batches, i, t, sample, conditions)
        return components.unet(
            sample,
            t,
            encoder_hidden_states=conditions.pop("encoder_hidden_states"),
            timestep_cond=repeated(block_state, "timestep_cond", block_state.timestep_cond, copies),
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


def joined_conditions(block_state: Any, batches: list[Any]) -> dict[str, Any]:
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


def repeated(block_state: Any, name: str, value: Any, copies: int) -> Any:
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


_LATENTS = OutputParam("latents", Tensor, "Latents (batch, channels, height/f, width/f) after this step.")


class PeRFlowLoopSolverStep(ModularPipelineBlocks):
    """One step along the window's straight line: `latents = A[i] latents + B[i] noise_pred`.

    In a plan of second order, a step that goes on from the latents of the step before adds a correction by that step.
    """

    model_name = "stable-diffusion-xl"
    description = "Loop step that moves the latents to the next time: one multiply-add with the step's coefficients."
    inputs = declared(
        *shared_inputs("latents", "noise_pred", "step_coefficients", required=True),
        *shared_inputs("step_plan", "earlier_step"),
    )
    intermediate_outputs = declared(
        _LATENTS, OutputParam("earlier_step", EarlierStep, "What a step of second order builds on, else None.")
    )

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        a, b, _, _ = block_state.step_coefficients[i].unbind()
        latents, noise_pred, plan = block_state.latents, block_state.noise_pred, block_state.step_plan
        if plan is None or not any(plan.step_ratio):
            block_state.latents = apply_step(latents, noise_pred, a, b)
        else:
            ratio = plan.step_ratio[i]
            step = second_order_step(latents, noise_pred, a, b, ratio, block_state.earlier_step if ratio else None)
            block_state.latents, block_state.earlier_step = step
        return components, block_state


class PeRFlowLoopKeepKnownStep(LoopBlock):
    """Outside the mask the latents become the known image, noised to the end of the step; at t = 0 the image itself.

    A UNet that sees mask and image through its own 9 channels needs this at the last step only.
    """

    description = "Loop step for inpainting: outside the mask the latents become the known image, noised on the path."
    inputs = declared(
        *shared_inputs("latents", "image_latents", "mask", "noise", "noise_coefficients", required=True),
        *shared_inputs("inpaint_conditioning"),
    )
    intermediate_outputs = declared(_LATENTS)

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        table = block_state.noise_coefficients
        if block_state.inpaint_conditioning is None or i + 2 == table.shape[0]:
            signal, sigma = table[i + 1].unbind()
            known = apply_step(block_state.image_latents, block_state.noise, signal, sigma)
            block_state.latents = torch.lerp(known, block_state.latents, block_state.mask)
        return components, block_state

    def finish(self, components: Any, block_state: Any, repeat: Repeat) -> None:
        """A run that was stopped ends with predicted clean latents, so its known part is the clean image."""
        if block_state.stop_requested:
            block_state.latents = torch.lerp(block_state.image_latents, block_state.latents, block_state.mask)


class PeRFlowDenoiseStep(Assembled, LoopSequentialPipelineBlocks):
    """The loop over the steps of a plan. For another loop, set two other lists or insert a block into `sub_blocks`."""

    model_name = "stable-diffusion-xl"
    block_classes = [FiniteGuardStep, PeRFlowLoopDenoiser, PeRFlowLoopSolverStep]
    block_names = ["finite_guard", "denoiser", "solver"]
    loop_expected_components = declared(guider_spec(), unet_spec())
    loop_inputs = declared(
        *shared_inputs("latents", "timesteps", "num_inference_steps", "step_plan", "step_coefficients", required=True),
        *shared_inputs("guider", "merged_deltas", "cross_attention_kwargs", "callback_on_step_end"),
    )
    loop_intermediate_outputs = declared(
        _LATENTS,
        OutputParam("stop_requested", bool, "Whether a block in the loop ended the run before its last step."),
    )

    @property
    def description(self) -> str:
        names = ", ".join(f"`{name}`" for name in self.sub_blocks)
        return (
            f"Denoises the latents: for each step of the plan the blocks {names}, and those you insert between them."
        )

    @property
    def required_inputs(self) -> list[str]:
        return [name for name in super().required_inputs if name not in LOOP_PROVIDES]

    def _get_inputs(self) -> list[InputParam]:
        return [entry for entry in super()._get_inputs() if entry.name not in LOOP_PROVIDES]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state = self.get_block_state(state)
        guider, lock = guider_of_call(components, block_state), model_lock(components.unet)
        warn_about_few_steps(guider, len(block_state.step_plan))
        alone = not is_batchable(guider) or "scale" in (block_state.cross_attention_kwargs or {})
        with lock.changing() if alone else lock.running():
            _require_same_deltas(components.unet, block_state.merged_deltas)
            self._run_all(components, block_state)
        forget_step(guider)  # a stage may go on from this state
        self.set_block_state(state, block_state)
        return components, state

    def _run_all(self, components: Any, block_state: Any) -> None:
        """Runs all steps, with what blocks of the loop do before the first and after the last."""
        block_state.noise_pred, block_state.earlier_step, block_state.stop_requested = None, None, False
        observers = [block for block in self.sub_blocks.values() if isinstance(block, LoopBlock)]
        for block in observers:
            block.start(components, block_state)
        stop = self._run(components, block_state, 0, len(block_state.step_plan))
        for block in observers:
            block.finish(components, block_state, lambda first: self._run(components, block_state, first, stop))

    def _run(self, components: Any, block_state: Any, first: int, stop: int) -> int:
        """Runs the steps from `first` to `stop - 1`, or until a block asks to stop. Returns the next step's number."""
        window_index, timesteps = block_state.step_plan.window_index, block_state.timesteps.unbind()
        block_state.stop_requested = False
        with self.progress_bar(total=stop - first) as progress_bar:
            for i in range(first, stop):
                block_state.window_index = window_index[i]
                self.loop_step(components, block_state, i=i, t=timesteps[i])
                if block_state.callback_on_step_end is not None:
                    given = {"latents": block_state.latents}
                    returned = block_state.callback_on_step_end(components, i, timesteps[i], given)
                    block_state.latents = (returned or given).get("latents", block_state.latents)
                progress_bar.update()
                if block_state.stop_requested:
                    break
        block_state.stop_requested = i + 1 < len(window_index)  # a request at the last step ends nothing early
        if block_state.stop_requested:
            block_state.latents = _predicted_clean(block_state, i)
        return i + 1


class PeRFlowInpaintDenoiseStep(PeRFlowDenoiseStep):
    """The loop that keeps the known part of an image."""

    block_classes = [*PeRFlowDenoiseStep.block_classes, PeRFlowLoopKeepKnownStep]
    block_names = [*PeRFlowDenoiseStep.block_names, "keep_known"]


def _predicted_clean(block_state: Any, i: int) -> Tensor:
    """The clean latents that step i predicts, from the latents after it: its start is (latents - B noise_pred) / A."""
    a, b, c, d = block_state.step_coefficients[i].unbind()
    latents, earlier = block_state.latents, block_state.earlier_step
    if earlier is not None and earlier.correction is not None:
        latents = latents - earlier.correction
    start = apply_step(latents, block_state.noise_pred, 1.0 / a, -b / a).to(block_state.latents.dtype)
    return apply_step(start, block_state.noise_pred, c, d)


def _require_same_deltas(unet: Any, merged: tuple[MergeRecord, ...] | None) -> None:
    """Refuses weights that another thread changed since this call looked at them. The lock is held."""
    lock = model_lock(unet)
    if merged is not None and lock.changed_by not in (None, threading.get_ident()) and merge_records(unet) != merged:
        raise ValueError(
            "another thread changed the deltas of this UNet during the call; use one delta and delta_scale in all "
            "threads, or give each thread a pipeline with a UNet of its own."
        )


class PeRFlowTiledLoopDenoiser(PeRFlowLoopDenoiser, LoopBlock):
    """The denoiser for images larger than the UNet was made for: one UNet call a step for each of the tiles.

    At each step the raw predictions of overlapping tiles are blended into one for the whole image, which the guider
    combines (MultiDiffusion, arXiv 2302.08113). The solver's step is linear in the prediction, so no seams appear.

    Tensors with four dimensions are cut with the latents: control images, the conditioning of a 9-channel UNet, masks
    of IP-Adapters. Prompts and IP-Adapter images are the same for each tile. Where SDXL's size conditioning names the
    image's size, a tile is told its own; the crop offset stays, since SDXL was not trained with large ones.

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
            parts = tree_map_only(Tensor, lambda one: tiling.cut(one, top, left) if one.ndim == 4 else one, whole)
            return predict(components, BlockState(**{**block_state.as_dict(), **parts}), told, i, t)

        return tiling.blend(predict_tile)

    def _spatial_names(self) -> list[str]:
        """The inputs that may hold planes to cut: all but those that the guider splits, which have no place."""
        return [entry.name for entry in self.inputs if entry.kwargs_type != DENOISER_INPUT_FIELDS]


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


def _as_image_of_its_own(batch: Any, image: Tensor, tile: Tensor) -> Any:
    """The guider's batch with the tile's size where its time ids name the image's, as their type rounds it.

    The ids are (batch, 6), original size, crop and target size; a refiner has a score in place of the target size.
    """
    if batch.time_ids is None:  # the parent says what is missing
        return batch
    original, crop, target = batch.time_ids.split(2, dim=1)
    sizes = [
        torch.where((rows == image).all(dim=1, keepdim=True), tile, rows) if rows.shape[1] == 2 else rows
        for rows in (original, target)
    ]
    return BlockState(**{**batch.as_dict(), "time_ids": torch.cat([sizes[0], crop, sizes[1]], dim=1)})
