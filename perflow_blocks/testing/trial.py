"""One run of one block on watched states, and where what it did differs from what it declares."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from diffusers.modular_pipelines.modular_pipeline import (
    BlockState,
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
    PipelineState,
)
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, InsertableDict
from torch import Tensor

from ..blocks.loop_block import LoopBlock
from .declarations import is_stock
from .inputs import fill_inputs, tiny_inputs
from .watch import Watch, watched_block_state, watched_state

LOOP_NAMES = frozenset({"window_index", "stop_requested"})
"""What the loop itself puts on the block state: blocks inside read it without declaring it."""


class Trial:
    """A block, what it is given, and what it does with it.

    Args:
        block: the block.
        given: values of inputs, in place of the tiny ones and the defaults.
        i: the number of the step, for a block of a loop.

    Raises:
        ValueError: an input that it requires is neither given nor known, one is given that it does not declare, or
            there is no step i.
    """

    def __init__(self, block: ModularPipelineBlocks, given: Mapping[str, Any], i: int) -> None:
        self.block, self.watch = block, Watch()
        self.in_loop = _is_loop_block(block)
        params, self.outputs = _inputs_and_outputs(block, given)
        asked = [param for param in params if not self.in_loop or param.name in given or param.name not in LOOP_NAMES]
        self.values, kinds = fill_inputs(asked, given, type(block).__name__)
        unknown = [name for name in given if name not in self.values]
        if unknown:
            raise ValueError(f"{type(block).__name__} declares no input {_quoted(unknown)}; leave it out of `inputs`.")
        self.i, self.timesteps, self.window_index = i, *_schedule(self.values)
        if not 0 <= i < len(self.timesteps):
            raise ValueError(f"i={i} is none of the {len(self.timesteps)} steps; pass 0 to {len(self.timesteps) - 1}.")
        self.provided = {"window_index": self.window_index[i], "stop_requested": False} if self.in_loop else {}
        declared = {param.name for param in params}
        self.values = {name: value for name, value in self.provided.items() if name in declared} | self.values
        self.versions = [(name, tensor, tensor._version) for name, tensor in _tensors(self.values)]
        self.state: Any = watched_state(self.watch, self.values, kinds)
        self.result: Any = None
        self.unset: list[str] = []
        self.finished = False

    def run(self, pipe: Any) -> None:
        """Calls the block; one of a loop at its step, between what it does before the first and after the last."""
        self.pipe = pipe
        self.result = self._step() if self.in_loop else self._whole()
        self.finished = True

    def _whole(self) -> Any:
        runner = _with_stock_unwatched(self.block, self.watch)

        def get_block_state(state: PipelineState) -> BlockState:
            return watched_block_state(self.watch, vars(self.block.get_block_state(state)))

        def set_block_state(state: PipelineState, block_state: BlockState) -> None:
            self.unset = [name for name in self.outputs if name not in vars(block_state)]
            with self.watch.paused():
                self.block.set_block_state(state, block_state)

        vars(runner).update(get_block_state=get_block_state, set_block_state=set_block_state)
        return runner(self.pipe, self.state)

    def _step(self) -> Any:
        runner = copy.copy(self.block)
        self.values = vars(self.block.get_block_state(self.state))
        self.values = self.provided | self.values
        self.state = watched_block_state(self.watch, self.values)

        def steps(first: int) -> Any:
            return [runner(self.pipe, self.state, i=k, t=self.timesteps[k]) for k in range(first, self.i + 1)]

        if isinstance(runner, LoopBlock):
            runner.start(self.pipe, self.state)
        (result,) = steps(self.i)
        if isinstance(runner, LoopBlock):
            runner.finish(self.pipe, self.state, steps)
        return result

    def faults(self) -> Iterator[str]:
        """What the block did against its declarations, as "rule and names; remedy"."""
        watch, assembled = self.watch, _is_assembled(self.block)
        inside = set(_names_inside(self.block)) if assembled else set()
        free = inside | (LOOP_NAMES if self.in_loop else set())
        yield from _fault(
            watch.inputs - free, "reads {} without declaring it; add InputParam({first}, ...) to `inputs`"
        )
        yield from _fault(
            watch.components,
            "touches the component {} without declaring it, directly or through a property or method of the pipeline; "
            "add ComponentSpec({first}, ...) to `expected_components`",
        )
        yield from _fault(
            watch.configs,
            "reads the configuration {} without declaring it; add ConfigSpec({first}, ...) to `expected_configs`",
        )
        yield from _fault(
            self._writes() - set(self.outputs) - inside,
            "writes {} without declaring it; add OutputParam({first}, ...) to `intermediate_outputs`",
        )
        changed = {name for name, tensor, version in self.versions if tensor._version != version}
        yield from _fault(
            changed - set(self.outputs) - inside,
            "changes {} in place, which is no output; work on a copy, or add OutputParam({first}, ...)",
        )
        yield from _fault(
            self._missing(),
            "does not write {}, declared in `intermediate_outputs`; set it on the block state"
            + ("" if self.in_loop else " and end with `self.set_block_state(state, block_state)`"),
        )
        if self.finished:
            yield from self._return_faults()

    def _held(self) -> dict[str, Any]:
        """What the state holds by now."""
        return dict(vars(self.state) if self.in_loop else self.state.values)

    def _writes(self) -> set[str]:
        noted = self.watch.block_state_writes if self.in_loop else self.watch.state_writes
        changed = {name for name, value in self._held().items() if value is not self.values.get(name, self)}
        # As with reads, a name with an underscore in front is the block's own affair, for a loop to keep things in.
        return {name for name in noted | changed if not name.startswith("_")}

    def _missing(self) -> set[str]:
        """Outputs that are not there; also those that were set on the block state and never handed to the state."""
        if not self.finished:
            return set(self.unset)
        kept_back = set() if self.in_loop else self.watch.block_state_writes - self.watch.state_writes
        return {name for name in self.outputs if name in kept_back or name not in self._held()}

    def _return_faults(self) -> Iterator[str]:
        state = "block_state" if self.in_loop else "state"
        if not isinstance(self.result, tuple) or len(self.result) != 2:
            yield f"returns {type(self.result).__name__}; end with `return components, {state}`"
        elif self.result[0] is not self.pipe or self.result[1] is not self.state:
            yield f"returns other objects than it was given; end with `return components, {state}`"


class _Unwatched:
    """A block whose reads do not count."""

    def __init__(self, block: ModularPipelineBlocks, watch: Watch) -> None:
        self.block, self.watch = block, watch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.watch.paused():
            return self.block(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


def _with_stock_unwatched(block: ModularPipelineBlocks, watch: Watch) -> Any:
    """A copy of the block in which diffusers' own blocks, whose declarations nobody here can mend, are not watched."""
    runner = copy.copy(block)
    if block.sub_blocks:
        runner.sub_blocks = InsertableDict(
            (name, _Unwatched(inner, watch) if _is_stock_leaf(inner) else _with_stock_unwatched(inner, watch))
            for name, inner in block.sub_blocks.items()
        )
    return runner


def _is_stock_leaf(block: ModularPipelineBlocks) -> bool:
    return is_stock(type(block)) and not _is_assembled(block)


def _is_assembled(block: ModularPipelineBlocks) -> bool:
    return bool(block.sub_blocks) and not isinstance(block, LoopSequentialPipelineBlocks)


def _is_loop_block(block: ModularPipelineBlocks) -> bool:
    """Whether it takes more than components and state: a step's number and its timestep."""
    return len(inspect.signature(block.__call__).parameters) > 2


def _inputs_and_outputs(block: ModularPipelineBlocks, given: Mapping[str, Any]) -> tuple[list[InputParam], list[str]]:
    """What the block declares; an assembled one, in which blocks are chosen by inputs, for those it is given."""
    params, executed = list(block.inputs), block
    if _is_assembled(block):
        values, _ = fill_inputs(params, given, type(block).__name__)
        executed = block.get_execution_blocks(**values)
        params += executed.inputs if executed is not None else []
    return params, executed.intermediate_output_names if executed is not None else []


def _names_inside(block: ModularPipelineBlocks) -> Iterator[str]:
    """What the blocks of an assembly hand to each other, and what they are chosen by."""
    yield from (name for name in getattr(block, "block_trigger_inputs", ()) if name)
    for inner in block.sub_blocks.values():
        yield from [*inner.input_names, *inner.intermediate_output_names, *_names_inside(inner)]


def _schedule(values: Mapping[str, Any]) -> tuple[Any, Any]:
    """The timesteps and the window of each, as given or tiny; a set-up block may be given timesteps as a list."""
    known = tiny_inputs()
    timesteps, plan = (
        known[name] if values.get(name) is None else values[name] for name in ("timesteps", "step_plan")
    )
    return timesteps, plan.window_index


def _tensors(values: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in values.items():
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, Tensor) and not tensor.is_inference():  # those count no changes
                yield name, tensor


def _fault(names: set[str], text: str) -> Iterator[str]:
    if names:
        yield text.format(_quoted(sorted(names)), first=f'"{min(names)}"')


def _quoted(names: Iterable[str]) -> str:
    return " and ".join(map(repr, names))
