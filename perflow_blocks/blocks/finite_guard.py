"""The guard of the loop: latents that are not finite raise an error or are computed again in float32."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.modular_pipelines.modular_pipeline_utils import OutputParam
from diffusers.utils import logging
from torch import Tensor, nn

from .declare import declared
from .inputs import NONFINITE_POLICIES, latents_input, on_nonfinite_input
from .loop_block import LoopBlock, Repeat
from .specs import controlnet_spec, guider_spec, unet_spec

logger = logging.get_logger(__name__)

HALF = (torch.float16, torch.bfloat16)

_BEGINNING = "_finite_guard_beginning"
"""Where the block state keeps the latents, and for the fallback the guider's state, that the run starts with."""


class FiniteGuardStep(LoopBlock):
    """Checks once, after the last step, that all latents are finite.

    With `on_nonfinite="raise"`, latents that are not finite are an error. With `"fallback"`, all steps are run again
    in float32, with a warning; that needs memory for the networks in float32.

    Raises:
        ValueError: the policy is unknown; latents are not finite, with `"fallback"` also after the run in float32.
    """

    models: tuple[str, ...] = ("unet",)
    """The components that the fallback runs in float32."""

    description = "Checks after the loop that the latents are finite; if not, raises or runs all steps in float32."
    expected_components = declared(guider_spec(), unet_spec())
    inputs = declared(latents_input(), on_nonfinite_input())
    intermediate_outputs = declared(
        OutputParam("latents", Tensor, "Latents (batch, channels, height/f, width/f), all of them finite.")
    )

    def start(self, components: Any, block_state: Any) -> None:
        policy, latents, guider = block_state.on_nonfinite, block_state.latents, None
        if policy not in NONFINITE_POLICIES:
            raise ValueError(f"on_nonfinite={policy!r} must be one of {', '.join(NONFINITE_POLICIES)}.")
        if policy == "fallback":  # copies, since blocks may write into the latents, and a guider into its momentum
            latents, guider = latents.clone(), copy.deepcopy(vars(components.guider))
        block_state[_BEGINNING] = (latents, guider)

    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        return components, block_state

    @torch.no_grad()
    def finish(self, components: Any, block_state: Any, repeat: Repeat) -> None:
        latents, (beginning, guider) = block_state.latents, vars(block_state).pop(_BEGINNING)
        problem = _problem(latents)
        if problem is None:
            return
        if _problem(beginning) is not None:
            raise ValueError(
                f"{problem}, as were those that the run starts with; check the latents that you passed, or the VAE "
                "that encoded the given image."
            )
        models = [getattr(components, name) for name in self.models]
        remedy = "check the delta, the LoRAs and the latents that you passed (the VAE is not the cause)"
        if _is_float32(models, latents):
            raise ValueError(f"{problem}; {remedy}.")
        wider, fallback = _wider(latents), ', or pass on_nonfinite="fallback"'
        if block_state.on_nonfinite == "fallback":
            obstacle = _why_not_float32(models)
            if obstacle is None:
                block_state.latents = beginning
                vars(components.guider).clear()
                vars(components.guider).update(guider)
                with _in_float32(models, vars(block_state)):
                    repeat(0)
                if _problem(block_state.latents) is not None:
                    raise ValueError(f"{problem}, nor are they in torch.float32; {remedy}.")
                logger.warning(f"{problem}; all steps were run again in float32. To avoid the second run, {wider}.")
                return
            problem, fallback = f"{problem}, and {obstacle}", ""
        raise ValueError(f"{problem}; {wider}{fallback}; if that does not help, {remedy}.")


class ControlNetFiniteGuardStep(FiniteGuardStep):
    """The guard of a loop with a ControlNet, which the fallback runs in float32 as well."""

    models = ("unet", "controlnet")
    expected_components = declared(*FiniteGuardStep.expected_components, controlnet_spec())


def _problem(latents: Tensor) -> str | None:
    """Names the images whose latents are not finite; None where there are none. One read of the device."""
    finite = torch.isfinite(latents).flatten(1).all(dim=1).tolist()
    if all(finite):
        return None
    bad = [f"images[{index}]" for index, is_finite in enumerate(finite) if not is_finite]
    names = f"{', '.join(bad[:8])}{' and more' if len(bad) > 8 else ''}"
    return f"the latents are not finite in {_precision(latents)} for {names} of {len(finite)}"


def _precision(latents: Tensor) -> torch.dtype:
    """The type that a model with this input computes in: autocast's, or that of the input."""
    kind = latents.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else latents.dtype


def _wider(latents: Tensor) -> str:
    """How to compute in a type of more range."""
    if _precision(latents) != latents.dtype:
        return "run the pipeline outside torch.autocast"
    types = [str(dtype) for dtype in (torch.bfloat16, torch.float32) if dtype != latents.dtype]
    return f"load the pipeline with dtype={' or '.join(types)}"


def _tensors(models: Sequence[nn.Module]) -> list[Tensor]:
    """The floating-point weights and buffers, each once."""
    found = {id(t): t for model in models for t in itertools.chain(model.parameters(), model.buffers())}
    return [tensor for tensor in found.values() if tensor.is_floating_point()]


def _is_float32(models: Sequence[nn.Module], latents: Tensor) -> bool:
    return _precision(latents) == torch.float32 and not any(tensor.dtype in HALF for tensor in _tensors(models))


def _why_not_float32(models: Sequence[nn.Module]) -> str | None:
    """What keeps these models from computing in float32 for one run; None where nothing does."""
    if any(_is_group_offload_enabled(model) for model in models) or any(t.is_meta for t in _tensors(models)):
        return "weights that are offloaded layer by layer cannot be made float32"
    weights = [weight for model in models for weight in model.parameters()]
    kinds = {str(w.dtype) if type(w.data) is Tensor else type(w.data).__name__ for w in weights}
    others = kinds - {str(dtype) for dtype in (*HALF, torch.float32)}
    return f"weights of {', '.join(sorted(others))} cannot be made float32" if others else None


@contextmanager
def _in_float32(models: Sequence[nn.Module], values: dict[str, Any]) -> Iterator[None]:
    """Inside, half-precision weights of the models and half-precision tensors among `values` are float32.

    Afterwards the weights are as they were, bit for bit, since float32 holds every half-precision number. Values that
    did not change inside are the objects they were; a tensor that did is cast to the type it had. Autocast is off
    inside. Weights are replaced, so that no second copy is held.
    """
    weights = [(tensor, tensor.dtype) for tensor in _tensors(models) if tensor.dtype in HALF]
    given = dict(values)
    lifted = {name: _to_float32(value) for name, value in given.items()}
    values.update(lifted)
    try:
        for tensor, _ in weights:
            tensor.data = tensor.data.float()
        with torch.autocast(values["latents"].device.type, enabled=False):
            yield
    finally:
        for tensor, dtype in weights:
            tensor.data = tensor.data.to(dtype)
        for name, value in given.items():
            if values[name] is lifted[name]:
                values[name] = value
            elif isinstance(value, Tensor) and isinstance(values[name], Tensor):
                values[name] = values[name].to(value.dtype)


def _to_float32(value: Any) -> Any:
    """The value with half-precision tensors cast, also in lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALF else value
    if type(value) is dict:
        return {name: _to_float32(entry) for name, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_to_float32(entry) for entry in value)
    return value
