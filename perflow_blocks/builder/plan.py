"""What would be built: blocks, components and where they come from, and all that is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ComponentsManager, MultiControlNetModel
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor

from ..blocks.merge_delta import require_configured_delta
from . import checks, single_file
from .adapter_checks import check_given_adapters, check_ip_adapter, check_loras
from .arrangement import arrange_blocks
from .parts import REQUIRED, REQUIRED_BY_WORKFLOWS, Part, resolve_parts
from .placement import resolve_device, resolve_dtype
from .problems import Problems
from .settings import BuilderSettings, ComponentChoice
from .sharing import ComponentKey, component_key, find_shared
from .weight_check import component_config, require_loadable


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """
    Attributes:
        settings: the builder's, with what follows from them.
        pipe: the pipeline with nothing loaded, not yet of a ComponentsManager.
        parts: its components by name.
        keys: what each component is shared by.
        shared: the components that are there already.
        config: the pipeline's configuration values as they will be.
        device, dtype: of its models.
        problems: one sentence for each mistake.
    """

    settings: BuilderSettings
    pipe: Any
    parts: Mapping[str, Part]
    keys: Mapping[str, ComponentKey]
    shared: Mapping[str, Any]
    config: Mapping[str, Any]
    device: torch.device
    dtype: torch.dtype
    problems: tuple[str, ...]


def make_plan(settings: BuilderSettings, manager: ComponentsManager) -> BuildPlan:
    """Reads indexes, configurations and the headers of files; loads no weight and changes no component."""
    problems = Problems()
    settings = _with_image_encoder(settings)
    checks.check_conflicts(settings, problems)
    blocks = arrange_blocks(settings, problems)
    shapes, location = _read_sources(settings, problems)
    pipe, readable = _empty_pipeline(blocks, settings, location, problems)
    in_file = single_file.models_in(shapes) if shapes is not None else set()
    parts = resolve_parts(pipe, settings, in_file, problems)
    device = resolve_device(settings, problems)
    given = {name: part.value for name, part in parts.items() if part.origin == "given" and part.is_model}
    dtype = resolve_dtype(settings, given, device, problems)
    _check_hooks(manager, settings, device, problems)
    declared = list(dict.fromkeys(spec.name for spec in blocks.expected_configs))
    checks.check_config(declared, settings.config, problems)
    config = _configuration(pipe, declared, settings, problems)
    _check_files(parts, problems)
    if readable:
        _check_missing(parts, settings, problems)
    unet = _empty_unet(parts, blocks, dtype, problems)
    if unet is not None:
        _check_controlnet(parts, unet, problems)
    from_file = "unet" in parts and parts["unet"].origin == "single file"
    if unet is not None and shapes is not None and settings.single_file is not None and from_file:
        with problems.noted():
            single_file.require_unet(settings.single_file.path, shapes, unet)
    _check_steps(settings, parts, config, unet, device, problems)
    keys = {
        name: component_key(part, settings, config, dtype, device, manager)
        for name, part in parts.items()
        if part.origin in ("load", "single file", "given")
    }
    shared = find_shared(manager, parts, keys, settings)
    check_given_adapters(parts, shared, settings, problems)
    return BuildPlan(
        settings=settings,
        pipe=pipe,
        parts=parts,
        keys=keys,
        shared=shared,
        config=config,
        device=device,
        dtype=dtype,
        problems=tuple(problems),
    )


def _check_steps(
    settings: BuilderSettings,
    parts: Mapping[str, Part],
    config: Mapping[str, Any],
    unet: Any,
    device: torch.device,
    problems: Problems,
) -> None:
    """The weights that are added, guidance and attention, against the parts and the UNet without values."""
    given_unet = parts["unet"].value if "unet" in parts and parts["unet"].origin == "given" else None
    checks.check_delta(config, unet, given_unet if unet is not None else None, problems)
    check_loras(settings.loras, list(parts), unet, problems)
    check_ip_adapter(settings.ip_adapter, list(parts), unet, problems)
    if settings.ip_adapter is not None and "image_encoder" in parts and parts["image_encoder"].origin == "none":
        problems.add('with_ip_adapter needs an image encoder; pass with_component("image_encoder", ...).')
    for step, name, value in (
        ("with_guider", "guider", settings.guider or settings.guidance),
        ("with_attention", "attention", settings.attention),
    ):
        if value is not None and name not in parts:
            problems.add(f"{step}: the blocks take no {name}; pass blocks that do.")
    checks.check_guidance(settings, problems)
    checks.check_attention(settings.attention, unet, device, problems)
    if settings.attention is None:
        planned = config.get("attention_plan")
        checks.check_attention(
            planned, unet, device, problems, about=f"the configuration's attention_plan={planned!r}"
        )


def _with_image_encoder(settings: BuilderSettings) -> BuilderSettings:
    """An IP-Adapter brings its image encoder, unless one is given."""
    adapter = settings.ip_adapter
    if adapter is None or adapter.image_encoder_folder is None or "image_encoder" in settings.components:
        return settings
    folder = adapter.image_encoder_folder
    if "/" not in folder and adapter.subfolder:
        folder = f"{adapter.subfolder}/{folder}"
    choice = ComponentChoice(value=adapter.location, loading={"subfolder": folder})
    return replace(settings, components={**settings.components, "image_encoder": choice})


def _read_sources(settings: BuilderSettings, problems: Problems) -> tuple[dict[str, Tensor] | None, str | None]:
    """The single file's tensors without values, and where the index is."""
    if settings.single_file is None:
        return None, None if settings.repository is None else settings.repository.location
    path, config = settings.single_file.path, settings.single_file.config
    usable = config is None or not Path(config).is_dir() or (Path(config) / "model_index.json").is_file()
    if not usable:
        problems.add(
            f"from_single_file: config={config} holds no model_index.json; pass the directory of a saved "
            "StableDiffusionXLPipeline (without weights will do)."
        )
    with problems.noted():
        shapes = single_file.read_shapes(path)
        if "unet" not in single_file.models_in(shapes):
            raise ValueError(
                f"from_single_file: {path} holds no UNet under the names of original checkpoints; pass a whole "
                "checkpoint, or a model in diffusers' layout with from_pretrained or with_unet."
            )
        return shapes, single_file.config_location(config, shapes) if usable else None
    return None, None


def _empty_pipeline(
    blocks: Any,
    settings: BuilderSettings,
    location: str | None,
    problems: Problems,
) -> tuple[Any, bool]:
    """The pipeline with nothing loaded, and whether what it lacks can be told (not if its index could not be read)."""
    kind = type(blocks.init_pipeline())
    if location is None:
        return kind(blocks=blocks), settings.single_file is None
    revision = settings.repository.revision if settings.repository is not None else None
    try:
        return kind(blocks=blocks, pretrained_model_name_or_path=location, revision=revision), True
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        problems.add(
            f"{location} cannot be read ({reason}); pass a directory with model_index.json or "
            "modular_model_index.json, or a repository such as owner/name."
        )
        return kind(blocks=blocks), False


def _check_hooks(
    manager: ComponentsManager, settings: BuilderSettings, device: torch.device, problems: Problems
) -> None:
    hooks = manager.model_hooks
    if not hooks:
        return
    found = hooks[0].hook.execution_device
    if (settings.device is not None or settings.offload) and found != device:
        problems.add(
            f"the ComponentsManager moves models to {found}, and this pipeline is to run on {device}; name the same "
            "device, or use another manager."
        )
    if settings.compile is not None or settings.offload == "group":
        step = "with_compile" if settings.compile is not None else "offload('group')"
        problems.add(f"{step} does not go with a ComponentsManager that moves models; use another manager.")


def _configuration(pipe: Any, declared: list[str], settings: BuilderSettings, problems: Problems) -> dict[str, Any]:
    """The configuration values: the index's, then the steps'. A delta is named by its whole path where it is local."""
    config = {name: pipe.config[name] for name in declared}
    config |= {name: value for name, value in settings.config_values.items() if name in config}
    named, origin = config.get("delta"), pipe._pretrained_model_name_or_path
    if named is not None:
        config["delta"] = None
        with problems.noted():
            require_configured_delta(named)
            local = origin is not None and Path(origin).is_dir()
            config["delta"] = str((Path(origin) / named).resolve()) if local else named
    return config


def _check_files(parts: Mapping[str, Part], problems: Problems) -> None:
    for part in parts.values():
        if part.origin == "load" and part.spec.pretrained_model_name_or_path:
            with problems.noted():
                require_loadable(part.spec)


def _check_missing(parts: Mapping[str, Part], settings: BuilderSettings, problems: Problems) -> None:
    reduced = settings.workflow is not None and not any(problem.startswith("with_workflow") for problem in problems)
    needed = [*REQUIRED, *(REQUIRED_BY_WORKFLOWS if reduced else ())]
    missing = [name for name in needed if name in parts and parts[name].origin == "none" and not parts[name].left_out]
    if missing:
        sourceless = settings.repository is None and settings.single_file is None
        remedy = "call from_pretrained or from_single_file, or " if sourceless else ""
        problems.add(f"{', '.join(missing)} missing: neither given nor in the source; {remedy}pass with_component.")


def _empty_unet(parts: Mapping[str, Part], blocks: Any, dtype: torch.dtype, problems: Problems) -> Any:
    """The UNet without values; None where its architecture cannot be known."""
    part = parts.get("unet")
    if part is None or part.origin == "none" or any(problem.startswith("unet:") for problem in problems):
        return None
    if part.origin == "single file" and not part.spec.pretrained_model_name_or_path:
        return None  # what is wrong with its configuration is told already
    try:
        config = _config_of(part)
        checks.check_unet(config, blocks.model_name, problems)
        return checks.empty_unet(config, dtype)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        problems.add(f"unet: its configuration cannot be read ({reason}); pass another model.")
        return None


def _config_of(part: Part) -> Mapping[str, Any]:
    if part.origin == "given":
        return unwrap_module(part.value).config
    if part.origin == "create":
        return part.spec.config or {}
    if not part.spec.pretrained_model_name_or_path:
        raise ValueError(f"nothing says where the {part.name} is")
    return component_config(part.spec)


def _check_controlnet(parts: Mapping[str, Part], unet: Any, problems: Problems) -> None:
    part = parts.get("controlnet")
    if part is None or part.origin == "none":
        return
    models = [part.value]
    if part.origin == "given" and isinstance(part.value, MultiControlNetModel):
        models = list(part.value.nets)
    for model in models:
        try:
            config = _config_of(replace(part, value=model))
        except (OSError, ValueError, AttributeError):
            return  # what is wrong with it is told elsewhere
        checks.check_controlnet(config.get("cross_attention_dim"), unet.config.cross_attention_dim, problems)
