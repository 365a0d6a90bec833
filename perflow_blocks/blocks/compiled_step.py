"""The whole step as one function: networks, guidance and solver, compiled once for all steps."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam
from torch import Tensor

from ..core.step_plan import apply_step
from .controlnet_denoiser import PeRFlowControlNetLoopDenoiser
from .denoiser import PeRFlowLoopDenoiser, predict_noise
from .inputs import step_coefficients_input
from .loop_block import LoopBlock
from .recombine import find_loops
from .settled_guidance import settings_of, settle
from .solver import PeRFlowLoopSolverStep

STEP = "step"
"""The name of the block that stands for `denoiser` and `solver`."""

GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""The modes of torch.compile that capture CUDA graphs."""


def guided_step(
    networks: Sequence[Any],
    guider: Any,
    t: Tensor,
    latents: Tensor,
    row: Tensor,
    names: Sequence[str],
    call: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """One step of the loop, tensors in and tensors out: what `torch.compile` is given.

    Args:
        networks: the UNet, and the ControlNet where there is one.
        guider: combines the predictions by their names; None where there is one only.
        t: the timestep, of no dimensions.
        latents: (batch, channels, height/f, width/f) at the start of the step.
        row: (4,), the step's coefficients A, B, C, D.
        names: what the guider calls the predictions, in the order of their rows.
        call: the further arguments of `predict_noise`.

    Returns:
        The latents at the end of the step and the guided prediction, both shaped like the latents.
    """
    noise_pred = predict_noise(networks, t, **call)
    if guider is not None:
        parts = dict(zip(names, noise_pred.chunk(len(names)), strict=True))
        # By its name, since an attribute of the guider's output cannot be traced.
        noise_pred = guider.forward(**parts)["pred"].to(latents.dtype)
    return apply_step(latents, noise_pred, row[0], row[1]), noise_pred


class PeRFlowCompiledLoopStep(PeRFlowLoopDenoiser, LoopBlock):
    """Denoiser and solver as one function, compiled by `torch.compile(fullgraph=True)` at its first step.

    Later steps and later calls with the same shapes use what was compiled, also with another guidance scale or other
    numbers of steps; where guidance starts or stops within the run, there are two functions. `compile_loops` puts it
    into assembled blocks. What it needs: `ClassifierFreeGuidance`, and attention strategies that can be traced.

    With `mode="reduce-overhead"` torch captures CUDA graphs. Its inputs suit them: conditions and samples lie at the
    same addresses in all steps of a run. An attention strategy that torch.compile cannot trace, such as `sage`, is
    replaced by native attention in the function, with a warning.

    Example:
        >>> blocks = PeRFlowSDXLAutoBlocks()
        >>> compile_loops(blocks, mode="reduce-overhead")
        4
        >>> pipe = blocks.init_pipeline("stabilityai/stable-diffusion-xl-base-1.0")

    Args:
        options: arguments of `torch.compile` besides `fullgraph`, such as `mode`, `dynamic` or `backend`.

    Raises:
        ValueError: at once, for an option that `torch.compile` does not have. Before the first step, for another
            guider, for offloaded models, or for an attention strategy that CUDA graphs may not capture. At a step,
            where torch has compiled for as many kinds of input as it allows.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = set(inspect.signature(torch.compile).parameters) - {"model", "fullgraph"}
        for name in options.keys() - known:
            raise ValueError(
                f"{name}={options[name]!r} is no option of a compiled step, which is always one graph; pass some of "
                f"{', '.join(sorted(known))}."
            )
        self.options = options
        self._compiled: Callable[..., tuple[Tensor, Tensor]] | None = None

    @property
    def description(self) -> str:
        return "Loop step that is compiled: networks, guidance and the solver's multiply-add as one function."

    @property
    def inputs(self) -> list[InputParam]:
        return [*super().inputs, step_coefficients_input()]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [*super().intermediate_outputs, *PeRFlowLoopSolverStep().intermediate_outputs]

    def start(self, components: Any, block_state: Any) -> None:
        settings_of(components.guider)
        for network in self._networks(components):
            if hasattr(network, "_hf_hook") or _is_group_offload_enabled(network):
                raise ValueError(
                    f"{type(network).__name__} is offloaded, and its hooks cannot be compiled into the step; keep it "
                    "on the device, or leave the loop as it is."
                )

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        batches = self._batches(components, block_state, i, t)
        names = [batch[components.guider._identifier_key] for batch in batches]
        guider = self._settled(components.guider, block_state) if len(batches) > 1 else None
        if self._compiled is None:
            # A code object of its own: torch counts the compilations of each, up to a limit.
            function = types.FunctionType(guided_step.__code__.replace(), guided_step.__globals__)
            self._compiled = torch.compile(function, fullgraph=True, **self.options)
        if self._captured:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            latents, noise_pred = self._compiled(
                self._networks(components),
                guider,
                t,
                block_state.latents,
                block_state.step_coefficients[i],
                names,
                self._gather(block_state, batches, i),
            )
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise ValueError(
                "the step was compiled for as many sizes and kinds of input as torch allows; raise "
                "torch._dynamo.config.recompile_limit, or forget what was compiled with torch.compiler.reset()."
            ) from error
        if self._captured:  # what a graph returns is overwritten by its next run
            latents, noise_pred = latents.clone(), noise_pred.clone()
        block_state.latents, block_state.noise_pred = latents, noise_pred
        return components, block_state

    @property
    def _captured(self) -> bool:
        settings = self.options.get("options") or {}
        by_name = self.options.get("mode") in GRAPH_MODES or self.options.get("backend") == "cudagraphs"
        return by_name or bool(settings.get("triton.cudagraphs"))

    def _settled(self, guider: Any, block_state: Any) -> Any:
        """The guider's formula, made again where a block changed its settings since the last step."""
        settings = settings_of(guider)
        before = block_state["_settled_guidance"]
        if before is None or before[0] != settings:
            before = (settings, settle(settings, block_state.latents.device))
            block_state["_settled_guidance"] = before
        return before[1]


class PeRFlowControlNetCompiledLoopStep(PeRFlowCompiledLoopStep, PeRFlowControlNetLoopDenoiser):
    """The same with a ControlNet in the function. A step at which it is out of force is another function."""

    def _gather(self, block_state: Any, batches: list[Any], i: int) -> dict[str, Any]:
        call = super()._gather(block_state, batches, i)
        if "control" in call:
            settings = call["control"]["settings"]
            scale = settings["conditioning_scale"]
            if "control_type_idx" in settings and not isinstance(scale, list):
                scale = [scale] * len(block_state.controlnet_cond)  # a ControlNet-Union would do so with a float only
            call["control"]["settings"] = {**settings, "conditioning_scale": _on_device(scale, block_state)}
        return call


def compile_loops(blocks: ModularPipelineBlocks, **options: Any) -> int:
    """Puts a compiled step in the place of `denoiser` and `solver` in every loop. Do so before `init_pipeline`.

    Args:
        blocks: assembled blocks, at any depth, or one loop.
        options: arguments of `torch.compile` besides `fullgraph`, such as `mode`, `dynamic` or `backend`.

    Returns:
        The number of loops.

    Raises:
        ValueError: no loop, or one whose denoiser or solver is another than the preset's, or with a block between the
            two, which would have nothing to see. Nothing is changed then.
    """
    loops = list(find_loops(blocks))
    if not loops:
        raise ValueError(f"{type(blocks).__name__} holds no denoising loop; pass blocks that hold one, or a loop.")
    for loop in loops:
        _require_preset(type(loop).__name__, loop.sub_blocks)
    for loop in loops:
        kind = _COMPILED[type(loop.sub_blocks["denoiser"])]
        index = list(loop.sub_blocks).index("denoiser")
        del loop.sub_blocks["denoiser"], loop.sub_blocks["solver"]
        loop.sub_blocks.insert(STEP, kind(**options), index)
    return len(loops)


_COMPILED: dict[type, type[PeRFlowCompiledLoopStep]] = {
    PeRFlowLoopDenoiser: PeRFlowCompiledLoopStep,
    PeRFlowControlNetLoopDenoiser: PeRFlowControlNetCompiledLoopStep,
}


def _require_preset(loop: str, blocks: Mapping[str, ModularPipelineBlocks]) -> None:
    names = list(blocks)
    present = f"the blocks of {loop} are {', '.join(names)}"
    if "denoiser" not in blocks or "solver" not in blocks:
        raise ValueError(f"{present}; only a loop with `denoiser` and `solver` can be compiled.")
    between = names[names.index("denoiser") + 1 : names.index("solver")]
    if between:
        raise ValueError(
            f"{present}; {', '.join(between)} would stand within the compiled step; put it before the denoiser "
            "or after the solver."
        )
    given = blocks["denoiser"], blocks["solver"]
    if type(given[0]) not in _COMPILED or type(given[1]) is not PeRFlowLoopSolverStep:
        kinds = " and ".join(type(block).__name__ for block in given)
        raise ValueError(f"{kinds} of {loop} cannot be compiled as one step; compile the UNet alone instead.")


def _on_device(scale: float | list[float], block_state: Any) -> Any:
    """A scale as a tensor of no dimensions, a list as a list of them; each number is copied once in a run."""
    known: dict[float, Tensor] = vars(block_state).setdefault("_control_scales", {})
    if isinstance(scale, list):
        return [_on_device(entry, block_state) for entry in scale]
    if scale not in known:
        known[scale] = torch.tensor(scale, device=block_state.latents.device)
    return known[scale]
