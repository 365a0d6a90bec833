"""Pictures to scaled latents, as the teacher's pipeline makes them."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor


class LatentEncoder:
    """The teacher's VAE, with the latents' distributions kept for pictures that come again.

    Args:
        vae: on its device; where it is offloaded, `offload` takes it back to the host.
        device: where it runs and the latents go.
        cache: pictures to keep, by their pixels: useful for few pictures without random crops.
        offload: called after encoding.
    """

    def __init__(
        self, vae: Any, device: torch.device, *, cache: int = 0, offload: Callable[[], Any] | None = None
    ) -> None:
        self._vae = vae
        self._device = device
        self._max_entries = cache
        self._moments: OrderedDict[bytes, Tensor] = OrderedDict()
        self._offload = offload

    @torch.no_grad()
    def encode(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Latents (batch, 4, height/f, width/f) float32, drawn from the VAE's distribution and scaled.

        Args:
            pixels: (batch, 3, height, width) in [-1, 1], on the host.
            generator: of the draw, on the host.
        """
        moments = self._cached(pixels) if self._max_entries else self._encode(pixels)
        latents = DiagonalGaussianDistribution(moments).sample(generator)
        return latents * self._vae.config.scaling_factor

    def _encode(self, pixels: Tensor) -> Tensor:
        """Mean and logarithmic variance, (batch, 8, height/f, width/f) float32."""
        distribution = self._vae.encode(pixels.to(self._device, self._vae.dtype)).latent_dist
        if self._offload is not None:
            self._offload()
        return distribution.parameters.float()

    def _cached(self, pixels: Tensor) -> Tensor:
        """The same, each picture encoded by itself: in a batch its rounding would depend on what else is missing."""
        rows = []
        for row in pixels:
            key = hashlib.blake2b(row.contiguous().numpy().data, digest_size=16).digest()
            if key not in self._moments:
                self._moments[key] = self._encode(row[None])[0]
            self._moments.move_to_end(key)
            rows.append(self._moments[key])
            if len(self._moments) > self._max_entries:
                self._moments.popitem(last=False)
        return torch.stack(rows)
