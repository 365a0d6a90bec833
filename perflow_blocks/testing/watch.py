"""States and pipelines that remember what a block asked of them.

One idea for all: each holds what the block declares and nothing else, so whatever is asked for and not there was read
without being declared. That catches `getattr(..., None)`, `hasattr` and `.get(...)` as well, which raise nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from diffusers import StableDiffusionXLModularPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.modular_pipelines.modular_pipeline import BlockState, ModularPipeline, PipelineState

STOCK_PROBES = {"watermark"}
"""What diffusers' own steps look for without declaring it; a block that extends such a step is not to blame."""


class Watch:
    """The names that a block read, though they were not there, and those that it wrote."""

    def __init__(self) -> None:
        self.inputs: set[str] = set()
        self.components: set[str] = set()
        self.configs: set[str] = set()
        self.state_writes: set[str] = set()
        self.block_state_writes: set[str] = set()
        self._paused = False

    def note(self, names: set[str], name: Any) -> None:
        """Adds what was read, unless it is private (an underscore in front) or the watch is paused."""
        if isinstance(name, str) and not name.startswith("_") and not self._paused:
            names.add(name)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Reads inside do not count."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before


def watched_state(watch: Watch, values: Mapping[str, Any], kinds: Mapping[str, list[str]]) -> PipelineState:
    """A pipeline state of these values; `kinds` holds the names for each `kwargs_type` that is declared."""

    class WatchedValues(dict[str, Any]):
        def get(self, key: Any, default: Any = None) -> Any:
            return self[key] if key in self else default

        def pop(self, key: Any, *default: Any) -> Any:
            _ = key in self
            return super().pop(key, *default)

        def __contains__(self, key: Any) -> bool:
            found = super().__contains__(key)
            if not found:
                watch.note(watch.inputs, key)
            return found

        def __missing__(self, key: Any) -> Any:
            watch.note(watch.inputs, key)
            raise KeyError(key)

        def __setitem__(self, key: str, value: Any) -> None:
            watch.state_writes.add(key)
            super().__setitem__(key, value)

    class WatchedState(PipelineState):
        def get_by_kwargs(self, kwargs_type: str) -> dict[str, Any]:
            if kwargs_type not in kinds:
                watch.note(watch.inputs, kwargs_type)
            return super().get_by_kwargs(kwargs_type)

    return WatchedState(values=WatchedValues(values), kwargs_mapping={kind: [*names] for kind, names in kinds.items()})


def watched_block_state(watch: Watch, values: Mapping[str, Any]) -> BlockState:
    """A block state with these attributes."""

    class WatchedBlockState(BlockState):
        def __getattr__(self, name: str) -> Any:  # called for what is not there
            watch.note(watch.inputs, name)
            raise AttributeError(f"the block state has no {name!r}")

        def __setattr__(self, name: str, value: Any) -> None:
            watch.block_state_writes.add(name)
            super().__setattr__(name, value)

    block_state = WatchedBlockState()
    block_state.__dict__.update(values)
    return block_state


def watched_pipeline(watch: Watch, pipe: ModularPipeline) -> ModularPipeline:
    """Turns a new pipeline into one that is watched, through its properties and methods too.

    One of no particular model becomes an SDXL pipeline, which is where such a block runs.
    """
    kind: Any = StableDiffusionXLModularPipeline if type(pipe) is ModularPipeline else type(pipe)

    class WatchedPipeline(kind):
        @property
        def config(self) -> FrozenDict:
            return _watched_config(watch, self._internal_dict)

        def __getattr__(self, name: str) -> Any:  # called for what is not there
            if name not in STOCK_PROBES:
                watch.note(watch.components, name)
            return super().__getattr__(name)

        def __setattr__(self, name: str, value: Any) -> None:
            hasattr(self, name)  # notes what is not there
            super().__setattr__(name, value)

        def update_components(self, **kwargs: Any) -> None:
            for name in kwargs:
                if name not in self._config_specs:
                    hasattr(self, name)
            super().update_components(**kwargs)

    WatchedPipeline.__name__ = kind.__name__
    pipe.__class__ = WatchedPipeline
    return pipe


def _watched_config(watch: Watch, values: Mapping[str, Any]) -> FrozenDict:
    class WatchedConfig(FrozenDict):
        def get(self, key: Any, default: Any = None) -> Any:
            return self[key] if key in self else default

        def __contains__(self, key: Any) -> bool:
            found = super().__contains__(key)
            if not found:
                watch.note(watch.configs, key)
            return found

        def __missing__(self, key: Any) -> Any:
            watch.note(watch.configs, key)
            raise KeyError(key)

        def __getattr__(self, name: str) -> Any:
            watch.note(watch.configs, name)
            raise AttributeError(f"the configuration has no {name!r}")

    return WatchedConfig(values)
