"""The accelerator as a file: adds dW to the UNet before anything runs, and applies the recipe that came with it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import ClassifierFreeGuidance
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, ConfigSpec, InputParam, OutputParam
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..delta.files import Weights
from ..delta.merge import find_merged, is_merged, merge_delta, read_recipe, unmerge_delta
from ..delta.recipe import DeltaRecipe, require_guidance
from ..delta.record import merge_record, merge_records
from ..delta.weight_layouts import open_weights
from .origin import loaded_commit, loaded_weights
from .specs import DEFAULT_GUIDANCE_SCALE, delta_config_specs, guider_spec, unet_spec

RECIPE_SCALE_ATTRIBUTE = "_perflow_recipe_scale"
"""On the default guider: the scale that this block gave it, to tell it from one that a user set."""


class PeRFlowMergeDeltaStep(ModularPipelineBlocks):
    """Merges a delta file into the UNet and takes over the guidance scale that configuration or delta recommend.

    Which file: the argument `delta`, else the configuration's `delta`, else none. `delta=False` asks for a run without
    one, to compare with the base model say, and takes out what is merged, bit for bit. At which scale: the argument
    `delta_scale`, else the configuration's. Repeated calls with the same file and scale change nothing.

    Raises:
        ValueError: the file is missing, broken or of another architecture, another one is merged already, or the
            scale is no finite number.
    """

    model_name = "stable-diffusion-xl"

    @property
    def description(self) -> str:
        return (
            "Adds the delta weights to the UNet, if a file is named, and gives the default guider the guidance scale "
            "they were distilled for. A guider that you set is left alone."
        )

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [guider_spec(), unet_spec()]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return delta_config_specs()

    @property
    def inputs(self) -> list[InputParam]:
        return [
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
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("delta_recipe", DeltaRecipe, "How the merged delta was distilled; None without a delta."),
        ]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state = self.get_block_state(state)
        if components.config.guidance_scale is not None:
            require_guidance(components.config.guidance_scale)
        if block_state.delta is False:
            if merge_records(components.unet):
                unmerge_delta(components.unet)
        else:
            given = block_state.delta_scale
            scale = components.config.delta_scale if given is None else given
            require_delta_scale(scale)
            path = delta_path(block_state.delta, components)
            if path is not None and not (block_state.delta is None and _was_saved_with(components.unet, path, scale)):
                variant = components.config.delta_variant if block_state.delta is None else None
                _merge(components.unet, open_weights(path, variant), scale)
        record = merge_record(components.unet)
        block_state.delta_recipe = None if record is None else record.recipe
        _set_guidance(components.guider, components.config.guidance_scale, block_state.delta_recipe)
        self.set_block_state(state, block_state)
        return components, state


def require_delta_scale(value: object) -> None:
    """Raises the ValueError for a factor of a delta that is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"delta_scale={value!r} is no finite number; pass 1.0 for the delta as it was distilled.")


def require_no_rival(unet: Any, weights: Weights) -> None:
    """Raises the ValueError where another delta is merged and both say how to sample: there can be one at a time."""
    other = merge_record(unet)
    if other is not None and DeltaRecipe() not in (other.recipe, read_recipe(weights)):
        if find_merged(unet, weights) is None:
            raise ValueError(
                f"{other.source} is merged into the UNet already, at scale {other.scale:g}; call unmerge_delta(unet), "
                f"or pass it with delta_scale=0.0, before merging {weights.label}."
            )


def _was_saved_with(unet: Any, path: Path, scale: float) -> bool:
    """Whether a delta is missing where the index names it because it is in the UNet, which was saved beside the index.

    Saving a pipeline writes its weights as they are and its configuration, but no delta.
    """
    if path.exists():
        return False
    return any(r.reloaded and (r.source, r.scale) == (path.name, scale) for r in merge_records(unet))


def _merge(unet: Any, weights: Weights, scale: float) -> None:
    if not is_merged(unet, weights, scale):
        require_no_rival(unet, weights)
        merge_delta(unet, weights, scale, base=loaded_weights(unet))


def require_configured_delta(value: object) -> None:
    """Raises the ValueError for a configuration's `delta` that names no file; False is for a call."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"the configuration's delta={value!r} is no path; pass that of a delta, or None for none.")


def delta_path(given: Any, components: Any) -> Path | None:
    """The file to merge: the caller's, as any path, or the index's, beside the index and at its commit."""
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, (str, os.PathLike)):
            raise ValueError(f"delta={given!r} is no path; pass a .safetensors file, or False for none.")
        return Path(given).expanduser()
    named = components.config.delta
    if named is None:
        return None
    require_configured_delta(named)
    if Path(named).is_absolute():
        return Path(named)
    origin = components._pretrained_model_name_or_path
    if origin is None:
        raise ValueError(
            f"the configuration names delta={named!r}, but this pipeline was not loaded from a directory; "
            "pass delta= with a path."
        )
    if Path(origin).is_dir():
        return Path(origin) / named
    return _download(str(origin), named, loaded_commit(components, str(origin)))


def _download(repository: str, name: str, revision: str | None) -> Path:
    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"cannot fetch delta {name!r} from {repository} ({type(error).__name__}); pass delta= with a local path."
        ) from error


def guidance_in_effect(guider: Any, configured: float | None, recipe: DeltaRecipe | None) -> float:
    """The scale a call will run with: of a guider that a user made or changed its own, else what is recommended.

    That is the configuration's scale, or the delta's, or 2.0. Guiders without a scale count as 1. None is the
    pipeline's own that is not made yet.
    """
    if guider is not None and not is_default_guider(guider):
        return float(vars(guider).get("guidance_scale", 1.0))
    recommended = configured
    if recommended is None and recipe is not None:
        recommended = recipe.guidance_scale
    return float(DEFAULT_GUIDANCE_SCALE if recommended is None else recommended)


def _set_guidance(guider: Any, configured: float | None, recipe: DeltaRecipe | None) -> None:
    """Gives the pipeline's own guider the recommended scale; one that a user made or changed is left alone."""
    if is_default_guider(guider):
        guider.guidance_scale = guidance_in_effect(guider, configured, recipe)
        setattr(guider, RECIPE_SCALE_ATTRIBUTE, guider.guidance_scale)


def is_default_guider(guider: Any) -> bool:
    """Whether this is the guider that the pipeline made from `guider_spec`, unchanged by anyone but this block."""
    kind, state = type(guider), vars(guider)
    return (
        kind is ClassifierFreeGuidance
        and state.get("_diffusers_load_id") == "null"  # what ComponentSpec.create leaves on a component
        and guider.guidance_scale == state.get(RECIPE_SCALE_ATTRIBUTE, DEFAULT_GUIDANCE_SCALE)
    )
