"""Models and their types: the guard of the loop, and runs again in float32 where results are not finite."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.hooks.group_offloading import _GROUP_OFFLOADING, _is_group_offload_enabled
from diffusers.modular_pipelines.modular_pipeline_utils import OutputParam
from diffusers.utils import logging
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..delta.model_lock import model_lock
from .declare import declared
from .guiders import guider_of_call
from .inputs import shared_inputs
from .loop_block import LoopBlock, Repeat
from .specs import controlnet_spec, guider_spec, unet_spec

logger = logging.get_logger(__name__)

HALF = (torch.float16, torch.bfloat16)

ALIGNMENT = 64
"""Bytes: torch allocates tensors of a CPU at multiples of it."""

ALIGNED_ATTRIBUTE = "_perflow_aligned"

_REMEDY = "check the delta, the LoRAs and the latents that you passed (the VAE is not the cause)"


class FiniteGuardStep(LoopBlock):
    """Checks once, after the last step, that all latents are finite.

    With `on_nonfinite="raise"`, latents that are not finite are an error. With `"fallback"`, all steps are run again,
    with a warning: without the scheduler's theta, if it has one, and if that does not help in float32, which needs
    memory for the networks in float32.

    Raises:
        ValueError: latents are not finite, with `"fallback"` also after these runs.
    """

    models: tuple[str, ...] = ("unet",)  # the components that the fallback runs in float32
    description = "Checks after the loop that the latents are finite; if not, raises or runs all steps in float32."
    expected_components = declared(guider_spec(), unet_spec())
    inputs = declared(*shared_inputs("latents", required=True), *shared_inputs("on_nonfinite", "guider", "step_plan"))
    intermediate_outputs = declared(
        OutputParam("latents", Tensor, "Latents (batch, channels, height/f, width/f), all of them finite.")
    )

    def start(self, components: Any, block_state: Any) -> None:
        latents, guider = block_state.latents, None
        if block_state.on_nonfinite == "fallback":  # blocks may write into the latents, and a guider into its momentum
            latents, guider = latents.clone(), copy.deepcopy(vars(guider_of_call(components, block_state)))
        block_state["_run_starts_with"] = (latents, guider)

    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        return components, block_state

    @torch.no_grad()
    def finish(self, components: Any, block_state: Any, repeat: Repeat) -> None:
        latents, (beginning, guider) = block_state.latents, vars(block_state).pop("_run_starts_with")
        problem = not_finite("the latents", latents)
        if problem is None:
            return
        plan = block_state.step_plan
        if guider is not None and plan is not None and plan.uncorrected is not None:
            block_state.step_plan = plan.uncorrected
            block_state.step_coefficients = plan.uncorrected.coefficients(latents.device)
            self._restart(components, block_state, beginning.clone(), copy.deepcopy(guider))
            repeat(0)
            if not_finite("the latents", block_state.latents) is None:
                logger.warning(
                    f"{problem}; all steps were run again without the scheduler's theta, which is at fault."
                )
                return
        advice, models = _advice(latents), [getattr(components, name) for name in self.models]
        require_float32_may_help(problem, beginning, models, _REMEDY, advice)
        if guider is None:
            raise ValueError(
                f'{problem}; {advice}, or pass on_nonfinite="fallback"; if that does not help, {_REMEDY}.'
            )
        self._restart(components, block_state, beginning, guider)
        with in_float32(models, vars(block_state), beginning.device):
            repeat(0)
        if not_finite("the latents", block_state.latents) is not None:
            raise ValueError(f"{problem}, nor are they in torch.float32; {_REMEDY}.")
        logger.warning(f"{problem}; all steps were run again in float32. To avoid the second run, {advice}.")

    def _restart(self, components: Any, block_state: Any, latents: Tensor, guider: dict[str, Any]) -> None:
        block_state.latents, block_state.earlier_step = latents, None
        vars(guider_of_call(components, block_state)).update(guider)


class ControlNetFiniteGuardStep(FiniteGuardStep):
    """The guard of a loop with a ControlNet, which the fallback runs in float32 as well."""

    models = ("unet", "controlnet")
    expected_components = declared(*FiniteGuardStep.expected_components, controlnet_spec())


def _advice(latents: Tensor) -> str:
    """How to compute in a type of more range."""
    if precision(latents) != latents.dtype:
        return "run the pipeline outside torch.autocast"
    types = [str(dtype) for dtype in (torch.bfloat16, torch.float32) if dtype != latents.dtype]
    return f"load the pipeline with dtype={' or '.join(types)}"


def not_finite(what: str, values: Tensor) -> str | None:
    """Names the images whose `values`, in words `what`, are not finite; None if all are. Reads the device once."""
    finite = torch.isfinite(values).flatten(1).all(dim=1).tolist()
    bad = ", ".join(f"images[{index}]" for index, is_finite in enumerate(finite) if not is_finite)
    return f"{what} are not finite in {precision(values)} for {bad} of {len(finite)}" if bad else None


def precision(values: Tensor) -> torch.dtype:
    """The type that a model with this input computes in: autocast's, or that of the input."""
    kind = values.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else values.dtype


def require_float32_may_help(problem: str, given: Tensor, models: Sequence[nn.Module], rest: str, advice: str) -> None:
    """Raises a ValueError for a `problem` that a second run in float32 would not solve.

    `rest` says what to do if the run was in float32 already, `advice` if the models cannot be made float32.
    """
    if not_finite("the inputs", given) is not None:
        raise ValueError(f"{problem}, as is what they were computed from; check the given latents or image.")
    if precision(given) == torch.float32:
        raise ValueError(f"{problem}; {rest}.")
    if not can_be_float32(models):
        raise ValueError(f"{problem}, and offloaded or quantized weights cannot be made float32; {advice}.")


def can_be_float32(models: Sequence[nn.Module]) -> bool:
    """Whether all weights are here and plain numbers: neither offloaded layer by layer nor quantized."""
    weights = [weight for model in models for weight in model.parameters()]
    plain = all(type(w.data) is Tensor and w.dtype in (*HALF, torch.float32) and not w.is_meta for w in weights)
    return plain and not any(_is_group_offload_enabled(model) for model in models)


@contextmanager
def in_float32(models: Sequence[nn.Module], values: dict[str, Any], device: torch.device) -> Iterator[None]:
    """Inside, the models' half-precision weights and tensors among `values` are float32, without autocast on `device`.

    Other threads that use the models wait meanwhile. Afterwards the weights are as they were, bit for bit, and so are
    the values, except for those that were replaced inside, which get their old type.
    """
    with ExitStack() as locks:
        for model in models:
            locks.enter_context(model_lock(model).changing())
        tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
        halves = [(tensor, tensor.dtype) for tensor in tensors if tensor.dtype in HALF]
        given = dict(values)
        lifted = tree_map_only(Tensor, lambda tensor: tensor.float() if tensor.dtype in HALF else tensor, given)
        values.update(lifted)
        try:
            for tensor, _ in halves:
                tensor.data = tensor.data.float()
            with torch.autocast(device.type, enabled=False):
                yield
        finally:
            for tensor, dtype in halves:
                tensor.data = tensor.data.to(dtype)
            for name, value in given.items():
                if values[name] is lifted[name]:
                    values[name] = value
                elif isinstance(value, Tensor) and isinstance(values[name], Tensor):
                    values[name] = values[name].to(value.dtype)


def is_offloaded(model: nn.Module) -> bool:
    """Whether a hook moves the model, or the layers with its first weights, to another device when it runs."""
    for module in _down_to_weights(model):
        hooks: Any = getattr(module, "_diffusers_hook", None)
        if hasattr(module, "_hf_hook") or (hooks is not None and hooks.get_hook(_GROUP_OFFLOADING) is not None):
            return True
    return False


def computing_dtype(model: Any) -> torch.dtype:
    """The type a model computes with: that of its first weight, unless a hook or fewer bits say that it is another."""
    dtype: torch.dtype = next(model.parameters()).dtype
    hooked = any(hasattr(module, "_diffusers_hook") for module in _down_to_weights(model))
    plain = dtype.is_floating_point and dtype.itemsize > 1 and not hooked
    return dtype if plain else model.dtype  # which walks all modules


def _down_to_weights(model: nn.Module) -> Iterator[nn.Module]:
    """The modules from the model down to the first one that holds weights itself."""
    for module in model.modules():
        yield module
        if module._parameters:
            return


def align_weights(model: nn.Module) -> None:
    """Moves weights that run on a CPU to aligned addresses, once for a model.

    Matrix products on a CPU round by the alignment of what they multiply, and weights of a mapped file lie anywhere.
    """
    first = next(model.parameters(), None)
    if first is None or first.device.type != "cpu" or ALIGNED_ATTRIBUTE in vars(model) or is_offloaded(model):
        return
    with model_lock(model).changing():
        for weight in model.parameters():
            if type(weight.data) is Tensor and weight.data_ptr() % ALIGNMENT:
                weight.data = weight.data.clone()
        vars(model)[ALIGNED_ATTRIBUTE] = True
