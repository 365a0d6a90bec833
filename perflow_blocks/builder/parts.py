"""Where each component of a pipeline comes from: decided before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
from diffusers import ModelMixin, MultiControlNetModel, SchedulerMixin
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from .problems import Problems
from .settings import BuilderSettings, ComponentChoice
from .weight_check import component_config, is_model

REQUIRED = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
"""What a pipeline cannot do without, where its blocks take it and the source does not say that it has none."""

REQUIRED_BY_WORKFLOWS = ("controlnet", "image_encoder")
"""What a workflow cannot do without, and blocks for several of them can."""

Origin = Literal["given", "load", "create", "single file", "own", "none"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A component that the blocks expect.

    Attributes:
        name: the pipeline's name for it.
        origin: "given" by the user; to "load" or "create" by `spec`; in the "single file"; the pipeline's "own", made
            from the blocks' configuration; or "none".
        spec: how to load or create it.
        value: what was given.
        freeze: whether its weights take no gradients.
        left_out: for "none": whether the user or the source says so.
    """

    name: str
    origin: Origin
    spec: ComponentSpec
    value: Any = None
    freeze: bool = False
    left_out: bool = False

    @property
    def is_model(self) -> bool:
        return isinstance(self.value, nn.Module) if self.origin == "given" else is_model(self.spec.type_hint)


def resolve_parts(pipe: Any, settings: BuilderSettings, in_file: set[str], problems: Problems) -> dict[str, Part]:
    """
    Args:
        pipe: the pipeline with nothing loaded, whose specs say what the source's index says.
        in_file: the models that the single file holds.
    """
    expected = {spec.name: spec for spec in pipe.blocks.expected_components}
    for name in settings.components:
        if name not in expected:
            problems.add(
                f"unknown component {name!r}: {type(pipe.blocks).__name__} takes {', '.join(expected)}"
                + (f" in the workflow {settings.workflow}" if settings.workflow else "")
                + "; pass one of these, or other blocks."
            )
    parts = {}
    for name in expected:
        spec = pipe.get_component_spec(name)
        if name in settings.components:
            parts[name] = _chosen(name, settings.components[name], expected, problems)
        elif name in in_file:
            parts[name] = Part(name=name, origin="single file", spec=spec)
        elif spec.type_hint is None:  # the index says [null, null]: SDXL's refiner has no first text encoder
            made = expected[name].default_creation_method == "from_config"
            origin: Origin = "create" if made else "none"
            parts[name] = Part(name=name, origin=origin, spec=expected[name], left_out=name in REQUIRED)
        elif spec.default_creation_method == "from_config":
            parts[name] = Part(name=name, origin="own", spec=spec)
        elif spec.pretrained_model_name_or_path:
            parts[name] = Part(name=name, origin="load", spec=_of_source(spec, settings))
        else:
            parts[name] = Part(name=name, origin="none", spec=spec)
    return parts


def _of_source(spec: ComponentSpec, settings: BuilderSettings) -> ComponentSpec:
    """With the repository's revision and variant, where the component is in that repository."""
    source = settings.repository
    if source is not None and str(spec.pretrained_model_name_or_path) == source.location:
        spec.revision = source.revision or spec.revision
        if is_model(spec.type_hint):
            spec.variant = source.variant or spec.variant
    return spec


def _chosen(name: str, choice: ComponentChoice, expected: Mapping[str, ComponentSpec], problems: Problems) -> Part:
    value, spec = choice.value, copy(expected[name])
    if value is None:
        if choice.freeze or choice.loading:
            options = ", ".join([*(["freeze"] if choice.freeze else []), *choice.loading])
            problems.add(f"{name}: {options} do nothing to a component that is left out; leave them out too.")
        return Part(name=name, origin="none", spec=spec, left_out=True)
    if name == "controlnet" and isinstance(value, (list, tuple)):
        with problems.noted(TypeError, about="controlnet: "):
            value = MultiControlNetModel(value)
    if isinstance(value, (str, Path)):
        value = ComponentSpec(
            name, spec.type_hint, pretrained_model_name_or_path=str(value), **_loading(choice, problems)
        )
        # What a directory lacks is told with its other files.
        local = Path(str(value.pretrained_model_name_or_path)).exists()
        with suppress(OSError, ValueError) if local else problems.noted(about=f"{name}: "):
            value.type_hint = _named_class(value)
    elif choice.loading:
        problems.add(f"{name}: {', '.join(choice.loading)} are for what is loaded from a directory; leave them out.")
    if isinstance(value, ComponentSpec):
        spec = copy(value)
        spec.name, spec.type_hint = name, spec.type_hint or expected[name].type_hint
        origin: Origin = "create" if spec.default_creation_method == "from_config" else "load"
        if origin == "load" and not spec.pretrained_model_name_or_path:
            problems.add(f"{name}: the ComponentSpec names no pretrained_model_name_or_path; pass one that does.")
        _check_kind(name, spec.type_hint, expected, problems)
        part = Part(name=name, origin=origin, spec=spec, freeze=choice.freeze)
    else:
        _check_kind(name, type(unwrap_module(value)) if not isinstance(value, type) else value, expected, problems)
        if isinstance(value, type):
            problems.add(f"{name}: {value.__name__} is a class; pass an instance, a ComponentSpec or a directory.")
            return Part(name=name, origin="none", spec=spec, left_out=True)
        part = Part(name=name, origin="given", spec=spec, value=value, freeze=choice.freeze)
    if choice.freeze and not part.is_model:
        problems.add(f"{name}: freeze=True is for models, and this is none; leave it out.")
    return part


def _loading(choice: ComponentChoice, problems: Problems) -> dict[str, Any]:
    known = [name for name in ComponentSpec.loading_fields() if name != "pretrained_model_name_or_path"]
    for name in choice.loading:
        if name not in known:
            problems.add(f"{name}={choice.loading[name]!r} is no field of a ComponentSpec; pass {', '.join(known)}.")
    return {"subfolder": "", **{name: value for name, value in choice.loading.items() if name in known}}


def _named_class(spec: ComponentSpec) -> Any:
    """The class that a diffusers model's configuration names, such as a ControlNet-Union; else the one expected."""
    if not (isinstance(spec.type_hint, type) and issubclass(spec.type_hint, ModelMixin)):
        return spec.type_hint
    if Path(str(spec.pretrained_model_name_or_path)).is_file():
        return spec.type_hint
    return getattr(diffusers, component_config(spec).get("_class_name", ""), spec.type_hint)


def _check_kind(name: str, kind: Any, expected: Mapping[str, ComponentSpec], problems: Problems) -> None:
    """A component of another role, or of none, is a mistake; another class for the same role need not be one."""
    wanted = expected[name].type_hint
    if not isinstance(wanted, type) or not isinstance(kind, type) or issubclass(kind, wanted):
        return
    others = [spec.type_hint for spec in expected.values() if isinstance(spec.type_hint, type)]
    of_another_role = any(issubclass(kind, other) for other in others)
    of_no_role = is_model(wanted) != is_model(kind) or (
        issubclass(wanted, SchedulerMixin) and not issubclass(kind, SchedulerMixin)
    )
    if of_another_role or of_no_role or name == "unet":
        problems.add(f"{name}: {kind.__name__} is no {wanted.__name__}; pass one.")
