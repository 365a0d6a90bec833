"""The first step of the denoising: every embedding with one row for each picture."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from torch import Tensor

from .images import one_for_each_image
from .inputs import (
    DENOISER_INPUT_FIELDS,
    embeddings_inputs,
    ip_adapter_inputs,
    num_images_per_prompt_input,
)
from .specs import guider_spec


class PeRFlowInputStep(ModularPipelineBlocks):
    """Matches the embeddings of texts and IP-Adapter pictures to the pictures: those of the first prompt first.

    Stands where diffusers' input step does, which for several prompts with several pictures each puts the pooled text
    embeddings and the IP-Adapters' in another order than the rest, and writes into the caller's lists.

    Raises:
        ValueError: embeddings for another number of prompts or pictures.
    """

    model_name = "stable-diffusion-xl"

    @property
    def description(self) -> str:
        return "Repeats the embeddings of texts and IP-Adapter pictures for the pictures of each prompt."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [guider_spec()]  # unused here: the first block that names the guider decides its default

    @property
    def inputs(self) -> list[InputParam]:
        return [num_images_per_prompt_input(), *embeddings_inputs(), *ip_adapter_inputs()]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        embeddings = (
            OutputParam(param.name, param.type_hint, param.description, kwargs_type=DENOISER_INPUT_FIELDS)
            for param in (*embeddings_inputs(), *ip_adapter_inputs())
        )
        return [
            OutputParam("batch_size", int, "Number of prompts."),
            OutputParam("dtype", torch.dtype, "Type of the embeddings, and so of the latents."),
            *embeddings,
        ]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state = self.get_block_state(state)
        prompts, images = block_state.prompt_embeds.shape[0], block_state.num_images_per_prompt
        block_state.batch_size, block_state.dtype = prompts, block_state.prompt_embeds.dtype

        def match(name: str, tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None else one_for_each_image(name, tensor, prompts, images)

        for param in embeddings_inputs():
            setattr(block_state, param.name, match(param.name, getattr(block_state, param.name)))
        for param in ip_adapter_inputs():
            adapters = getattr(block_state, param.name)
            matched = adapters if adapters is None else [match(param.name, tensor) for tensor in adapters]
            setattr(block_state, param.name, matched)
        self.set_block_state(state, block_state)
        return components, state
