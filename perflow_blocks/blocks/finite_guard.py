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

from ..delta.apply import is_plain
from ..delta.model_lock import model_lock
from .declare import declared
from .guiders import guider_of_call
from .inputs import shared_inputs
from .loop_block import LoopBlock, Repeat
from .specs import guider_spec, unet_spec

logger = logging.get_logger(__name__)

HALF = (torch.float16, torch.bfloat16)

_REMEDY = "check the delta, the LoRAs and the latents that you passed (the VAE is not the cause)"

ALIGNMENT = 64
"""Bytes: torch allocates tensors of a CPU at multiples of it."""

ALIGNED_ATTRIBUTE = "_perflow_aligned"


class FiniteGuardStep(LoopBlock):
    """Checks once, after the last step, that all latents are finite.

    With `on_nonfinite="raise"`, latents that are not finite are an error. With `"fallback"`, all steps are run again,
    with a warning: without the scheduler's theta, if it has one, and if that does not help in float32, which needs
    memory for the networks in float32.

    Raises:
        ValueError: latents are not finite, with `"fallback"` also after these runs.
    """

    description = "Checks after the loop that the latents are finite; if not, raises or runs all steps again, safer."
    expected_components = declared(guider_spec(), unet_spec())
    inputs = declared(*shared_inputs("latents", required=True), *shared_inputs("on_nonfinite", "guider", "step_plan"))
    intermediate_outputs = declared(
        OutputParam("latents", Tensor, "Latents (batch, channels, height/f, width/f), all of them finite.")
    )

    def start(self, components: Any, block_state: Any) -> None:
        if block_state.on_nonfinite == "fallback":  # blocks may write into the latents, and a guider into its momentum
            guider = copy.deepcopy(vars(guider_of_call(components, block_state)))
            block_state["_run_starts_with"] = (block_state.latents.clone(), guider)

    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        return components, block_state

    @torch.no_grad()
    def finish(self, components: Any, block_state: Any, repeat: Repeat) -> None:
        beginning, plan = vars(block_state).pop("_run_starts_with", None), block_state.step_plan
        problem = not_finite("the latents", block_state.latents)
        if problem is None:
            return
        in_half = precision(block_state.latents) != torch.float32
        wider = "load the pipeline with dtype=torch.bfloat16 or torch.float32, or " if in_half else ""
        theta = plan is not None and plan.uncorrected is not None
        if beginning is None:
            again = 'pass on_nonfinite="fallback", or ' if in_half or theta else ""
            raise ValueError(f"{problem}; {wider}{again}{_REMEDY}.")

        def run_again(dtype: torch.dtype) -> bool:
            block_state.latents, block_state.earlier_step = beginning[0].to(dtype, copy=True), None
            vars(guider_of_call(components, block_state)).update(copy.deepcopy(beginning[1]))
            repeat(0)
            return not_finite("the latents", block_state.latents) is None

        if theta:
            block_state.step_plan = plan.uncorrected
            block_state.step_coefficients = plan.uncorrected.coefficients(beginning[0].device)
            if run_again(beginning[0].dtype):
                logger.warning(f"{problem}; all steps were run again without the scheduler's theta, the cause.")
                return
        models = [model for name in ("unet", "controlnet") if (model := components.components.get(name)) is not None]
        if not in_half or not all(map(can_be_float32, models)):
            fixed = ", and offloaded or quantized weights cannot be made float32" if in_half else ""
            raise ValueError(f"{problem}{fixed}; {wider}{_REMEDY}.")
        with _lifted(vars(block_state)), in_float32(models, beginning[0].device):
            is_finite = run_again(torch.float32)
        if not is_finite:
            raise ValueError(f"{problem}, nor are they in torch.float32; {_REMEDY}.")
        logger.warning(f"{problem}; all steps were run again in float32. To avoid the second run, {wider}{_REMEDY}.")


@contextmanager
def _lifted(values: dict[str, Any]) -> Iterator[None]:
    """Inside, half-precision tensors are float32. Afterwards all have their old type, unchanged ones their bits."""
    given = dict(values)
    lifted = tree_map_only(Tensor, lambda tensor: tensor.float() if tensor.dtype in HALF else tensor, given)
    values.update(lifted)
    try:
        yield
    finally:
        for name, value in given.items():
            if values[name] is lifted[name]:
                values[name] = value
            elif isinstance(value, Tensor) and isinstance(values[name], Tensor):
                values[name] = values[name].to(value.dtype)


def can_be_float32(model: nn.Module) -> bool:
    """Whether all weights are here and plain numbers: neither offloaded layer by layer nor quantized."""
    plain = all(is_plain(weight) and not weight.is_meta for weight in model.parameters())
    return plain and not _is_group_offload_enabled(model)


@contextmanager
def in_float32(models: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside, half-precision weights are float32, without autocast on `device`. Other threads wait meanwhile.

    Afterwards the weights are as they were, bit for bit.
    """
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(model_lock(model).changing())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
        halves = [(tensor, tensor.data) for tensor in tensors if tensor.dtype in HALF]
        try:
            for tensor, data in halves:
                tensor.data = data.float()
            yield
        finally:
            for tensor, data in halves:
                tensor.data = data


def not_finite(what: str, values: Tensor) -> str | None:
    """Names the images whose `values`, in words `what`, are not finite; None if all are. Reads the device once."""
    finite = torch.isfinite(values).flatten(1).all(dim=1).tolist()
    bad = ", ".join(f"images[{index}]" for index, is_finite in enumerate(finite) if not is_finite)
    return f"{what} are not finite in {precision(values)} for {bad} of {len(finite)}" if bad else None


def precision(values: Tensor) -> torch.dtype:
    """The type that a model with this input computes in: autocast's, or that of the input."""
    kind = values.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else values.dtype


def is_offloaded(model: nn.Module) -> bool:
    """Whether a hook moves the model, or the layers with its first weights, to another device when it runs."""
    for module in model.modules():
        hooks: Any = getattr(module, "_diffusers_hook", None)
        if hasattr(module, "_hf_hook") or (hooks is not None and hooks.get_hook(_GROUP_OFFLOADING) is not None):
            return True
        if module._parameters:
            break
    return False


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
