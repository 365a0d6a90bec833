"""The contract of a block, checked by running it alone: it takes and gives what it declares, and nothing else."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

import diffusers
import torch
import transformers
from diffusers.modular_pipelines.modular_pipeline import (
    BlockState,
    LoopSequentialPipelineBlocks,
    ModularPipeline,
    ModularPipelineBlocks,
    PipelineState,
)
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam
from torch import Tensor

from ..blocks.loop_block import LoopBlock
from . import tiny

LISTS = {
    "inputs": "InputParam",
    "intermediate_outputs": "OutputParam",
    "expected_components": "ComponentSpec",
    "expected_configs": "ConfigSpec",
}
STOCK_PROBES = frozenset({"watermark"})
"""What diffusers' own steps look for without declaring it; a block that extends such a step is not to blame."""
TINY: dict[type, Callable[[], Any]] = {
    diffusers.AutoencoderKL: tiny.tiny_vae,
    diffusers.ControlNetModel: tiny.tiny_controlnet,
    diffusers.ControlNetUnionModel: tiny.tiny_controlnet_union,
    diffusers.UNet2DConditionModel: tiny.tiny_sdxl_unet,
    diffusers.UNet2DModel: tiny.tiny_unconditional_unet,
    transformers.CLIPImageProcessor: tiny.tiny_feature_extractor,
    transformers.CLIPTextModel: lambda: tiny.tiny_sdxl_components()["text_encoder"],
    transformers.CLIPTextModelWithProjection: lambda: tiny.tiny_sdxl_components()["text_encoder_2"],
    transformers.CLIPTokenizer: tiny.tiny_tokenizer,
    transformers.CLIPVisionModelWithProjection: tiny.tiny_image_encoder,
}
_TEXTS = ("prompt_embeds", "pooled_prompt_embeds", "add_time_ids")
CONDITIONING = frozenset({*_TEXTS, *(f"negative_{name}" for name in _TEXTS)})
"""What the tiny UNet needs, and what an input gets that has no name and collects the `denoiser_input_fields`."""
LOOP_NAMES = frozenset({"window_index", "stop_requested"})
"""What the loop itself puts on the block state: blocks inside read it without declaring it."""


class BlockContractError(AssertionError):
    """A block does something other than it declares. One line for each fault: block, rule, names and remedy."""


def check_block(
    block: ModularPipelineBlocks,
    *,
    components: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    i: int = 0,
) -> PipelineState | BlockState:
    """Runs one block alone on tiny components, twice, and checks that it keeps its contract.

    The rules: a block reads only inputs and components that it declares, directly or through a property of the
    pipeline (such as `vae_scale_factor`, which looks at the VAE); writes all the outputs that it declares, of their
    types, and no others; changes no tensor of its inputs in place unless that is an output; leaves the same at the
    second call; returns `(components, state)`; is described, as are its typed parameters; declares no name twice. It
    runs as a shallow copy.

    A block of a loop, called as `block(components, block_state, i=i, t=t)`, runs one step; what the loop provides,
    `window_index` and `stop_requested`, it reads without declaring it. Of an assembled block the declarations and the
    result are checked; check what its own blocks read and write one by one.

    Args:
        block: the block, of this project, of diffusers or of yours.
        components: components and configuration values in place of the tiny ones and the defaults, by name.
        inputs: values of inputs in place of the tiny ones and the defaults, and where there are none; also of
            `window_index` and `stop_requested`.
        i: the number of the step, for a block of a loop.

    Returns:
        The state that the block leaves after its first call: the pipeline's, or for a block of a loop the block state.

    Raises:
        BlockContractError: the block breaks a rule. Faults of its declarations are named before it runs.
        ValueError: an input or a component that it requires is neither given nor known, or `inputs` names one that
            it does not declare; or `block` is not a block.
    """
    if not isinstance(block, ModularPipelineBlocks):
        raise ValueError(f"{block!r} is not a block; pass an instance of a block class, such as MyStep().")
    _raise_if(block, _declaration_faults(block))
    runner, kind = copy.copy(block), type(block.init_pipeline())
    kind = diffusers.StableDiffusionXLModularPipeline if kind is ModularPipeline else kind
    pipe = type(kind.__name__, (_Recording, kind), {})(block)
    _fill_components(pipe, block, components or {})
    states = [_run(runner, pipe, inputs or {}, i) for _ in range(2)]
    first, second = map(_public, states)
    other = {name for name, value in first.items() if not _same(value, second.get(name))}
    text = "leaves another {} at the second call; keep nothing between calls, and draw from the generator"
    _raise_if(block, _faults({text: other}))
    return states[0]


class _Recording:
    """Mixed into a pipeline or a state that holds what the block declares: notes what is asked for and not there."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            if not name.startswith("_"):
                vars(self).setdefault("_asked", set()).add(name)
            raise AttributeError(f"{type(self).__name__} has no {name!r}") from None


class _RecordingState(_Recording, PipelineState):
    def get(self, keys: str | list[str], default: Any = None) -> Any:
        for name in [keys] if isinstance(keys, str) else keys:
            hasattr(self, name)
        return super().get(keys, default)


def _run(block: ModularPipelineBlocks, pipe: Any, inputs: Mapping[str, Any], i: int) -> Any:
    """One call of a block on values of its own; gives the state that it leaves.

    Raises:
        BlockContractError: what it did differs from what it declares.
    """
    in_loop = len(inspect.signature(block.__call__).parameters) > 2
    known = {**tiny.tiny_inputs(), **inputs}
    of_loop = {"window_index": known["step_plan"].window_index[i], "stop_requested": False} if in_loop else {}
    of_loop |= {name: inputs[name] for name in of_loop if name in inputs}
    given, kinds = _fill_inputs(block.inputs, {**of_loop, **inputs}, {**of_loop, **known}, type(block).__name__)
    if unknown := [name for name in inputs if name not in given and name not in of_loop]:
        raise ValueError(f"{type(block).__name__} declares no input {_quoted(unknown)}; leave it out of `inputs`.")
    before = {name: _copied(value) for name, value in given.items()}
    state: Any = _RecordingState(values=dict(before), kwargs_mapping=kinds)
    if in_loop:
        before = {**of_loop, **vars(block.get_block_state(state))}
        state = type("BlockState", (_Recording, BlockState), {})(**before)

    def steps(first: int) -> Any:
        return [block(pipe, state, i=k, t=known["timesteps"][k]) for k in range(first, i + 1)]

    vars(pipe).pop("_asked", None)
    try:
        with torch.no_grad():
            if isinstance(block, LoopBlock):
                block.start(pipe, state)
            result = steps(i)[0] if in_loop else block(pipe, state)
            if isinstance(block, LoopBlock):
                block.finish(pipe, state, steps)
    except Exception as error:
        _raise_if(block, _read_faults(block, pipe, state, error), error)
        raise
    faults = [*_read_faults(block, pipe, state), *_write_faults(block, _public(state), before, given)]
    if not isinstance(result, tuple) or len(result) != 2 or result[0] is not pipe or result[1] is not state:
        faults.append(f"returns something else; end with `return components, {'block_state' if in_loop else 'state'}`")
    _raise_if(block, faults)
    return state


def _read_faults(block: Any, pipe: Any, state: Any, error: Exception | None = None) -> list[str]:
    inputs = set(vars(state).get("_asked", ()))
    if isinstance(error, AttributeError) and isinstance(error.obj, BlockState):
        inputs.add(error.name)
    found = {
        "reads {} without declaring it; add InputParam({first}, ...) to `inputs`": inputs,
        "touches the component {} without declaring it, directly or through a property or method of the pipeline; add "
        "ComponentSpec({first}, ...) to `expected_components`": vars(pipe).get("_asked", set()) - STOCK_PROBES,
    }
    return [] if _is_assembled(block) else _faults(found)


def _write_faults(block: Any, after: Mapping[str, Any], before: Mapping[str, Any], given: Any) -> list[str]:
    outputs = {output.name: output.type_hint for output in block.intermediate_outputs if output.name}
    written = {name: value for name, value in after.items() if value is not before.get(name, block)}
    kinds = {name: hint for name, hint in outputs.items() if isinstance(hint, type) and written.get(name) is not None}
    found = {
        "writes {} without declaring it; add OutputParam({first}, ...) to `intermediate_outputs`": (
            written.keys() - outputs.keys()
        ),
        "changes {} in place, which is not an output; work on a copy, or add OutputParam({first}, ...)": {
            name for name in given.keys() - outputs.keys() if not _same(before.get(name), given[name])
        },
        "does not write {}, declared in `intermediate_outputs`; set it on the block state, and in a block of a "
        "pipeline end with `self.set_block_state(state, block_state)`": outputs.keys() - after.keys(),
        "writes {}, which is not of the declared type_hint; make the two agree": {
            name for name, hint in kinds.items() if not isinstance(written[name], hint)
        },
    }
    return [] if _is_assembled(block) else _faults(found)


def _declaration_faults(block: ModularPipelineBlocks) -> list[str]:
    """What is wrong with the declarations of a block and of those inside it; diffusers' are taken as they are."""
    faults = []
    base = next(kind for kind in type(block).__mro__ if kind.__module__.startswith("diffusers."))
    if not _is_assembled(block) and base.__module__ == ModularPipelineBlocks.__module__:
        for attribute, kind in LISTS.items():
            entries = getattr(block, f"loop_{attribute}" if block.sub_blocks else attribute)
            named = [(entry.name or entry.kwargs_type, entry) for entry in entries]
            place = f"declares {{}} in `{attribute}`"
            found = {
                f"{place} more than once; keep one of each": {
                    name for name, count in Counter(name for name, _ in named).items() if count > 1
                },
                f"{place} without a type; pass type_hint= to {kind}": {
                    name for name, entry in named if getattr(entry, "type_hint", entry) is None
                },
                f"{place} without a description; pass description= to {kind}": {
                    name for name, entry in named if not (entry.description or "").strip()
                },
            }
            faults += _faults(found)
        if not block.description:
            faults.append("has no description; add a property `description` that says what the block does")
    for inner in block.sub_blocks.values():
        faults += [f"holds {type(inner).__name__}, which {fault}" for fault in _declaration_faults(inner)]
    return faults


def _fill_components(pipe: Any, block: ModularPipelineBlocks, given: Mapping[str, Any]) -> None:
    """Gives the block's pipeline all its components; `given` wins, also over configuration values."""
    components = {}
    for name in pipe.components:
        kind = pipe.get_component_spec(name).type_hint
        if name in given:
            components[name] = given[name]
        elif kind in TINY:
            components[name] = TINY[kind]()
        elif isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin):
            components[name] = kind(**tiny.BETAS)
        elif getattr(pipe, name) is None:
            raise ValueError(
                f"{type(block).__name__} needs the component {name!r}, for which there is no tiny one; "
                f'pass components={{"{name}": ...}}.'
            )
    pipe.register_components(**components)
    declared = {spec.name for spec in block.expected_configs}
    pipe.update_components(**{name: value for name, value in given.items() if name in declared})


def _fill_inputs(
    params: list[InputParam], given: Mapping[str, Any], known: Mapping[str, Any], block_name: str
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """A value for each declared input, as a pipeline would hand them to the block, and their names by `kwargs_type`.

    Optional inputs keep their defaults, but for some without which little would run. An input without a name, which
    collects all of a `kwargs_type`, gets what is given beyond the declared names.
    """
    names = {param.name for param in params}
    also = {"generator", "prompt"} | (set() if "prompt" in names else CONDITIONING)
    values: dict[str, Any] = {}
    kinds: dict[str, list[str]] = {}
    for param in params:
        of_kind = kinds.setdefault(param.kwargs_type, [])
        if not param.name:
            collected = CONDITIONING if param.kwargs_type == "denoiser_input_fields" else frozenset()
            of_kind.extend(collected | (given.keys() - names - LOOP_NAMES))
            values |= {name: known[name] for name in of_kind}
            continue
        required = param.default is None and (param.required or param.name in also)
        if required and param.name not in known:
            raise ValueError(
                f"{block_name} requires the input {param.name!r}, for which there is no tiny value; "
                f'pass inputs={{"{param.name}": ...}}.'
            )
        values[param.name] = known[param.name] if required or param.name in given else param.default
        of_kind.append(param.name)
    return values, {kind: names for kind, names in kinds.items() if kind}


def _is_assembled(block: ModularPipelineBlocks) -> bool:
    return bool(block.sub_blocks) and not isinstance(block, LoopSequentialPipelineBlocks)


def _copied(value: Any) -> Any:
    """A value for one call: tensors and generators of its own, also in lists."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_copied, value))
    if isinstance(value, Tensor):
        return value.clone()
    return value.clone_state() if isinstance(value, torch.Generator) else value


def _same(one: Any, other: Any) -> bool:
    """Whether tensors, alone or in lists, are equal but for rounding; other values count as equal."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.allclose(one.float(), other.float(), 1e-3, 1e-4, equal_nan=True)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return True


def _public(state: Any) -> dict[str, Any]:
    """What a state holds; a name with an underscore in front is the block's own affair."""
    held = state.values if isinstance(state, PipelineState) else vars(state)
    return {name: value for name, value in held.items() if not name.startswith("_")}


def _quoted(names: Iterable[str]) -> str:
    return " and ".join(map(repr, names))


def _faults(found: Mapping[str, Set[str]]) -> list[str]:
    """The sentences whose names are not none, filled in."""
    return [text.format(_quoted(sorted(names)), first=f'"{min(names)}"') for text, names in found.items() if names]


def _raise_if(block: ModularPipelineBlocks, faults: Iterable[str], cause: Exception | None = None) -> None:
    if lines := [f"{type(block).__name__} {fault}." for fault in faults]:
        raise BlockContractError("\n".join(lines)) from cause
