"""The text encoder block that remembers: the same prompts with the same encoders are encoded once."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any

import torch
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.modular_pipelines.modular_pipeline import PipelineState

from .embedding_cache import DEFAULT_MAX_ENTRIES, EmbeddingCache, Embeddings, Owner
from .encode import PeRFlowAutoTextEncoderStep, PeRFlowEmbeddingsStep, PeRFlowTextEncoderStep
from .fingerprint import model_state, tokenizer_state

ENCODERS = ("text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")


class PeRFlowCachedTextEncoderStep(PeRFlowTextEncoderStep):
    """diffusers' text encoder, asked once for each request: what `PromptCacheStep` runs where there is a prompt.

    Args:
        max_entries: how many requests to keep, at least 1.

    Attributes:
        cache: the `EmbeddingCache`.
    """

    def __init__(self, max_entries: int = DEFAULT_MAX_ENTRIES) -> None:
        super().__init__()
        self.cache = EmbeddingCache(max_entries)

    @property
    def max_entries(self) -> int:
        """How many requests are kept at most."""
        return self.cache.max_entries

    @property
    def description(self) -> str:
        return (
            "Text Encoder step that generates text embeddings to guide the image generation, and keeps them: the same "
            "prompts with the same encoders are encoded once."
        )

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        block_state = self.get_block_state(state)
        owner, request = _owner(components), self._request(components, block_state)
        found = self.cache.get(owner, _state(components), request)
        if found is None:
            super().__call__(components, state)
            # Looked at again, since encoding leaves its traces: transformers puts hooks on an encoder at its first
            # run, and the stock step resets the scale of a LoRA after a call with scale 0.
            self.cache.put(owner, _state(components), request, self._outputs(state))
            return components, state
        scale = _lora_scale(block_state)
        if scale is not None and isinstance(components, StableDiffusionXLLoraLoaderMixin):
            components._lora_scale = scale  # as the stock step leaves it, for LoRAs that are loaded later
        for name, embeddings in found.items():
            setattr(block_state, name, embeddings)
        self.set_block_state(state, block_state)
        return components, state

    def _outputs(self, state: PipelineState) -> Embeddings:
        return {name: state.get(name) for name in self.intermediate_output_names}

    def _request(self, components: Any, block_state: Any) -> Hashable | None:
        """All that the embeddings depend on beside the encoders and tokenizers, or None where that has no key."""
        device = components._execution_device
        inputs = {name: getattr(block_state, name) for name in self.input_names}
        inputs["cross_attention_kwargs"] = _lora_scale(block_state)  # the rest is the UNet's
        try:
            given = tuple(_key(value) for value in inputs.values())
        except TypeError:
            return None
        return (
            given,
            components.guider.num_conditions > 1,
            components.config.force_zeros_for_empty_prompt,
            device,
            torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        )


class PromptCacheStep(PeRFlowAutoTextEncoderStep):
    """Stands where the text encoder block stands; the same prompts with the same encoders are encoded once.

    The embeddings are, bit for bit, those of `PeRFlowAutoTextEncoderStep`, and are copies, so that writing into them
    does no harm. The prompts are kept as a whole: a new prompt beside a negative one that is known encodes both. Calls
    with `prompt_embeds` pass by the cache. A hit does not repeat the tokenizer's warning about a prompt that is too
    long.

    Other encoders or tokenizers have embeddings of their own. What there is of the same ones is dropped at the first
    call after they changed: another device or type, weights written in place, a LoRA loaded, scaled, switched, turned
    off, fused or unloaded, a textual inversion loaded or unloaded. To look for that takes about 3 ms at full size, 13
    with a LoRA on every layer, and reads no weight. What cannot be seen, and wants a `clear()`:

    - weights written through `.data` or a NumPy view. peft merges LoRAs in that way: `pipe.fuse_lora` is seen
      whenever it is called on this pipeline, another pipeline's or peft's own as long as the LoRA stays loaded.
    - weights of offloaded encoders that were replaced through `.data`, and any changes to those that accelerate
      offloads layer by layer, since their weights are elsewhere between the calls.
    - a function in a module that was replaced by another, and torch's process-wide settings of precision.

    The entries lie on the encoders' device. One prompt of SDXL takes (77 * 2048 + 1280) numbers: 0.32 MB in half
    precision, twice that with guidance; a list of prompts is one entry of as many times that.

    Example:
        >>> cache = PromptCacheStep()
        >>> blocks = PeRFlowSDXLAutoBlocks()
        >>> blocks.sub_blocks["text_encoder"] = cache
        >>> pipe = blocks.init_pipeline("stabilityai/stable-diffusion-xl-base-1.0")
        >>> pipe.load_components(dtype=torch.float16)
        >>> for seed in range(4):
        ...     images = pipe(prompt="a red star", generator=torch.Generator().manual_seed(seed), output="images")
        >>> cache.hits, cache.misses
        (3, 1)

    Args:
        max_entries: how many requests to keep, at least 1; the one that was not used for longest goes first.

    Raises:
        ValueError: `max_entries` is not a positive whole number.
    """

    block_classes = [PeRFlowCachedTextEncoderStep, PeRFlowEmbeddingsStep]  # noqa: RUF012

    def __init__(self, max_entries: int = DEFAULT_MAX_ENTRIES) -> None:
        super().__init__()
        self.sub_blocks["prompt"] = PeRFlowCachedTextEncoderStep(max_entries)

    @property
    def description(self) -> str:
        return f"{super().description} The same prompts with the same encoders are encoded once."

    @property
    def cache(self) -> EmbeddingCache:
        """What is kept, shared with the copies of this block that pipelines make."""
        return self.sub_blocks["prompt"].cache

    @property
    def max_entries(self) -> int:
        """How many requests are kept at most."""
        return self.cache.max_entries

    @property
    def hits(self) -> int:
        """How many calls took embeddings from the cache."""
        return self.cache.hits

    @property
    def misses(self) -> int:
        """How many calls ran the encoders."""
        return self.cache.misses

    def clear(self) -> None:
        """Forgets all embeddings and counts from zero."""
        self.cache.clear()


def _owner(components: Any) -> Owner:
    """What the pipeline encodes with, held weakly."""
    parts = (getattr(components, name) for name in (*ENCODERS, *TOKENIZERS))
    return tuple(None if part is None else weakref.ref(part) for part in parts)


def _state(components: Any) -> tuple[Any, ...]:
    """Equal to an earlier one as long as nothing can be seen to have changed."""
    # Each fusing and unfusing makes a new set. With the set itself beside it, its number is not given to another.
    fused = components.fused_loras if isinstance(components, StableDiffusionXLLoraLoaderMixin) else None
    return (
        (id(fused), fused),
        tuple(model_state(getattr(components, name)) for name in ENCODERS),
        tuple(tokenizer_state(getattr(components, name)) for name in TOKENIZERS),
    )


def _lora_scale(block_state: Any) -> Any:
    kwargs = block_state.cross_attention_kwargs
    return None if kwargs is None else kwargs.get("scale")


def _key(value: Any) -> Hashable:
    """A key that tells types apart, since the stock step does; TypeError for what is no text, number or list."""
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_key, value))
    if value is None or isinstance(value, (str, int, float)):
        return type(value), value
    raise TypeError(f"{type(value).__name__} has no key")
