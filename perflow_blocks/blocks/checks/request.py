"""Mistakes in a request that concern every task: prompts, sampling settings, sizes, latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.noising import NOISINGS
from ...core.windows import require_positive_int
from ..inputs import NONFINITE_POLICIES
from ..set_timesteps import check_denoising_range, check_strength

PROMPT_NAMES = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
SIZE_NAMES = (
    "original_size",
    "target_size",
    "crops_coords_top_left",
    "negative_original_size",
    "negative_target_size",
    "negative_crops_coords_top_left",
)
EMBEDDING_NAMES = (
    "prompt_embeds",
    "pooled_prompt_embeds",
    "negative_prompt_embeds",
    "negative_pooled_prompt_embeds",
)


def check_sampling(request: Any) -> None:
    """
    Raises:
        ValueError: a count below 1, a strength or share out of range, or an unknown `noising`.
    """
    for name in ("num_inference_steps", "num_images_per_prompt"):
        if getattr(request, name) is not None:
            require_positive_int(name, getattr(request, name))
    if request.clip_skip is not None and (not isinstance(request.clip_skip, int) or request.clip_skip < 0):
        raise ValueError(f"clip_skip={request.clip_skip!r} is no whole number of at least 0; leave it out.")
    if not isinstance(request.cross_attention_kwargs, (dict, type(None))):
        given = type(request.cross_attention_kwargs).__name__
        raise ValueError(f'cross_attention_kwargs is of type {given}; pass a dictionary, such as {{"scale": 0.5}}.')
    if request.strength is not None:
        check_strength(request.strength)
    check_denoising_range(request.denoising_start, request.denoising_end)
    for name, options in (("noising", NOISINGS), ("on_nonfinite", NONFINITE_POLICIES)):
        if getattr(request, name) not in options:
            raise ValueError(f"{name}={getattr(request, name)!r} is unknown; pass one of {', '.join(options)}.")


def count_prompts(request: Any) -> int:
    """The number of prompts; every other list of texts must be as long.

    Raises:
        ValueError: no prompt, both a prompt and its embeddings, one of two embeddings, or texts that do not match.
    """
    if request.prompt is None and request.prompt_embeds is None:
        raise ValueError("prompt is missing; pass a text or a list of texts.")
    if request.prompt is None:
        return _count_embeddings(request)
    both = next((name for name in EMBEDDING_NAMES if getattr(request, name) is not None), None)
    if both is not None:
        raise ValueError(
            f"both prompt and {both} are given; pass texts alone or embeddings alone (a finished state holds both)."
        )
    texts = {name: getattr(request, name) for name in PROMPT_NAMES if getattr(request, name) is not None}
    for name, text in texts.items():
        if not isinstance(text, str) and not (isinstance(text, list) and all(isinstance(t, str) for t in text)):
            raise ValueError(f"{name} is {_kind(text)}; pass a text or a list of texts.")
        if not isinstance(text, str) and not text:
            raise ValueError(f"{name} is an empty list; pass at least one text.")
    if request.negative_prompt_2 is not None and request.negative_prompt is None:
        raise ValueError("negative_prompt_2 goes with negative_prompt, and has no effect alone; pass both.")
    count = _length(request.prompt)
    for name, text in texts.items():
        if (not isinstance(text, str) or name == "prompt_2") and _length(text) != count:
            raise ValueError(f"{name} holds {_length(text)} texts for {count} prompts; pass one for each prompt.")
    return count


def check_size(request: Any, factor: int) -> None:
    """
    Raises:
        ValueError: height or width no multiple of the VAE's factor, or sizes that are no pairs or lack their twin.
    """
    for name in ("height", "width"):
        value = getattr(request, name)
        if value is None:
            continue
        require_positive_int(name, value)
        if value % factor:
            nearest = max(factor, round(value / factor) * factor)
            raise ValueError(f"{name}={value} is no multiple of the VAE's factor {factor}; pass {nearest}.")
    for name in SIZE_NAMES:
        value = getattr(request, name)
        if value is not None and not (isinstance(value, tuple) and len(value) == 2):
            raise ValueError(f"{name}={value!r} is no pair; pass a tuple of two numbers, such as (1024, 1024).")
    if (request.negative_original_size is None) != (request.negative_target_size is None):
        raise ValueError("only one of negative_original_size and negative_target_size is given; pass both or neither.")


def check_latents(request: Any, pictures: int, channels: int, factor: int) -> None:
    """
    Raises:
        ValueError: not one generator, or one for each picture, or latents of another shape or size.
    """
    generator, latents = request.generator, request.latents
    if isinstance(generator, list) and len(generator) != pictures:
        raise ValueError(f"{len(generator)} generators for {pictures} pictures; pass one, or one for each picture.")
    entries = generator if isinstance(generator, list) else [generator]
    wrong = [entry for entry in entries if not isinstance(entry, (torch.Generator, type(None)))]
    if wrong:
        raise ValueError(f"generator is of type {type(wrong[0]).__name__}; pass a torch.Generator, or a list of them.")
    if latents is not None and not isinstance(latents, Tensor):
        raise ValueError(f"latents are of type {type(latents).__name__}; pass a tensor.")
    if latents is not None and (latents.ndim != 4 or tuple(latents.shape[:2]) != (pictures, channels)):
        raise ValueError(
            f"latents have shape {tuple(latents.shape)}; for {pictures} pictures pass "
            f"({pictures}, {channels}, height/f, width/f)."
        )
    for tensor in (given for given in (latents, request.image_latents) if given is not None):
        for name, axis in (("height", -2), ("width", -1)):
            size, pixels = getattr(request, name), tensor.shape[axis] * factor
            if size not in (None, pixels):
                raise ValueError(
                    f"{name}={size}, but the latents are those of {pixels} pixels; pass {pixels}, or leave it out."
                )


def _count_embeddings(request: Any) -> int:
    for name in EMBEDDING_NAMES:
        if not isinstance(getattr(request, name), (Tensor, type(None))):
            raise ValueError(f"{name} is of type {type(getattr(request, name)).__name__}; pass a tensor.")
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        pooled = name.replace("prompt", "pooled_prompt")
        if (getattr(request, name) is None) != (getattr(request, pooled) is None):
            raise ValueError(f"only one of {name} and {pooled} is given; pass both, from the same text encoders.")
        if getattr(request, name) is not None and getattr(request, name).shape != request.prompt_embeds.shape:
            raise ValueError(
                f"{name} has shape {tuple(getattr(request, name).shape)}, prompt_embeds "
                f"{tuple(request.prompt_embeds.shape)}; pass two of one shape."
            )
        if getattr(request, pooled) is not None and len(getattr(request, pooled)) != len(request.prompt_embeds):
            raise ValueError(
                f"{pooled} holds {len(getattr(request, pooled))} rows for {len(request.prompt_embeds)} prompts; pass "
                "one for each."
            )
    for name in PROMPT_NAMES[1:]:
        if getattr(request, name) is not None:
            raise ValueError(f"{name} is given beside prompt_embeds; pass its embeddings too, negative_prompt_embeds.")
    return int(request.prompt_embeds.shape[0])


def _length(text: str | list[str]) -> int:
    return 1 if isinstance(text, str) else len(text)


def _kind(value: object) -> str:
    if isinstance(value, list):
        return "a list that holds " + ", ".join(sorted({type(entry).__name__ for entry in value}))
    return f"of type {type(value).__name__}"
