"""The accelerator as a file: adds dW to the UNet before anything runs, and applies the recipe that came with it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from diffusers import ClassifierFreeGuidance
from diffusers.guiders import BaseGuidance
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam
from diffusers.utils import logging
from huggingface_hub import hf_hub_download

from ..delta.apply import require_architecture
from ..delta.files import DIGEST_KEY, Weights, identity_of, leads_out, open_weights, read_recipe
from ..delta.merge import (
    NO_RECIPE,
    MergeRecord,
    find_merged,
    merge_delta,
    merge_records,
    recipe_record,
    require_factor,
    rescale_delta,
    unmerge_delta,
)
from ..delta.model_lock import model_lock
from ..delta.recipe import DeltaRecipe, require_guidance
from .declare import declared
from .guiders import guider_of_call, set_guidance
from .inputs import shared_inputs
from .specs import (
    DEFAULT_GUIDANCE_SCALE,
    SDXL,
    delta_config_specs,
    guider_spec,
    scheduler_spec,
    unet_spec,
    usual_recipe,
)

logger = logging.get_logger(__name__)

RECIPE_SCALE_ATTRIBUTE = "_perflow_recipe_scale"
"""On the default guider: the scale that this block gave it, to tell it from one that a user set."""


class PeRFlowMergeDeltaStep(ModularPipelineBlocks):
    """Merges a delta file into the UNet and takes over the guidance scale that configuration or delta recommend.

    Which file: the argument `delta`, else the configuration's `delta`, else none. It takes the place of a merged one
    if both have a recipe. `delta=False` asks for a run without one, for example to compare with the base model, and
    takes out what is merged. At which scale: the argument `delta_scale`, else the configuration's. Repeated calls with
    the same file and scale change nothing.

    Raises:
        ValueError: the file is missing, broken or of another architecture, or the scale is not a finite number.
    """

    model_name = "stable-diffusion-xl"
    description = (
        "Adds the delta weights to the UNet, if a file is named, and gives the default guider the guidance scale "
        "they were distilled for. A guider that you set is left alone."
    )
    expected_components = declared(guider_spec(), unet_spec(), scheduler_spec())  # which tell what is usual
    expected_configs = declared(*delta_config_specs())
    inputs = declared(
        InputParam(
            "delta",
            type_hint=str | Path | bool,
            description="Path of a delta (file or folder), or False for none. None: the configuration's.",
        ),
        InputParam(
            "delta_scale",
            type_hint=float,
            description="Factor of the delta; 0 takes a merged one out again. None: the configuration's.",
        ),
        *shared_inputs("guidance_scale", "guider"),
    )
    intermediate_outputs = declared(
        OutputParam("delta_recipe", DeltaRecipe, "How the merged delta was distilled; None without a delta."),
        OutputParam("merged_deltas", tuple[MergeRecord, ...], "The deltas in the UNet's weights, for this call."),
        OutputParam("guider", BaseGuidance, "This call's guider, with the scale that the delta recommends."),
    )

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state = self.get_block_state(state)
        config, unet = components.config, components.unet
        configured = config.get("guidance_scale")
        if configured is not None:
            require_guidance(configured)
        path = None if block_state.delta is False else delta_path(block_state.delta, components)
        scale = config.delta_scale if path and block_state.delta_scale is None else block_state.delta_scale
        if scale is not None:
            require_factor("delta_scale", scale)
        variant = config.delta_variant if block_state.delta is None else None
        lock = model_lock(unet)
        with lock:
            merged = _as_asked(unet, block_state.delta, path, scale, variant)
        if merged is None:
            with lock.changing(), lock:  # of threads that share the pipeline, the first one merges
                merged = _as_asked(unet, block_state.delta, path, scale, variant)
                if merged is None:
                    _change(components, block_state.delta, path, scale, variant)
                    merged = merge_records(unet)
        for one in merged:
            _require_no_lora_of(unet, one.digest, one.source)
        block_state.merged_deltas, record = merged, recipe_record(merged)
        with lock:
            recipe = block_state.delta_recipe = None if record is None else record.recipe
            guider = block_state.guider = guider_of_call(components, block_state)
            shared = components.components.get("guider")  # none where the blocks have no use for it
            if shared is not None and is_default_guider(shared):
                shared.guidance_scale = guidance_in_effect(shared, configured, recipe, usual_recipe(components))
                setattr(shared, RECIPE_SCALE_ATTRIBUTE, shared.guidance_scale)
                if block_state.guidance_scale is None:
                    set_guidance(guider, shared.guidance_scale)
        self.set_block_state(state, block_state)
        return components, state


def _as_asked(
    unet: Any, delta: Any, path: Path | None, scale: Any, variant: str | None
) -> tuple[MergeRecord, ...] | None:
    """What is merged into the UNet, if it is what the call asks for; else None."""
    records = merge_records(unet)
    if delta is False:
        return None if records else records
    if path is None:  # neither the call nor the configuration names one
        record = recipe_record(records)
        return records if record is None or scale in (None, record.scale) else None
    if delta is None and not path.exists():  # of a UNet that was saved with it merged
        if any(record.reloaded and (record.source, record.scale) == (path.name, scale) for record in records):
            return records
    known = find_merged(unet, path, variant)
    return merge_records(unet) if known is not None and (known.scale, known.scales) == (scale, ()) else None


def _change(components: Any, delta: Any, path: Path | None, scale: Any, variant: str | None) -> None:
    """Merges or rescales a delta, or takes out what is merged, once `_as_asked` has told that it is not as asked."""
    unet = components.unet
    if path is None and delta is None:
        record = recipe_record(merge_records(unet))
        rescale_delta(unet, scale, record)
        return
    if path is None:
        _take_out_saved(components)
        if merge_records(unet):
            unmerge_delta(unet)
        return
    weights, replaced = open_weights(path, variant), tuple[MergeRecord, ...]()
    known = find_merged(unet, weights)
    if takes_place(unet, weights):
        require_architecture(weights, unet)
        _take_out_saved(components)
        replaced = tuple(record for record in merge_records(unet) if record.recipe != NO_RECIPE)
    if replaced and delta is None:  # by hand, or by an earlier call, another one was merged
        logger.warning(
            f"{weights.label}, which the configuration names, takes the place of {replaced[0].source} in the UNet; to "
            "keep another delta pass delta= in each call, or call pipe.update_components(delta=None)."
        )
    if scale and hasattr(unet, "peft_config"):
        _require_no_lora_of(unet, identity_of(weights), weights.label)
    if known is not None and known.reloaded:
        rescale_delta(unet, scale, weights, exact=False)
        _warn_of_rounding(known)
    else:
        merge_delta(unet, weights, scale, replaced=replaced)


def takes_place(unet: Any, weights: Weights) -> bool:
    """Whether a delta is to take the place of what is merged: each says how to sample, and they are not the same."""
    says = any(record.recipe != NO_RECIPE for record in merge_records(unet))
    return says and read_recipe(weights) != NO_RECIPE and find_merged(unet, weights) is None


def _take_out_saved(components: Any) -> None:
    """Takes out the delta that the UNet was saved with, by its copy: the configuration's, or in the directory."""
    unet, origin = components.unet, components._pretrained_model_name_or_path
    saved = next((record for record in merge_records(unet) if record.reloaded), None)
    if saved is None:
        return
    copies = [(delta_path(None, components), components.config.delta_variant)]
    copies += [(Path(str(origin), "delta", saved.source), None)] if origin is not None else []
    for place, variant in copies:
        if place is not None and place.exists() and find_merged(unet, place, variant) is not None:
            unmerge_delta(unet, open_weights(place, variant), exact=False)
            _warn_of_rounding(saved)
            return


def _warn_of_rounding(record: MergeRecord) -> None:
    logger.warning(
        f"The UNet was loaded with {record.source} in its weights at scale {record.scale:g}: the difference was added "
        "to them, exact to one rounding. For exact weights load the base and pass the delta."
    )


def _require_no_lora_of(unet: Any, digest: str, label: str) -> None:
    """Raises ValueError where a LoRA that was made from this delta is loaded: the delta would be applied twice."""
    loras = {vars(config).get(DIGEST_KEY): name for name, config in getattr(unet, "peft_config", {}).items()}
    name = loras.get(digest) if digest else None
    if name is not None:
        raise ValueError(
            f"the LoRA {name!r} was made from {label}, which would be in the weights too; pass delta=False, or the "
            f"LoRA's residual as delta=, or call pipe.delete_adapters({name!r})."
        )


def delta_path(given: Any, components: Any) -> Path | None:
    """The file to merge: the caller's, or the index's, which lies beside the index at the UNet's revision."""
    if given is not None:
        if not isinstance(given, (str, os.PathLike)):
            shown = given if isinstance(given, bool) else f"a {type(given).__name__}"
            raise ValueError(f"delta={shown} must be the path of a delta, or False for none; see save_delta.")
        return Path(given).expanduser()
    named, origin = components.config.delta, components._pretrained_model_name_or_path
    if named is None:
        return None
    if not isinstance(named, str) or not named:
        raise ValueError(f"the configuration's delta={named!r} must be the path of a delta, or None for none.")
    if Path(named).is_absolute():
        return Path(named)
    if leads_out(named):
        raise ValueError(f"the configuration's delta={named!r} must be in the pipeline's directory; pass delta=.")
    if origin is None:
        raise ValueError(
            f"the configuration names delta={named!r}, but this pipeline was not loaded from a directory; "
            "pass delta= with a path."
        )
    if Path(origin).is_dir():
        return Path(origin) / named
    unet = components._component_specs["unet"]
    revision = unet.revision if unet.pretrained_model_name_or_path == origin else None
    return Path(hf_hub_download(str(origin), named, revision=revision))


def guidance_in_effect(
    guider: Any, configured: float | None, recipe: DeltaRecipe | None, usual: DeltaRecipe = SDXL
) -> float:
    """The scale a call will run with: of a guider that a user made or changed its own, else what is recommended.

    That is the configuration's scale, or the delta's, or the model's usual one. Guiders without a scale count as 1.
    None is the pipeline's own that is not made yet.
    """
    if guider is not None and not is_default_guider(guider):
        return float(vars(guider).get("guidance_scale", 1.0))
    scales = (configured, None if recipe is None else recipe.guidance_scale, usual.guidance_scale)
    return float(next(scale for scale in scales if scale is not None))


def is_default_guider(guider: Any) -> bool:
    """Whether this is the guider that the pipeline made from `guider_spec`, unchanged by anyone but this block."""
    kind, state = type(guider), vars(guider)
    return (
        kind is ClassifierFreeGuidance
        and state.get("_diffusers_load_id") == "null"  # what ComponentSpec.create leaves on a component
        and guider.guidance_scale == state.get(RECIPE_SCALE_ATTRIBUTE, DEFAULT_GUIDANCE_SCALE)
    )
