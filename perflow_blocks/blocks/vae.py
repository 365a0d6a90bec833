"""The VAE as diffusers' encoding and decoding steps see it: results are finite, and threads may share it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.modular_pipelines.stable_diffusion_xl.encoders import retrieve_latents
from diffusers.utils import logging
from torch import Tensor

from ..delta.model_lock import model_lock
from .precision import HALF, can_be_float32, in_float32, not_finite, require_float32_may_help

logger = logging.get_logger(__name__)

_REMEDY = 'use a VAE in float32, pipe.vae.to(torch.float32), or one made for float16, "madebyollin/sdxl-vae-fp16-fix"'


def guarded_vae(components: Any) -> Any:
    """A view of the components for one step, whose `vae` is a `GuardedVAE`."""
    view = copy.copy(components)
    view.vae = GuardedVAE(components.vae)
    return view


class GuardedVAE:
    """Encodes and decodes with a VAE as diffusers does, but never to values that are not finite.

    A half-precision VAE whose result is not finite runs again in float32, with a warning. A VAE with `force_upcast`
    runs in float32 at once, as in diffusers: float16 for decoding, bfloat16 as well for encoding. Other threads that
    use the VAE wait meanwhile.

    Args:
        vae: an `AutoencoderKL`, or another autoencoder with `encode`, `decode` and `config`.
    """

    def __init__(self, vae: Any) -> None:
        self._vae, self._lock = vae, model_lock(vae)
        self.config = FrozenDict({**vae.config, "force_upcast": False})
        with self._lock.running():
            self.dtype: torch.dtype = vae.dtype
            self._upcasts = vae.config.force_upcast and self.dtype in HALF and can_be_float32([vae])

    @property
    def decoding_dtype(self) -> torch.dtype:
        """The type in which latents are to be scaled and decoded."""
        return torch.float32 if self._upcasts and self.dtype == torch.float16 else self.dtype

    def to(self, *args: Any, **kwargs: Any) -> GuardedVAE:
        """Nothing: diffusers would change the type of weights that threads share."""
        return self

    def encode(self, images: Tensor) -> Any:
        """The VAE's output for images (batch, 3, height, width) in [-1, 1].

        Raises:
            ValueError: the result is not finite, in float32 too, or the VAE cannot be made float32.
        """
        run, upcast = self._vae.encode, self._upcasts
        return self._finite("encoded", run, images, upcast, lambda output: retrieve_latents(output, None, "argmax"))

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Images (batch, 3, height, width) of latents that are scaled for the VAE, as a tuple of one.

        Raises:
            ValueError: the result is not finite, in float32 too, or the VAE cannot be made float32.
        """
        upcast = self.decoding_dtype != self.dtype
        return self._finite("decoded", lambda z: self._vae.decode(z, return_dict=False), latents, upcast, _first)

    def _finite(
        self,
        done: str,
        run: Callable[[Tensor], Any],
        given: Tensor,
        upcast: bool,
        values: Callable[[Any], Tensor],
    ) -> Any:
        """`run(given)`, in float32 if `upcast` is set or the `values` of the result are not finite otherwise."""
        problem = None
        if not upcast:
            with self._lock.running():
                output = run(given)
            problem = not_finite(f"the {done} images", values(output))
            if problem is None:
                return output
            require_float32_may_help(problem, given, [self._vae], "check the VAE's weights", _REMEDY)
        inputs = {"given": given}
        with in_float32([self._vae], inputs, given.device):
            output = run(inputs["given"])
        still = not_finite(f"the {done} images", values(output))
        if still is not None:
            raise ValueError(f"{still}; check the VAE's weights, and the given latents or image.")
        if problem is not None:
            logger.warning(f"{problem}; they were {done} again in float32. To avoid the second run, {_REMEDY}.")
        return output


def _first(output: tuple[Tensor]) -> Tensor:
    return output[0]
