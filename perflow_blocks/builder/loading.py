"""From a plan to a pipeline: loads, puts together, and leaves nothing behind where a part fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import ComponentsManager, ConfigMixin, ModelMixin
from diffusers.hooks import apply_group_offloading
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from torch import nn
from transformers import CLIPImageProcessor

from ..blocks.merge_delta import PeRFlowMergeDeltaStep
from ..components.attention.config import AttentionConfig
from . import single_file
from .checks import LORA_MODELS, make_guider
from .parts import KEY_ATTRIBUTE, Part
from .placement import CPU
from .plan import BuildPlan
from .problems import complaint


def build_pipeline(plan: BuildPlan, manager: ComponentsManager) -> Any:
    """The pipeline of a plan without problems.

    Raises:
        ValueError: parts that cannot be loaded after all, each in a sentence; the manager has none of the others then.
    """
    pipe, settings = plan.pipe, plan.settings
    given = {name: part.value for name, part in plan.parts.items() if part.origin == "given"}
    components = {**_load(plan), **plan.shared, **given}
    for name, part in plan.parts.items():
        if part.freeze:
            components[name].requires_grad_(False)
    _put(pipe, components)
    _leave_out(pipe, plan.parts)
    delta = {} if settings.delta is None else {"delta": settings.delta.path}
    pipe.update_components(**settings.config, **delta)
    _guide(pipe, plan)
    _add_adapters(pipe, plan)
    _place(pipe, plan, manager)
    for name, key in plan.keys.items():
        setattr(getattr(pipe, name), KEY_ATTRIBUTE, key)
    if settings.attention is not None:
        given = settings.attention
        attention = given if isinstance(given, AttentionConfig) else AttentionConfig(given)
        pipe.update_components(attention=attention, attention_plan=attention.config.plan)
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
        raise ValueError(complaint(failures)) from cause
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


def _put(pipe: Any, components: Mapping[str, Any]) -> None:
    bare = {name: component for name, component in components.items() if _has_no_record(pipe, name, component)}
    pipe.register_components(**bare)
    pipe.update_components(**{name: component for name, component in components.items() if name not in bare})


def _has_no_record(pipe: Any, name: str, component: Any) -> bool:
    """Whether it has neither a configuration nor a place that it was loaded from: update_components refuses such."""
    if isinstance(component, (ConfigMixin, nn.Module)):
        return False
    load_id = getattr(component, "_diffusers_load_id", None)
    return load_id == "null" or (load_id is None and name in pipe.config_component_names)


def _leave_out(pipe: Any, parts: Mapping[str, Part]) -> None:
    present = [n for n, part in parts.items() if part.origin == "none" and getattr(pipe, n) is not None]
    pipe.update_components(**dict.fromkeys(present))


def _guide(pipe: Any, plan: BuildPlan) -> None:
    guider = make_guider(plan.settings)
    if guider is not None:
        pipe.update_components(guider=guider)


def _add_adapters(pipe: Any, plan: BuildPlan) -> None:
    """LoRAs and IP-Adapters, unless the models have them from another builder; none of them stays where one fails."""
    settings, adapter = plan.settings, plan.settings.ip_adapter
    if settings.loras and not all(name in plan.shared for name in LORA_MODELS):
        with _undone_by(pipe.unload_lora_weights):
            for lora in settings.loras:
                extra = {} if lora.weight_name is None else {"weight_name": lora.weight_name}
                pipe.load_lora_weights(lora.location, adapter_name=lora.adapter_name, **extra)
            pipe.set_adapters([lora.adapter_name for lora in settings.loras], [lora.weight for lora in settings.loras])
    if adapter is None:
        return
    if "feature_extractor" in plan.parts and "feature_extractor" not in settings.components:
        size = pipe.image_encoder.config.image_size
        pipe.register_components(feature_extractor=CLIPImageProcessor(size=size, crop_size=size))
    if "unet" not in plan.shared:
        with _undone_by(pipe.unload_ip_adapter):
            pipe.load_ip_adapter(adapter.location, subfolder=adapter.subfolder, weight_name=list(adapter.weight_names))
            pipe.set_ip_adapter_scale(adapter.scale)


@contextmanager
def _undone_by(undo: Callable[[], None]) -> Any:
    try:
        yield
    except Exception:
        undo()
        raise


def _place(pipe: Any, plan: BuildPlan, manager: ComponentsManager) -> None:
    settings = plan.settings
    if settings.offload == "auto" and manager.model_hooks is None:
        manager.enable_auto_cpu_offload(device=plan.device)
    elif settings.offload == "group":
        for name, model in pipe.components.items():
            if isinstance(model, nn.Module) and name not in plan.shared:
                offload_in_groups(model, plan.device)
    elif settings.offload is None and settings.device is not None and manager.model_hooks is None:
        pipe.to(plan.device)


def offload_in_groups(model: nn.Module, device: torch.device) -> None:
    """Keeps a model's layers on the CPU and brings each to the device while it runs."""
    places = {"onload_device": device, "offload_device": CPU, "offload_type": "leaf_level"}
    if isinstance(model, ModelMixin):
        model.enable_group_offload(**places)
    else:
        apply_group_offloading(model, **places)
