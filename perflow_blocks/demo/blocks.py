"""The embedded model as blocks: text-to-image whose weights are those of the installed package."""

from __future__ import annotations

from dataclasses import replace

from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, ConfigSpec

from ..blocks.workflows import PeRFlowSDXLText2ImageBlocks
from . import weights_directory

DELTA = "perflow_delta.safetensors"


class PeRFlowDemoBlocks(PeRFlowSDXLText2ImageBlocks):
    """Text-to-image that needs no index: components and delta are the package's own."""

    description = (
        "Draws small images of one shape in four PeRFlow steps, with the tiny SDXL inside perflow-blocks.\n"
        'Prompts are such as "a red star on a white background".'
    )

    @property
    def expected_components(self) -> list[ComponentSpec]:
        where = {"pretrained_model_name_or_path": str(weights_directory())}
        return [
            replace(spec, **where, subfolder=spec.name) if spec.default_creation_method == "from_pretrained" else spec
            for spec in super().expected_components
        ]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        delta = str(weights_directory() / DELTA)
        return [replace(spec, default=delta) if spec.name == "delta" else spec for spec in super().expected_configs]
