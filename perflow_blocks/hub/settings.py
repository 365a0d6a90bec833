"""The settings of a pipeline that an index keeps: configuration values, windows, guidance, attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import ClassifierFreeGuidance
from diffusers.guiders import BaseGuidance
from diffusers.utils import logging

from ..attention.config import parse_plan
from ..attention.strategies import BUILT_IN
from ..blocks.merge_delta import is_default_guider
from ..blocks.set_timesteps import OWN_ATTRIBUTE
from ..builder.problems import Problems
from ..schedulers.scheduling_perflow import PeRFlowScheduler, is_perflow_scheduler
from .entries import Entry, is_stock, library_of

logger = logging.get_logger(__name__)

DELTA_VALUES = ("delta", "delta_scale", "delta_variant")

PACKAGE = library_of(PeRFlowScheduler)


def config_values(pipe: Any, blocks: Any, problems: Problems) -> dict[str, Any]:
    """Every configuration value that is not None, with what scheduler, guider and attention add, in JSON's types.

    Without those about the delta, which follow from `choose_delta`.
    """
    declared = {spec.name: spec.default for spec in blocks.expected_configs}
    values = {name: pipe.config.get(name, default) for name, default in declared.items()}
    for name, value in {
        **_windows(pipe, problems),
        **_guidance_scale(pipe, blocks),
        **_attention(pipe, values),
    }.items():
        if name in values:
            values[name] = value
        elif value is not None:
            problems.add(
                f"the blocks have no configuration value {name}, which would have to keep {value!r}; insert the block "
                "that declares it, or take the setting back."
            )
    for name in DELTA_VALUES:
        values.pop(name, None)
    kept = {name: value for name, value in values.items() if value is not None or declared[name] is not None}
    return {name: _in_json(name, value, problems) for name, value in kept.items()}


def guider_entry(pipe: Any, blocks: Any, problems: Problems) -> Entry | None:
    """The guider as a component of its own, where it is one that a user set and its scale does not say it all."""
    guider = _loaded_guider(pipe, problems)
    if not isinstance(guider, BaseGuidance) or is_default_guider(guider) or _is_usual(guider, blocks):
        return None
    if not is_stock(type(guider)):
        problems.add(
            f"guider is a {type(guider).__module__}.{type(guider).__qualname__}, which no index can name; use one of "
            "diffusers, or make a block that declares it."
        )
        return None
    return Entry(name="guider", kind=type(guider), location=None, subfolder="guider", component=_settled(guider))


def _loaded_guider(pipe: Any, problems: Problems) -> Any:
    """The pipeline's, or the one that its index names and that was not loaded."""
    guider = getattr(pipe, "guider", None)
    spec = pipe.get_component_spec("guider") if guider is None and "guider" in pipe._component_specs else None
    if spec is None or not spec.pretrained_model_name_or_path:
        return guider
    with problems.noted(AttributeError, about="guider, which the index names, does not load: "):
        return spec.load()
    return None


def _guidance_scale(pipe: Any, blocks: Any) -> dict[str, float]:
    guider = getattr(pipe, "guider", None)
    if not isinstance(guider, BaseGuidance) or is_default_guider(guider) or not _is_usual(guider, blocks):
        return {}
    return {"guidance_scale": float(vars(guider)["guidance_scale"])}


def _is_usual(guider: BaseGuidance, blocks: Any) -> bool:
    """Whether it is of the default's class and differs from it in the scale at most."""
    has_scale = any(spec.name == "guidance_scale" for spec in blocks.expected_configs)
    usual = ClassifierFreeGuidance()
    return has_scale and type(guider) is type(usual) and _others(_settled(guider)) == _others(usual)


def _others(guider: BaseGuidance) -> dict[str, Any]:
    return {k: value for k, value in guider.config.items() if not k.startswith("_") and k != "guidance_scale"}


def _settled(guider: BaseGuidance) -> BaseGuidance:
    """The guider made anew from its settings as they are now, which may have been set as attributes."""
    now = {name: vars(guider).get(name, value) for name, value in guider.config.items() if not name.startswith("_")}
    return type(guider)(**now)


def _windows(pipe: Any, problems: Problems) -> dict[str, Any]:
    """What a PeRFlowScheduler says that a user set; one that the blocks made follows the configuration anyway."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or not is_perflow_scheduler(scheduler) or vars(scheduler).get(OWN_ATTRIBUTE, False):
        return {}
    config, usual = scheduler.config, PeRFlowScheduler().config
    for name in ("set_alpha_to_one", "t_noise", "t_clean"):
        if config[name] != usual[name]:
            problems.add(
                f"the scheduler has {name}={config[name]}, which no configuration value keeps; set one with "
                f"{name}={usual[name]}."
            )
    # None too: what the configuration says of windows would hold otherwise.
    return {name: config[name] for name in ("prediction_type", "num_time_windows", "window_boundaries")}


def _attention(pipe: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The plan that a call would take: of a component that was not run yet, else the configuration's."""
    attention: Any = getattr(pipe, "attention", None)
    is_new = hasattr(attention, "is_new_to") and attention.is_new_to(pipe)
    plan = parse_plan(attention.config.plan if is_new else values.get("attention_plan"))
    if plan is None:
        return {"attention_plan": None} if is_new and "attention_plan" in values else {}
    entries = plan.as_list()
    for name in {entry.rsplit("=", 1)[-1] for entry in entries} - set(BUILT_IN):
        logger.warning(
            "The export does not hold the attention strategy %r, which was registered outside this package: whoever "
            "loads the export must register it first.",
            name,
        )
    return {"attention_plan": entries}


def _in_json(name: str, value: Any, problems: Problems) -> Any:
    try:
        value = json.loads(json.dumps(value))
    except (TypeError, ValueError):
        problems.add(f"the configuration value {name}={value!r} is none of JSON; set one that is.")
    if isinstance(value, str) and Path(value).is_absolute():
        problems.add(f"the configuration value {name}={value!r} is a path of this machine; set a relative one.")
    return value
