"""The frozen teacher: it encodes prompts and images, and solves windows with or without guidance, in its own type."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from ..core.parameterization import WindowAlpha
from ..schedulers import PFODESolver
from ..schedulers.pfode_solver import Conditioning, sdxl_conditioning
from .config import TeacherConfig
from .data.batch import Size
from .step import WindowGeometry, cast

Offload = Callable[[], Any]
"""Takes models back to the host's memory."""

Sizes = tuple[Size, Size, Size]
"""What SDXL's time ids say of an image, each (height, width): original size, corner of the crop, size of the crop."""


class PromptEncoder:
    """Encodes prompts as the teacher's pipeline does.

    Args:
        pipeline: with the text encoders, on their device or offloaded from it.
        device: where the embeddings go.
        cache: how many prompts' embeddings are kept.
        offload: called when prompts were encoded.
    """

    def __init__(self, pipeline: Any, device: torch.device, cache: int, offload: Offload | None = None) -> None:
        self._pipeline = pipeline
        self._device = device
        self._added_conditions = isinstance(pipeline, StableDiffusionXLPipeline)
        self._offload = offload or (lambda: None)
        self._row = lru_cache(maxsize=cache)(self._encode)
        self._empty = self._encode("", negative=True)  # as the pipeline has it for guidance: of SDXL mostly zeros
        self._offload()

    def conditioning(
        self, prompts: Sequence[str], sizes: Sequence[Sizes], drop: Sequence[bool] | None = None
    ) -> Conditioning:
        """The conditions (batch, ...) of a prompt and the sizes for each row; the empty prompt where `drop` says so.

        Each prompt is encoded by itself: its rounding depends on what else is in a batch, and a run that is resumed,
        with nothing kept, has to get the same embeddings.
        """
        before = self._row.cache_info().misses
        dropped = drop or [False] * len(prompts)
        rows = [self._empty if out else self._row(prompt) for prompt, out in zip(prompts, dropped, strict=True)]
        if self._row.cache_info().misses > before:
            self._offload()
        embeds, pooled = (torch.stack(parts) for parts in zip(*rows, strict=True))
        if not self._added_conditions:
            return Conditioning(prompt_embeds=embeds)
        time_ids = torch.tensor([[side for size in three for side in size] for three in sizes], dtype=torch.float32)
        return sdxl_conditioning(embeds, pooled, time_ids.to(self._device, non_blocking=True))

    def empty(self, like: Conditioning) -> Conditioning:
        """The conditions that guidance leads away from, with the time ids of `like`."""
        embeds, pooled = (part.expand(len(like.prompt_embeds), *part.shape) for part in self._empty)
        if not self._added_conditions:
            return Conditioning(prompt_embeds=embeds)
        return sdxl_conditioning(embeds, pooled, like.added["time_ids"])

    @torch.no_grad()
    def _encode(self, prompt: str, *, negative: bool = False) -> tuple[Tensor, Tensor]:
        """A prompt's embeddings (tokens, width) and, of SDXL, pooled (width,); or those of the negative prompt."""
        found = self._pipeline.encode_prompt(
            prompt=[prompt], device=self._device, num_images_per_prompt=1, do_classifier_free_guidance=negative
        )
        # Positive and negative embeddings, and for SDXL then the same pooled.
        own = found[int(negative) :: 2]
        return own[0][0], own[1][0] if self._added_conditions else own[0].new_zeros(0)


class LatentEncoder:
    """The teacher's VAE, with the distributions of latents kept for images that come again.

    Args:
        vae: on its device, or offloaded from it.
        device: where it runs and the latents go.
        cache: images to keep, by their pixels: useful for few images without random crops.
        offload: called after encoding.
    """

    def __init__(self, vae: Any, device: torch.device, cache: int = 0, offload: Offload | None = None) -> None:
        self._vae, self._device, self._cache = vae, device, cache
        self._kept: dict[bytes, Tensor] = {}
        self._offload = offload or (lambda: None)

    @torch.no_grad()
    def encode(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Latents (batch, 4, height/f, width/f) float32 of pixels (batch, 3, height, width) in [-1, 1] on the host."""
        moments = torch.stack([self._moments(row) for row in pixels]) if self._cache else self._encode(pixels)
        latents = DiagonalGaussianDistribution(moments).sample(generator)
        return latents * self._vae.config.scaling_factor

    def _encode(self, pixels: Tensor) -> Tensor:
        """Mean and logarithmic variance, (batch, 8, height/f, width/f) float32."""
        distribution = self._vae.encode(pixels.to(self._device, self._vae.dtype)).latent_dist
        self._offload()
        return distribution.parameters.float()

    def _moments(self, row: Tensor) -> Tensor:
        """Of one image: in a batch its rounding would depend on which others are missing."""
        key = hashlib.blake2b(row.contiguous().numpy().data, digest_size=16).digest()
        found = self._kept.pop(key, None)
        self._kept[key] = self._encode(row[None])[0] if found is None else found
        if len(self._kept) > self._cache:
            del self._kept[next(iter(self._kept))]
        return self._kept[key]


class Teacher:
    """Solves the probability-flow ODE of a frozen UNet across windows.

    Args:
        unet: called within the context that `at_hand` makes for each solve.
        scheduler: of the teacher.
        encoder: of its prompts.
        geometry: the windows.
        config: steps and guidance.
    """

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        encoder: PromptEncoder,
        geometry: WindowGeometry,
        config: TeacherConfig,
        at_hand: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.unet, self.encoder, self.geometry, self.config = unet, encoder, geometry, config
        self._at_hand = at_hand
        self._solver = PFODESolver(scheduler)

    def solve(self, z_start: Tensor, window: WindowAlpha, conditioning: Conditioning) -> Tensor:
        """The ends (batch, channels, height, width) of windows that begin at `z_start`; each row has its own window.

        Under "fixed" guidance a prompt that was dropped is solved like any other: guidance from it to itself is none.
        """
        start, end = (self.geometry.solver_times(torch.as_tensor(t)) for t in (window.start, window.end))
        scale = self.config.guidance_scale if self.config.cfg_mode == "fixed" else 1.0
        steps = self.config.steps_per_window
        windows = self.geometry.solver_windows(steps)
        return self.solve_between(z_start, start, end, conditioning, steps, windows, scale)

    def solve_between(
        self,
        z_start: Tensor,
        start: Tensor,
        end: Tensor,
        conditioning: Conditioning,
        num_steps: int,
        num_windows: int | None,
        scale: float,
    ) -> Tensor:
        """As `PFODESolver.solve_conditioned` with a guidance of `scale`."""
        dtype = getattr(torch, self.config.dtype)
        negative = cast(self.encoder.empty(conditioning), dtype) if scale > 1.0 else None
        with self._at_hand():
            return self._solver.solve_conditioned(
                z_start,
                self.unet,
                start,
                end,
                cast(conditioning, dtype),
                negative,
                guidance_scale=scale,
                num_steps=num_steps,
                num_windows=num_windows,
            )


@contextmanager
def without_factors(student: Any) -> Iterator[None]:
    """A LoRA student as it was before its factors: the teacher, whose weights need not be in memory twice."""
    student.disable_adapters()
    try:
        yield
    finally:
        student.enable_adapters()


@contextmanager
def then(after: Offload) -> Iterator[None]:
    """Calls a function at the end, to take an offloaded model back to the host."""
    try:
        yield
    finally:
        after()
