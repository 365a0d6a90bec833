"""Encoding texts and IP-Adapter images: diffusers' own blocks with this call's guider, and a cache of embeddings."""

from __future__ import annotations

import copy
import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import AutoPipelineBlocks, ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ConfigSpec
from diffusers.modular_pipelines.stable_diffusion_xl.encoders import (
    StableDiffusionXLIPAdapterStep,
    StableDiffusionXLTextEncoderStep,
)
from torch import Tensor, nn

from ..core.windows import require_positive_int
from ..delta.model_lock import model_lock
from .declare import Assembled, declared
from .guiders import guider_of_call
from .inputs import as_outputs, guided_inputs, shared_input
from .specs import guider_spec

TEXT_MODELS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

DEFAULT_MAX_ENTRIES = 64
"""About 41 MB of SDXL's embeddings in half precision with guidance."""

Embeddings = dict[str, Tensor | None]

_EMBEDDINGS = guided_inputs("prompt_embeds", "pooled_prompt_embeds")


class PeRFlowTextEncoderStep(StableDiffusionXLTextEncoderStep):
    """diffusers' text encoder with this call's guider. One thread at a time uses tokenizers and encoders.

    A tokenizer keeps padding and truncation on itself, and an encoder the scale of its LoRAs.
    """

    expected_components = declared(
        guider_spec(),
        *(spec for spec in StableDiffusionXLTextEncoderStep().expected_components if spec.name != "guider"),
    )
    inputs = declared(*StableDiffusionXLTextEncoderStep().inputs, shared_input("guider"))

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        with model_lock(components.text_encoder_2):  # SDXL's refiner has no other
            super().__call__(_with_guider(components, self.get_block_state(state)), state)
        return components, state


def _with_guider(components: Any, block_state: Any) -> Any:
    """What a stock block, which reads the component, takes for the pipeline: the same with this call's guider."""
    view = copy.copy(components)
    view.guider = guider_of_call(components, block_state)
    return view


class PeRFlowEmbeddingsStep(ModularPipelineBlocks):
    """Takes text embeddings that were made before, in place of a prompt.

    Where the guider wants negative ones and none are given, they are zeros, as for an empty negative prompt of SDXL
    (`force_zeros_for_empty_prompt`).

    Raises:
        ValueError: negative embeddings are missing and the model does not take zeros for them.
    """

    model_name = "stable-diffusion-xl"
    description = "Takes text embeddings in place of a prompt, with zeros for negative ones that are not given."
    expected_components = declared(guider_spec())
    expected_configs = declared(
        ConfigSpec("force_zeros_for_empty_prompt", True, "Whether an empty negative prompt is all zeros.")
    )
    inputs = declared(*_EMBEDDINGS, shared_input("guider"))
    intermediate_outputs = declared(*as_outputs(_EMBEDDINGS))

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state = self.get_block_state(state)
        device, guider = components._execution_device, guider_of_call(components, block_state)
        for name in ("prompt_embeds", "pooled_prompt_embeds"):
            given = getattr(block_state, name).to(device)
            negative = getattr(block_state, f"negative_{name}")
            if negative is None and guider.num_conditions > 1:
                if not components.config.force_zeros_for_empty_prompt:
                    raise ValueError(f"negative_{name} is missing; pass it beside {name}, or a guider of scale 1.")
                negative = torch.zeros_like(given)
            setattr(block_state, name, given)
            setattr(block_state, f"negative_{name}", None if negative is None else negative.to(device))
        self.set_block_state(state, block_state)
        return components, state


class PeRFlowAutoTextEncoderStep(Assembled, AutoPipelineBlocks):
    """Encodes `prompt`, or takes `prompt_embeds`."""

    block_classes = [PeRFlowTextEncoderStep, PeRFlowEmbeddingsStep]
    block_names = ["prompt", "embeddings"]
    block_trigger_inputs = ["prompt", "prompt_embeds"]
    description = "Encodes the prompt where one is given, else takes the text embeddings that are."


class PeRFlowIPAdapterStep(StableDiffusionXLIPAdapterStep):
    """diffusers' IP-Adapter step with this call's guider.

    Without guidance the stock step fails because the negative embeddings are missing.
    """

    inputs = declared(*StableDiffusionXLIPAdapterStep().inputs, shared_input("guider"))
    intermediate_outputs = declared(*as_outputs(guided_inputs("ip_adapter_embeds")))

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        super().__call__(_with_guider(components, self.get_block_state(state)), state)
        return components, state

    def set_block_state(self, state: PipelineState, block_state: Any) -> None:
        if "negative_ip_adapter_embeds" not in block_state.as_dict():
            block_state.negative_ip_adapter_embeds = None
        super().set_block_state(state, block_state)


class PeRFlowAutoIPAdapterStep(Assembled, AutoPipelineBlocks):
    """Encodes the images for IP-Adapters where there are some."""

    block_classes = [PeRFlowIPAdapterStep]
    block_names = ["ip_adapter"]
    block_trigger_inputs = ["ip_adapter_image"]
    description = "Encodes `ip_adapter_image` where it is given, for the IP-Adapters that are loaded; else is skipped."


class CachesPrompts:
    """Mixed in before a text encoder block: the same prompts with the same encoders are encoded once."""

    def __init__(self, max_entries: int = DEFAULT_MAX_ENTRIES) -> None:
        super().__init__()
        self.max_entries = require_positive_int("max_entries", max_entries)
        self._lock = threading.Lock()
        self.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def clear(self) -> None:
        """Forgets all embeddings and counts from zero."""
        self.cache: OrderedDict[Hashable, Embeddings] = OrderedDict()
        self.hits = self.misses = 0

    @torch.no_grad()
    def __call__(self: Any, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state = self.get_block_state(state)
        models = {name: getattr(components, name) for name in TEXT_MODELS if name in self.component_names}
        if block_state.prompt is None or any(getattr(model, "peft_config", None) for model in models.values()):
            return self._encode(components, state)
        request = self._request(components, block_state, models)
        with self._lock:
            found = self.cache.get(request)
            self.hits, self.misses = self.hits + (found is not None), self.misses + (found is None)
            if found is not None:
                self.cache.move_to_end(request)
        if found is None:
            self._encode(components, state)
            with self._lock:
                self.cache[request] = _copies({name: state.get(name) for name in self.intermediate_output_names})
                while len(self.cache) > self.max_entries:
                    self.cache.popitem(last=False)
            return components, state
        for name, embeddings in _copies(found).items():
            setattr(block_state, name, embeddings)
        self.set_block_state(state, block_state)
        return components, state

    def _encode(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        return super().__call__(components, state)  # type: ignore[misc]

    def _request(self, components: Any, block_state: Any, models: dict[str, Any]) -> Hashable:
        """All that the embeddings depend on."""
        names = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "clip_skip")
        device = components._execution_device
        return (
            repr([block_state[name] for name in names]),
            tuple(map(_identity, models.values())),
            guider_of_call(components, block_state).num_conditions > 1,
            components.config.get("force_zeros_for_empty_prompt"),
            device,
            torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        )


class PromptCacheStep(CachesPrompts, PeRFlowTextEncoderStep):
    """Takes the place of the text encoder block; the same prompts with the same encoders are encoded once.

    Prompt and negative prompt are one request. Calls with `prompt_embeds`, or with LoRAs in the text encoders, do not
    use the cache. Embeddings are kept by the request, the encoders with their types, and the tokenizers. Call
    `clear()` after changing an encoder in place, such as writing into its weights.

    The entries lie on the encoders' device: 0.32 MB for one prompt of SDXL in half precision, twice that with
    guidance. `hits` and `misses` count the calls. Threads may share the block, and a deep copy is the same block:
    `init_pipeline` and `pipe.blocks` copy blocks, and what a user holds must be what the pipeline uses.

    Example:
        >>> cache = PromptCacheStep()
        >>> blocks = PeRFlowSDXLAutoBlocks()
        >>> blocks.sub_blocks["text_encoder"] = cache
        >>> pipe = blocks.init_pipeline("stabilityai/stable-diffusion-xl-base-1.0")

    Args:
        max_entries: how many requests to keep, a positive integer; the one that was not used for longest goes first.
    """

    description = f"{PeRFlowAutoTextEncoderStep.description} The same prompts with the same encoders are encoded once."
    inputs = declared(*PeRFlowAutoTextEncoderStep().inputs)

    def _encode(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block: Any = PeRFlowEmbeddingsStep().__call__ if state.get("prompt") is None else super()._encode
        return block(components, state)


def _copies(embeddings: Embeddings) -> Embeddings:
    return {name: None if tensor is None else tensor.clone() for name, tensor in embeddings.items()}


def _identity(part: Any) -> Hashable:
    """An encoder and its type, or a tokenizer and the tokens that textual inversion added; held weakly."""
    if part is None:
        return None
    is_model = isinstance(part, nn.Module)
    return weakref.ref(part), next(part.parameters()).dtype if is_model else tuple(part.added_tokens_encoder)
