"""From a plan to a pipeline: loads, puts together, and leaves nothing behind where a part fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from diffusers import ComponentsManager
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from torch import nn

from ..attention.config import AttentionConfig
from ..blocks.merge_delta import PeRFlowMergeDeltaStep
from ..blocks.pipeline import offload_in_groups, put_components
from ..blocks.recombine import compile_loops
from ..blocks.settings import complaint
from . import single_file
from .adapter_loading import add_adapters, no_adapters_where_it_fails
from .checks import make_guider
from .parts import Part
from .placement import CPU
from .plan import BuildPlan
from .sharing import mark


def build_pipeline(plan: BuildPlan, manager: ComponentsManager, collection: str | None) -> Any:
    """The pipeline of a plan without problems.

    Raises:
        ValueError: parts that cannot be loaded after all, each in a sentence; the manager has none of the others then,
            and given models have no more adapters than before.
    """
    pipe, settings = plan.pipe, plan.settings
    given = {name: part.value for name, part in plan.parts.items() if part.origin == "given"}
    components = {**_load(plan), **plan.shared, **given}
    for name, part in plan.parts.items():
        if part.freeze:
            components[name].requires_grad_(False)
    put_components(pipe, components)
    _leave_out(pipe, plan.parts)
    pipe.update_components(**settings.config_values)
    _guide(pipe, plan)
    with no_adapters_where_it_fails(pipe):
        add_adapters(pipe, plan)
        _place(pipe, plan, manager)
    for name, key in plan.keys.items():
        mark(getattr(pipe, name), key)
    if settings.attention is not None:
        given = settings.attention
        attention = given if isinstance(given, AttentionConfig) else AttentionConfig(given)
        pipe.update_components(attention=attention, attention_plan=attention.config.plan)
    if settings.compile is not None:
        compile_loops(pipe, **settings.compile)
    _hand_over(pipe, manager, collection)
    if settings.offload == "auto" and manager.model_hooks is None:
        manager.enable_auto_cpu_offload(device=plan.device)
    return pipe


def merge_now(pipe: Any) -> None:
    """Merges the delta that a call of the pipeline would merge first."""
    for block in pipe.blocks.sub_blocks.values():
        if isinstance(block, PeRFlowMergeDeltaStep):
            block(pipe, PipelineState())


def _load(plan: BuildPlan) -> dict[str, Any]:
    loaded: dict[str, Any] = {}
    failures: list[str] = []
    cause: Exception | None = None
    for name, make in _makers(plan).items():
        try:
            made = make()
            for part, component in made.items():
                _require_values(part, component)
            loaded |= made
        except Exception as error:  # a library's, of any kind: what fails is told with the rest that fails
            failures.append(f"{name}: {error}")
            cause = cause or error
    if failures:
        raise ValueError(complaint("built", failures)) from cause
    return loaded


def _makers(plan: BuildPlan) -> dict[str, Callable[[], dict[str, Any]]]:
    """By what is loaded, the function that loads it."""
    makers: dict[str, Callable[[], dict[str, Any]]] = {}
    wanted = {name: part for name, part in plan.parts.items() if name not in plan.shared}
    for name, part in wanted.items():
        match part.origin:
            case "load":
                makers[name] = partial(_made, name, partial(part.spec.load, dtype=plan.dtype))
            case "create":
                makers[name] = partial(_made, name, part.spec.create)
    in_file = [name for name, part in wanted.items() if part.origin == "single file"]
    source = plan.settings.single_file
    if in_file and source is not None:
        config = str(plan.pipe._pretrained_model_name_or_path)
        makers[source.path] = partial(single_file.load_single_file, source.path, config, in_file, plan.dtype)
    return makers


def _made(name: str, make: Callable[[], Any]) -> dict[str, Any]:
    return {name: make()}


def _require_values(name: str, component: Any) -> None:
    if isinstance(component, nn.Module):
        empty = [key for key, weight in component.named_parameters() if weight.is_meta]
        if empty:
            raise ValueError(f"{len(empty)} weights of the {name} came without values ({empty[0]}, say)")


def _leave_out(pipe: Any, parts: Mapping[str, Part]) -> None:
    present = [n for n, part in parts.items() if part.origin == "none" and getattr(pipe, n) is not None]
    pipe.update_components(**dict.fromkeys(present))


def _guide(pipe: Any, plan: BuildPlan) -> None:
    guider = make_guider(plan.settings)
    if guider is not None:
        pipe.update_components(guider=guider)


def _hand_over(pipe: Any, manager: ComponentsManager, collection: str | None) -> None:
    """Makes the pipeline one of the manager's: as the last step, so that a failure leaves nothing there."""
    pipe._components_manager, pipe._collection = manager, collection
    for name, component in pipe.components.items():
        if component is not None and pipe.get_component_spec(name).default_creation_method == "from_pretrained":
            manager.add(name, component, collection)


def _place(pipe: Any, plan: BuildPlan, manager: ComponentsManager) -> None:
    settings = plan.settings
    if settings.offload == "group":
        for name, model in pipe.components.items():
            if isinstance(model, nn.Module) and name not in plan.shared:
                offload_in_groups(model, onload_device=plan.device, offload_device=CPU, offload_type="leaf_level")
    elif settings.offload is None and settings.device is not None and manager.model_hooks is None:
        pipe.to(plan.device)
