"""Which components builders with one ComponentsManager share, and whether those are still as they were built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ComponentsManager
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from diffusers.utils.torch_utils import unwrap_module

from .parts import Part
from .settings import BuilderSettings

LORA_MODELS = ("unet", "text_encoder", "text_encoder_2")
"""What diffusers loads a LoRA into, all at once."""

MARK_ATTRIBUTE = "_perflow_builder_mark"
"""On a component of a pipeline that was built: its `Mark`."""


@dataclass(frozen=True, kw_only=True)
class ComponentKey:
    """What makes two components one, so that builders with one manager share it.

    Attributes:
        source: where it was loaded from.
        dtype, device: of a model; None for others, and the device where the manager moves models.
        treatment: what was done to its weights, or will be by the pipeline: kinds, each with its values.
    """

    source: str
    dtype: torch.dtype | None
    device: str | None
    treatment: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Adapters:
    """What a model holds beside its own weights: LoRAs by name, and whether there are IP-Adapters."""

    loras: frozenset[str] = frozenset()
    ip: bool = False


@dataclass(frozen=True)
class Mark:
    """What a component was when its pipeline was built."""

    key: ComponentKey
    adapters: Adapters


def adapters_of(component: Any) -> Adapters:
    component = unwrap_module(component)
    projection = getattr(component, "encoder_hid_proj", None)
    loras = frozenset(getattr(component, "peft_config", None) or ())
    return Adapters(loras, isinstance(projection, MultiIPAdapterImageProjection))


def mark(component: Any, key: ComponentKey) -> None:
    setattr(unwrap_module(component), MARK_ATTRIBUTE, Mark(key, adapters_of(component)))


def adapters_of_builder(component: Any) -> Adapters:
    """What the component still holds of the adapters that a builder gave it."""
    found: Mark | None = getattr(unwrap_module(component), MARK_ATTRIBUTE, None)
    treatment = () if found is None else found.key.treatment
    loras = {values[0].adapter_name for kind, *values in treatment if kind == "lora"}
    held = adapters_of(component)
    return Adapters(held.loras & loras, held.ip and any(kind == "ip_adapter" for kind, *_ in treatment))


def component_key(
    part: Part,
    settings: BuilderSettings,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    manager: ComponentsManager,
) -> ComponentKey:
    source = "given"
    if part.origin == "load":
        location = Path(str(part.spec.pretrained_model_name_or_path))
        fields = (part.spec.subfolder, part.spec.variant, part.spec.revision)
        source = "|".join(map(str, (location.resolve() if location.exists() else location, *fields)))
    elif part.origin == "single file" and settings.single_file is not None:
        source = f"{Path(settings.single_file.path).resolve()}|{settings.single_file.config}"
    moved = settings.offload == "auto" or manager.model_hooks is not None
    return ComponentKey(
        source=source,
        dtype=dtype if part.is_model else None,
        device=str(device) if part.is_model and not moved else None,
        treatment=_treatment(part.name, settings, config, part.freeze),
    )


def _treatment(
    name: str, settings: BuilderSettings, config: Mapping[str, Any], freeze: bool
) -> tuple[tuple[Any, ...], ...]:
    """What is done to a component's weights, by the builder or by the pipeline it builds."""
    done: list[tuple[Any, ...]] = [("frozen",)] if freeze else []
    if name == "unet":
        if config.get("delta") is not None:
            done.append(("delta", *(config.get(key) for key in ("delta", "delta_variant", "delta_scale"))))
        done += [("ip_adapter", settings.ip_adapter)] if settings.ip_adapter is not None else []
    if name in LORA_MODELS:
        done += [("lora", lora) for lora in settings.loras]
    if settings.compile is not None and name in ("unet", "controlnet", "vae"):
        done.append(("compiled", *sorted((key, str(value)) for key, value in settings.compile.items())))
    if settings.offload == "group":
        done.append(("group offload",))
    return tuple(done)


def find_shared(
    manager: ComponentsManager, parts: Mapping[str, Part], keys: Mapping[str, ComponentKey], settings: BuilderSettings
) -> dict[str, Any]:
    """The components that are there already and need nothing done to them: given ones, and those of the manager."""
    shared = {}
    for name, key in keys.items():
        part = parts[name]
        if part.origin == "given":
            found = part.value if _is_as_built(part.value, key) else None
        else:
            found = _in_manager(manager, name, key)
        if found is not None:
            shared[name] = found
    group = [name for name in LORA_MODELS if name in parts and parts[name].origin != "none"]
    if settings.loras and not all(name in shared for name in group):
        for name in group:
            shared.pop(name, None)
    return shared


def _in_manager(manager: ComponentsManager, name: str, key: ComponentKey) -> Any:
    for component in manager.get_components_by_ids(manager.get_ids(name), return_dict_with_names=False).values():
        if _is_as_built(component, key) and getattr(component, "dtype", key.dtype) == key.dtype:
            return component
    return None


def _is_as_built(component: Any, key: ComponentKey) -> bool:
    """Whether it was built for this key, and adapters were neither added nor taken out since."""
    return getattr(unwrap_module(component), MARK_ATTRIBUTE, None) == Mark(key, adapters_of(component))
