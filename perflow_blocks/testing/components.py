"""A pipeline for one block: what it declares and nothing else, at tiny size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffusers import AutoencoderKL, ControlNetModel, ControlNetUnionModel, SchedulerMixin, UNet2DConditionModel
from diffusers.modular_pipelines.modular_pipeline import ModularPipeline, ModularPipelineBlocks
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from .tiny import (
    BETAS,
    tiny_controlnet,
    tiny_controlnet_union,
    tiny_feature_extractor,
    tiny_image_encoder,
    tiny_sdxl_components,
    tiny_sdxl_unet,
    tiny_tokenizer,
    tiny_vae,
)

TINY: dict[type, Callable[[], Any]] = {
    AutoencoderKL: tiny_vae,
    CLIPImageProcessor: tiny_feature_extractor,
    CLIPTextModel: lambda: tiny_sdxl_components()["text_encoder"],
    CLIPTextModelWithProjection: lambda: tiny_sdxl_components()["text_encoder_2"],
    CLIPTokenizer: tiny_tokenizer,
    CLIPVisionModelWithProjection: tiny_image_encoder,
    ControlNetModel: tiny_controlnet,
    ControlNetUnionModel: tiny_controlnet_union,
    UNet2DConditionModel: tiny_sdxl_unet,
}
"""What stands for a component of each type. To make another type known, add it here."""


def make_pipeline(block: ModularPipelineBlocks, given: Mapping[str, Any]) -> ModularPipeline:
    """The block's own pipeline with all its components; `given` wins, also over configuration values.

    Raises:
        ValueError: a component that is neither given, nor known, nor made from its configuration.
    """
    pipe = block.init_pipeline()
    components = {}
    for name in pipe.components:
        kind = pipe.get_component_spec(name).type_hint
        if name in given:
            components[name] = given[name]
        elif kind in TINY:
            components[name] = TINY[kind]()
        elif isinstance(kind, type) and issubclass(kind, SchedulerMixin):
            components[name] = kind(**BETAS)
        elif getattr(pipe, name) is None:
            raise ValueError(
                f"{type(block).__name__} needs the component {name!r}, for which there is no tiny one; "
                f'pass components={{"{name}": ...}}.'
            )
    pipe.register_components(**components)
    declared = {spec.name for spec in block.expected_configs}
    pipe.update_components(**{name: value for name, value in given.items() if name in declared})
    return pipe
