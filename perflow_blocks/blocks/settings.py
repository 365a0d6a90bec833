"""What a saved or exported pipeline keeps of its settings: configuration values, windows, guidance, attention.

Components that blocks make from a configuration are not saved, so their settings become configuration values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np
from diffusers import ClassifierFreeGuidance
from diffusers.guiders import BaseGuidance
from diffusers.utils import logging

from ..attention.config import parse_plan
from ..attention.strategies import BUILT_IN
from ..schedulers.scheduling_perflow import PeRFlowScheduler, is_perflow_scheduler
from .merge_delta import is_default_guider
from .set_timesteps import OWN_ATTRIBUTE

logger = logging.get_logger(__name__)

Complain = Callable[[str], None]
"""Takes a sentence about something that cannot be kept, so that a user reads all of them at once."""

DELTA_VALUES = ("delta", "delta_scale", "delta_variant")
LIBRARIES = ("diffusers", "transformers")
"""Whose classes an index may name, as everyone who loads it has them."""


def library_of(kind: type) -> str:
    """The top-level package that a class is found in by its name."""
    return kind.__module__.split(".")[0]


def is_stock(kind: type) -> bool:
    """Whether a class can be named in an index."""
    library = library_of(kind)
    return library in LIBRARIES and getattr(import_module(library), kind.__name__, None) is not None


def foreign(name: str, component: Any) -> str:
    """The sentence about a component whose class is not stock."""
    kind = component if isinstance(component, type) else type(component)
    known = " or ".join(LIBRARIES)
    return f"{name} is a {kind.__module__}.{kind.__qualname__}, which no index can name; use a class of {known}."


def config_values(pipe: Any, blocks: Any, complain: Complain) -> dict[str, Any]:
    """Every configuration value that is set, with what scheduler, guider and attention add, in JSON's types.

    Without those about the delta, which depend on where its file is.
    """
    declared = {spec.name: spec.default for spec in blocks.expected_configs}
    values = {name: pipe.config.get(name, default) for name, default in declared.items()}
    for name, value in {
        **_windows(pipe, complain),
        **_guidance_scale(pipe, blocks),
        **_attention(pipe, values),
    }.items():
        if name in values:
            values[name] = value
        elif value is not None:
            complain(
                f"the blocks have no configuration value {name}, which would have to keep {value!r}; insert the block "
                "that declares it, or take the setting back."
            )
    for name in DELTA_VALUES:
        values.pop(name, None)
    kept = {name: value for name, value in values.items() if value is not None or declared[name] is not None}
    return {name: _in_json(name, value, complain) for name, value in kept.items()}


def kept_guider(pipe: Any, blocks: Any, complain: Complain) -> BaseGuidance | None:
    """The guider as a component to save, where a user set one that `guidance_scale` alone does not express."""
    guider = _loaded_guider(pipe, complain)
    if not isinstance(guider, BaseGuidance) or is_default_guider(guider) or _is_usual(guider, blocks):
        return None
    if not is_stock(type(guider)):
        complain(foreign("guider", guider))
        return None
    return _settled(guider)


def _loaded_guider(pipe: Any, complain: Complain) -> Any:
    """The pipeline's, or the one that its index names and that was not loaded."""
    guider = getattr(pipe, "guider", None)
    spec = pipe.get_component_spec("guider") if guider is None and "guider" in pipe._component_specs else None
    if spec is None or not spec.pretrained_model_name_or_path:
        return guider
    try:
        return spec.load()
    except (ValueError, OSError, AttributeError) as error:
        complain(f"guider, which the index names, does not load: {error}")
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
    config = {name: value for name, value in guider.config.items() if not name.startswith("_")}
    return type(guider)(**{name: python_number(vars(guider).get(name, value)) for name, value in config.items()})


def _windows(pipe: Any, complain: Complain) -> dict[str, Any]:
    """What a PeRFlowScheduler says that a user set; one that the blocks made follows the configuration anyway."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or not is_perflow_scheduler(scheduler) or vars(scheduler).get(OWN_ATTRIBUTE, False):
        return {}
    config, usual = scheduler.config, PeRFlowScheduler().config
    for name in ("set_alpha_to_one", "t_noise", "t_clean"):
        if config[name] != usual[name]:
            complain(
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
            "The attention strategy %r is not saved, as it was registered outside this package: register it before "
            "loading.",
            name,
        )
    return {"attention_plan": entries}


def _in_json(name: str, value: Any, complain: Complain) -> Any:
    try:
        value = json.loads(json.dumps(value, default=python_number))
    except (TypeError, ValueError):
        complain(f"the configuration value {name}={value!r} is none of JSON; use numbers, texts, booleans or lists.")
    return value


def python_number(value: Any) -> Any:
    """A number of NumPy, which JSON does not know, as Python's; other values as they are."""
    return value.item() if isinstance(value, np.generic) else value


class Problems(list[str]):
    """A sentence for each mistake, so that a user reads all of them at once."""

    add = list[str].append

    @contextmanager
    def noted(self, *kinds: type[Exception], about: str = "") -> Iterator[None]:
        """Turns an error that ends the block into a problem: ValueError, ImportError, OSError, and further `kinds`."""
        caught: tuple[type[Exception], ...] = (ValueError, ImportError, OSError, *kinds)
        try:
            yield
        except caught as error:
            self.append(f"{about}{error}")


def complaint(done: str, problems: list[str]) -> str:
    """The text of the error that nothing was `done`, for these reasons."""
    if len(problems) == 1:
        return f"nothing was {done}: {problems[0]}"
    return "\n".join([f"nothing was {done}, for {len(problems)} reasons:", *(f"- {problem}" for problem in problems)])
