"""What tests of the denoising loop share: blocks that watch it, models that break, pipelines in half precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam
from torch import Tensor, nn

from perflow_blocks.blocks import PeRFlowSDXLAutoBlocks
from perflow_blocks.blocks.loop_block import LoopBlock
from perflow_blocks.blocks.recombine import find_loops, insert_loop_block
from perflow_blocks.core.parameterization import predict_x0, window_table
from perflow_blocks.core.plan import StepPlan
from perflow_blocks.schedulers import PeRFlowScheduler
from perflow_blocks.testing.tiny import BETAS, tiny_controlnet, tiny_mask, tiny_picture

from .blocks_support import make_pipeline
from .host_reads import no_host_reads

WORKFLOWS = ("text2image", "inpainting", "controlnet_text2image", "controlnet_inpainting")
"""One workflow for each of the four loops."""

EMBEDS = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]


class Spy(LoopBlock):
    """Hands components, block state and step to the function `spy` of the call."""

    @property
    def description(self) -> str:
        return "Hands components, block state and step to a function."

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("spy", type_hint=Callable, description="Called with components, block state and step.")]

    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        if block_state.spy is not None:
            block_state.spy(components, block_state, i)
        return components, block_state


def blocks_with(name: str, block: Any, **place: str) -> PeRFlowSDXLAutoBlocks:
    """The preset with a block in each of its loops."""
    blocks = PeRFlowSDXLAutoBlocks()
    insert_loop_block(blocks, name, block, **place)
    return blocks


def loop_pipeline(workflow: str, blocks: Any = None, dtype: torch.dtype = torch.float32, **components: Any) -> Any:
    if "controlnet" in workflow:
        components = {"controlnet": tiny_controlnet(), **components}
    pipe = make_pipeline(blocks, **components)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.to(dtype)
    return pipe


def loop_inputs(workflow: str, steps: int = 5) -> dict[str, Any]:
    """What a call needs besides the prompt."""
    inputs: dict[str, Any] = {"num_inference_steps": steps}
    if "inpainting" in workflow:
        inputs |= {"image": tiny_picture(1), "mask_image": tiny_mask(), "strength": 1.0}
    if "controlnet" in workflow:
        inputs |= {"control_image": tiny_picture(2)}
    return inputs


def tiny_plan(steps: int) -> StepPlan:
    """The plan that a tiny pipeline makes for itself."""
    scheduler = PeRFlowScheduler(**BETAS)
    scheduler.set_timesteps(steps)
    assert scheduler.plan is not None
    return scheduler.plan


def predicted_clean(steps: int, i: int, latents: Tensor, noise_pred: Tensor) -> Tensor:
    """The clean latents by the core's formula, for step i of as many steps."""
    scheduler, plan = PeRFlowScheduler(**BETAS), tiny_plan(steps)
    window = window_table(scheduler.windows, scheduler.alphas_cumprod.double())[plan.window_index[i]]
    return predict_x0(latents, noise_pred, window, plan.times[i], plan.prediction_type)


def guard_against_reads(pipe: Any) -> None:
    """From now on a read of the device within the loops' steps fails."""
    for loop in find_loops(pipe._blocks):
        vars(loop)["_run"] = _guarded(loop._run)


def _guarded(steps: Callable[..., int]) -> Callable[..., int]:
    def run(*args: Any) -> int:
        with no_host_reads():
            return steps(*args)

    return run


def poison(unet: nn.Module, timestep: int, picture: int = 0, dtypes: tuple[torch.dtype, ...] | None = None) -> Any:
    """Makes the UNet's prediction for a picture infinite at a timestep, where it computes in one of the types."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        if dtypes is not None and output[0].dtype not in dtypes:
            return None
        broken = output[0].clone()
        broken[picture] += torch.where(args[1] == timestep, math.inf, 0.0)  # without reading the timestep
        return (broken,)

    return unet.register_forward_hook(hook)


def make_float16_overflow(model: Any) -> None:
    """Scales values and output of an attention, in float32 without effect: the values leave float16's range."""
    for block in model.mid_block.attentions[0].transformer_blocks:
        block.attn1.to_v.weight.data *= 2.0**17
        block.attn1.to_out[0].weight.data *= 2.0**-17
