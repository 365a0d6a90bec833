"""The contract of a block, checked by running it alone: it takes and gives what it declares, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import BlockState, ModularPipelineBlocks, PipelineState

from .components import make_pipeline
from .declarations import declaration_faults
from .trial import Trial
from .watch import watched_pipeline


class BlockContractError(AssertionError):
    """A block does something other than it declares. One line for each fault: block, rule, names and remedy."""


def check_block(
    block: ModularPipelineBlocks,
    *,
    components: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    i: int = 0,
) -> PipelineState | BlockState:
    """Runs one block alone on tiny components, and checks that it keeps its contract.

    The rules: a block reads only inputs that it declares, in whatever way it reads them; writes all the outputs that
    it declares and no others, and changes no tensor of its inputs in place unless that is an output; touches only
    components and configuration values that it declares, directly or through a property of the pipeline (such as
    `vae_scale_factor`, which looks at the VAE); returns `(components, state)`; is described, as are its typed
    parameters; declares no name twice.

    Three kinds of block are known by what they are: those of a pipeline, called as `block(components, state)`; those
    of a loop, called as `block(components, block_state, i=i, t=t)`, for one step; and loops and assembled blocks,
    whose blocks run together, those of diffusers without blame. What the loop itself provides, `window_index` and
    `stop_requested`, is read without declaring it. The block runs as a shallow copy, so that it stays as it is.

    Example:
        >>> import torch
        >>> from diffusers.modular_pipelines import InputParam, ModularPipelineBlocks, OutputParam
        >>> from perflow_blocks.testing import check_block
        >>> class DampStep(ModularPipelineBlocks):
        ...     @property
        ...     def description(self):
        ...         return "Loop step that makes the prediction smaller."
        ...     @property
        ...     def inputs(self):
        ...         return [
        ...             InputParam("noise_pred", required=True, type_hint=torch.Tensor, description="The prediction."),
        ...             InputParam("damping", type_hint=float, default=0.5, description="Factor on the prediction."),
        ...         ]
        ...     @property
        ...     def intermediate_outputs(self):
        ...         return [OutputParam("noise_pred", type_hint=torch.Tensor, description="The smaller prediction.")]
        ...     def __call__(self, components, block_state, i, t):
        ...         block_state.noise_pred = block_state.noise_pred * block_state.damping
        ...         return components, block_state
        >>> block_state = check_block(DampStep(), inputs={"noise_pred": torch.ones(1, 4, 16, 16)})
        >>> block_state.noise_pred.mean().item()
        0.5

    Args:
        block: the block, of this project, of diffusers or of yours.
        components: components and configuration values to use in place of the tiny ones and the defaults, by name.
            What the block does not declare is left out.
        inputs: values of inputs, in place of the tiny ones and the defaults, and where there are none.
        i: the number of the step, for a block of a loop.

    Returns:
        The state that the block leaves: the pipeline's, or for a block of a loop the block state.

    Raises:
        BlockContractError: the block breaks a rule. One line for each fault; those of its declarations, if it has
            any, are named before it runs.
        ValueError: an input or a component that it requires is neither given nor known, or `inputs` names one that
            it does not declare; or `block` is none.
    """
    if not isinstance(block, ModularPipelineBlocks):
        raise ValueError(f"{block!r} is no block; pass an instance of a block class, such as MyStep().")
    _raise_if(block, declaration_faults(block))
    trial = Trial(block, inputs or {}, i)
    pipe = watched_pipeline(trial.watch, make_pipeline(block, components or {}))
    try:
        with torch.no_grad():
            trial.run(pipe)
    except Exception as error:
        _raise_if(block, trial.faults(), error)
        raise
    _raise_if(block, trial.faults())
    return trial.state


def _raise_if(block: ModularPipelineBlocks, faults: Iterable[str], cause: Exception | None = None) -> None:
    lines = [f"{type(block).__name__} {fault}." for fault in faults]
    if lines:
        raise BlockContractError("\n".join(lines)) from cause
