"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .parts import Part
from .plan import BuildPlan
from .settings import BuilderSettings


def describe(plan: BuildPlan) -> str:
    """What would be built, a line for each thing, and the problems at the end."""
    settings = plan.settings
    blocks = f"{type(plan.pipe.blocks).__name__} in a {type(plan.pipe).__name__}"
    if settings.workflow is not None:
        blocks += f", workflow {settings.workflow}"
    rows = [("blocks", blocks), ("source", _source(settings)), ("models", _models(plan)), *_steps(plan)]
    lines = [f"{title:<14}{text}" for title, text in rows]
    lines.append("components")
    width = max((len(name) for name in plan.parts), default=0)
    for name, part in plan.parts.items():
        lines.append(f"  {name:<{width}}  {_kind(part)}: {_origin(part, plan)}")
    if plan.problems:
        lines += ["problems", *(f"  {problem}" for problem in plan.problems)]
    return "\n".join(lines)


def _source(settings: BuilderSettings) -> str:
    if settings.repository is not None:
        extras = {"revision": settings.repository.revision, "variant": settings.repository.variant}
        named = [f"{name} {value}" for name, value in extras.items() if value is not None]
        return ", ".join([settings.repository.location, *named])
    if settings.single_file is not None:
        config = settings.single_file.config or "the repository that diffusers infers"
        return f"{settings.single_file.path}, configuration of {config}"
    return "none"


def _models(plan: BuildPlan) -> str:
    placed = f"{plan.dtype}, on {plan.device}"
    return placed if plan.settings.offload is None else f"{placed}, offload {plan.settings.offload}"


def _steps(plan: BuildPlan) -> Iterator[tuple[str, str]]:
    settings = plan.settings
    if plan.config.get("delta") is not None:
        named = {"variant": plan.config.get("delta_variant"), "at scale": plan.config.get("delta_scale")}
        extras = [f"{key} {value}" for key, value in named.items() if value is not None]
        yield "delta", f"{' '.join([plan.config['delta'], *extras])}, merged by the first call"
    for lora in settings.loras:
        yield "lora", f"{lora.location} as {lora.adapter_name!r}, weight {lora.weight}"
    if settings.ip_adapter is not None:
        adapter = settings.ip_adapter
        yield "ip_adapter", f"{adapter.location}: {', '.join(adapter.weight_names)}, scale {adapter.scale}"
    if settings.guidance is not None:
        yield "guider", f"ClassifierFreeGuidance, {_pairs(settings.guidance)}"
    elif settings.guider is not None:
        yield "guider", type(settings.guider).__name__
    if settings.attention is not None:
        yield "attention", str(settings.attention)
    for name, insertion in sorted(settings.insertions.items()):
        place = f"before {insertion.before}" if insertion.before is not None else f"after {insertion.after}"
        yield "inserted", f"{name}, {place}"
    if settings.prompt_cache is not None:
        yield "prompt cache", f"{settings.prompt_cache} requests"
    if settings.compile is not None:
        yield "compiled", f"the networks {_pairs(settings.compile)}".rstrip()
    config = {name: value for name, value in plan.config.items() if value is not None and not name.startswith("delta")}
    if config:
        yield "config", _pairs(config)


def _pairs(values: Any) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def _kind(part: Part) -> str:
    if part.origin == "given":
        return type(part.value).__name__
    return getattr(part.spec.type_hint, "__name__", "of no known type")


def _origin(part: Part, plan: BuildPlan) -> str:
    frozen = ", frozen" if part.freeze else ""
    if part.origin == "load":
        spec = part.spec
        where = "/".join(str(item) for item in (spec.pretrained_model_name_or_path, spec.subfolder) if item)
        extras = "".join(f", {name} {getattr(spec, name)}" for name in ("variant", "revision") if getattr(spec, name))
        verb = "shared, from" if part.name in plan.shared else "load from"
        return f"{verb} {where}{extras}{frozen}"
    if part.origin == "single file":
        return ("shared, from the file" if part.name in plan.shared else "load from the file") + frozen
    settings = plan.settings
    if (part.name == "guider" and (settings.guider or settings.guidance)) or (
        part.name == "attention" and settings.attention is not None
    ):
        return "as given"
    texts = {"given": "as given", "create": "made from its ComponentSpec", "own": "made by the blocks"}
    return texts.get(part.origin, "left out" if part.left_out else "none") + frozen
