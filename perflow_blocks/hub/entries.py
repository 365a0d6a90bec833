"""The components of a pipeline as entries of an index: where each is loaded from, and which are saved beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec
from diffusers.utils.torch_utils import unwrap_module
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..blocks.saving import adapter_problems, component_problems, stock_scheduler
from ..blocks.set_timesteps import scheduler_source
from ..blocks.settings import foreign, is_stock, library_of
from ..builder.problems import Problems

WeightsMode = Literal["reference", "include", "delta-only"]

_SNAPSHOT = re.compile(r"/models--(?P<id>[\w.-]+)/snapshots/(?P<sha>[0-9a-f]{40})/?$")
"""A repository of the Hub as it lies in the cache, from where `load_workflow` loads what it holds."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One component of an index.

    Attributes:
        name: of the component, "unet" say.
        kind: its class; None to let diffusers find it out.
        location: repository of the Hub or URL; None for the exported repository itself.
        subfolder, variant, revision: as in a ComponentSpec.
        component: what is saved into the subfolder, where the location is None.
    """

    name: str
    kind: type | None
    location: str | None
    subfolder: str = ""
    variant: str | None = None
    revision: str | None = None
    component: Any = None

    def to_index(self, repo_id: str | None) -> list[Any]:
        """As diffusers writes it; `repo_id` stands for the exported repository, if it is known."""
        kind = [None, None] if self.kind is None else [library_of(self.kind), self.kind.__name__]
        source = {
            "type_hint": kind,
            "pretrained_model_name_or_path": self.location or repo_id,
            "subfolder": self.subfolder,
            "variant": self.variant,
            "revision": self.revision,
        }
        return [*kind, source]


def component_entries(
    pipe: Any, blocks: Any, weights: WeightsMode, exclude: Collection[str], problems: Problems
) -> list[Entry]:
    """An entry for each component that has a source or is saved; what blocks declare by themselves needs none.

    Those to exclude get none.
    """
    entries: list[Entry] = []
    private: dict[str, list[str]] = {}
    declared = {spec.name: spec for spec in blocks.expected_components}
    unknown = sorted(set(exclude) - declared.keys())
    if unknown:
        problems.add(f"exclude names {', '.join(unknown)}; the components are {', '.join(declared)}.")
    for name, spec in declared.items():
        if spec.default_creation_method != "from_pretrained":
            continue
        if name in exclude or _is_absent(name, pipe):
            continue
        if name == "scheduler":
            entry = _scheduler(pipe, spec, private, problems)
        elif weights == "include":
            entry = _included(name, pipe, problems)
        else:
            entry = _referenced(name, pipe, spec, private, problems)
        if entry is not None:
            entries.append(entry)
    for location, names in private.items():
        problems.add(
            f"{location}, where {', '.join(names)} came from, is a place that others do not have; call "
            "pipe.load_components() and pass weights='include'."
        )
    return entries


def _is_absent(name: str, pipe: Any) -> bool:
    """Whether a plain `model_index.json` said that it has no such component, read as one of no type."""
    return getattr(pipe, name, None) is None and pipe.get_component_spec(name).type_hint is None


def is_on_hub(location: str) -> bool:
    """Whether a component's source is one that others can read too: an id of the Hub or a URL of it, no path."""
    if location.startswith("https://"):
        return True
    looks_local = os.path.isabs(location) or location.startswith((".", "~")) or Path(location).exists()
    return not looks_local and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", location) is not None


def _referenced(
    name: str, pipe: Any, declared: ComponentSpec, private: dict[str, list[str]], problems: Problems
) -> Entry | None:
    spec, component = pipe.get_component_spec(name), getattr(pipe, name, None)
    location = spec.pretrained_model_name_or_path
    if component is not None:
        _note(name, adapter_problems(name, component), problems)
        _note_tokens(name, component, problems)
    if location is None:
        if component is not None:
            problems.add(
                f"{name} was put in as an object, so that no repository is known for it; pass weights='include', or "
                "load it by its repository with pipe.load_components()."
            )
        return None
    if location == declared.pretrained_model_name_or_path:
        return None
    snapshot = _SNAPSHOT.search(Path(location).as_posix())
    if snapshot is not None:
        spec = replace(spec, pretrained_model_name_or_path=snapshot["id"].replace("--", "/"), revision=snapshot["sha"])
    elif not is_on_hub(str(location)):
        private.setdefault(str(location), []).append(name)
        return None
    return _entry_of(name, spec, problems)


def _included(name: str, pipe: Any, problems: Problems) -> Entry | None:
    component = getattr(pipe, name, None)
    if component is None:
        location = pipe.get_component_spec(name).pretrained_model_name_or_path
        if location is not None:
            problems.add(
                f"{name} of {location} is not loaded, so that its weights cannot be included; call "
                f"pipe.load_components(), or pass exclude=['{name}'] to leave it out, or weights='reference'."
            )
        return None
    component = unwrap_module(component) if isinstance(component, nn.Module) else component
    _note(name, component_problems(name, component), problems)
    return Entry(name=name, kind=type(component), location=None, subfolder=name, component=component)


def _scheduler(pipe: Any, declared: ComponentSpec, private: dict[str, list[str]], problems: Problems) -> Entry | None:
    """Never the class of this package, which its own block makes from the stock scheduler and the configuration."""
    source = scheduler_source(pipe)
    if source is not None:
        location = str(source.pretrained_model_name_or_path)
        if location == declared.pretrained_model_name_or_path:
            return None
        if is_on_hub(location) and source.type_hint is not None and is_stock(source.type_hint):
            return _entry_of("scheduler", source, problems)
    if pipe.scheduler is None:
        if source is not None:
            private.setdefault(str(source.pretrained_model_name_or_path), []).append("scheduler")
        return None
    stock = stock_scheduler(pipe.scheduler)
    if not is_stock(type(stock)):
        _note("scheduler", [foreign("scheduler", stock)], problems)
    return Entry(name="scheduler", kind=type(stock), location=None, subfolder="scheduler", component=stock)


def _entry_of(name: str, spec: ComponentSpec, problems: Problems) -> Entry:
    if spec.type_hint is not None and not is_stock(spec.type_hint):
        _note(name, [foreign(name, spec.type_hint)], problems)
    return Entry(
        name=name,
        kind=spec.type_hint,
        location=str(spec.pretrained_model_name_or_path),
        subfolder=spec.subfolder or "",
        variant=spec.variant,
        revision=spec.revision,
    )


def _note(name: str, sentences: Iterable[str], problems: Problems) -> None:
    for sentence in sentences:
        problems.add(f"{sentence.removesuffix('.')}, or pass exclude=['{name}'].")


def _note_tokens(name: str, component: Any, problems: Problems) -> None:
    """Words that a tokenizer has learned since it was loaded, which a reference does not know."""
    if isinstance(component, PreTrainedTokenizerBase) and len(component) > component.vocab_size:
        added = [token for token, number in component.get_added_vocab().items() if number >= component.vocab_size]
        problems.add(
            f"{name} has {len(added)} tokens more than its vocabulary ({', '.join(added[:3])}), as after a textual "
            "inversion, which no index can name; pass weights='include'."
        )
