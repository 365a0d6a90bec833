"""What `save_pretrained` and exports keep of a pipeline, so that blocks, components, settings and image come back.

Components that blocks make from a configuration are not saved: windows and attention plan become configuration values,
and a guider that a user set becomes a component with files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import replace
from importlib import import_module
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import ConfigMixin, EulerDiscreteScheduler
from diffusers.configuration_utils import FrozenDict
from diffusers.guiders import BaseGuidance
from diffusers.models import MultiControlNetModel
from diffusers.modular_pipelines.modular_pipeline import ModularPipeline
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec
from diffusers.utils.torch_utils import unwrap_module
from safetensors.torch import save_file
from torch import nn

from ..attention.config import parse_plan
from ..delta.files import Weights, open_weights, variants_of
from ..delta.merge import MergeRecord, find_merged, merge_record, merge_records
from ..schedulers.scheduling_perflow import (
    BASE_TYPE,
    NOISE_SCHEDULE_KEYS,
    PeRFlowScheduler,
    is_perflow_scheduler,
    settings_of_others,
)
from .block_source import block_files
from .merge_delta import delta_path, is_default_guider, takes_place
from .set_timesteps import OWN_ATTRIBUTE
from .specs import SCHEDULER_SETTINGS

DELTA_VALUES = ("delta", "delta_scale", "delta_variant")
LIBRARIES = ("diffusers", "transformers")
"""Whose classes an index may name, as everyone who loads it has them."""


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

    def refuse(self, done: str) -> None:
        """Raises one ValueError that nothing was `done`, for these reasons; does nothing if there are none."""
        if len(self) == 1:
            raise ValueError(f"nothing was {done}: {self[0]}")
        if self:
            lines = [f"nothing was {done}, for {len(self)} reasons:", *(f"- {problem}" for problem in self)]
            raise ValueError("\n".join(lines))


def prepare(pipe: Any) -> tuple[Any, Weights | None]:
    """A copy of the pipeline that holds what is to be saved, and the delta to copy to its `config.delta`.

    Raises:
        ValueError: names all that cannot be saved.
    """
    problems = Problems()
    saver, values, delta = settled(pipe, problems)
    with problems.noted():
        block_files(pipe.blocks)
    index: dict[str, Any] = {}
    for name, spec in saver._component_specs.items():
        component = unwrap_module(getattr(saver, name, None))
        if spec.default_creation_method != "from_pretrained":
            continue
        place = spec.pretrained_model_name_or_path
        if component is not None:
            problems += component_problems(name, component)
            index[name] = index_entry(spec, type(component))
        elif place and spec.type_hint is not None:  # keeps the place that it can be loaded from
            here = str(Path(place).absolute()) if Path(place).exists() else place
            index[name] = index_entry(replace(spec, pretrained_model_name_or_path=here), None)
    problems.refuse("saved")
    saver._internal_dict = FrozenDict({**index, **values})
    return saver, delta


def settled(pipe: Any, problems: Problems, *, delta_given: bool = False) -> tuple[Any, dict[str, Any], Weights | None]:
    """A copy of the pipeline whose components can be saved, the configuration values, and the delta to copy.

    The components are the pipeline's own, but for the scheduler, which is the stock one that the window set-up
    converts again. Adds what cannot be kept to `problems`.
    """
    blocks, delta = pipe.blocks, None
    saver = copy(pipe)
    saver._component_specs = dict(pipe._component_specs)
    defaults = {spec.name: spec.default for spec in blocks.expected_configs}
    values = {name: pipe.config.get(name, default) for name, default in defaults.items() if name not in DELTA_VALUES}
    with problems.noted():
        set_by_user = {**_windows(pipe, problems), **_attention(pipe, values)}
        values |= {name: value for name, value in set_by_user.items() if name in values}
        values = {name: value for name, value in values.items() if value is not None or defaults[name] is not None}
        if "delta" in defaults:
            delta_values, delta = _delta(pipe, defaults["delta"], delta_given)
            values |= delta_values
    about = "configuration values must be numbers, texts, booleans or lists: "
    with problems.noted(TypeError, AttributeError, about=about):
        values = json.loads(json.dumps(values, default=methodcaller("item")))  # numbers of NumPy as Python's
    for spec in blocks.expected_components:
        if spec.default_creation_method == "from_config" and spec.name != "attention":
            with problems.noted(AttributeError, about=f"{spec.name}: "):
                _settle(saver, spec)
    if pipe.components.get("scheduler") is not None:
        _put(saver, "scheduler", stock_scheduler(pipe.scheduler))
    return saver, values, delta


def _settle(saver: Any, declared: ComponentSpec) -> None:
    """Has a component that blocks make be saved where a user set another one, or the index names one."""
    name, component = declared.name, getattr(saver, declared.name, None)
    if component is None and name == "guider" and saver._component_specs[name].pretrained_model_name_or_path:
        component = saver._component_specs[name].load()
    if isinstance(component, BaseGuidance):
        is_usual = is_default_guider(component)
        if not is_usual and is_stock(type(component)):
            component = type(component)(**_settings(component))
    else:  # settings of transformers' processors are not compared
        usual = copy(declared).create()
        is_usual = component is None or (
            type(component) is type(usual)
            and (not isinstance(usual, ConfigMixin) or _settings(component) == _settings(usual))
        )
    if is_usual:
        saver._component_specs[name] = declared
    else:
        _put(saver, name, component)


def _settings(component: Any) -> dict[str, Any]:
    """The settings as they are now; some may have been set as attributes."""
    config = {name: value for name, value in component.config.items() if not name.startswith("_")}
    now = {name: vars(component).get(name, value) for name, value in config.items()}
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in now.items()}


def _put(saver: Any, name: str, component: Any) -> None:
    setattr(saver, name, component)
    saver._component_specs[name] = ComponentSpec(name, type_hint=type(component))


def index_entry(spec: ComponentSpec, kind: type | None) -> list[Any]:
    """A component's entry in the index: its class, or None for one that is not loaded, and its place."""
    source = ModularPipeline._component_spec_to_dict(spec)
    if kind is None:
        return [None, None, source]
    names = [kind.__module__.split(".")[0], kind.__name__]
    return [*names, {**source, "type_hint": names}]


def is_stock(kind: type) -> bool:
    """Whether a class can be named in an index."""
    library = kind.__module__.split(".")[0]
    return library in LIBRARIES and getattr(import_module(library), kind.__name__, None) is not None


def foreign(name: str, component: Any) -> str:
    """The sentence about a component whose class is not stock."""
    kind = component if isinstance(component, type) else type(component)
    known = " or ".join(LIBRARIES)
    return f"{name} is a {kind.__module__}.{kind.__qualname__}, which no index can name; use a class of {known}."


def stock_scheduler(scheduler: Any) -> Any:
    """A scheduler of diffusers with the noise schedule and the base's settings of PeRFlow's; any other itself."""
    if not is_perflow_scheduler(scheduler):
        return scheduler
    made = vars(scheduler).get(OWN_ATTRIBUTE) or {}  # of another one, whose schedule a delta may have replaced
    config = made.get("source") or scheduler.config
    schedule = {key: config[key] for key in NOISE_SCHEDULE_KEYS if key in config}
    others = settings_of_others(config)
    base_type = others.pop(BASE_TYPE, "epsilon")
    return EulerDiscreteScheduler.from_config({**others, **schedule, "prediction_type": base_type})


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
    values = {name: config[name] for name in SCHEDULER_SETTINGS}
    record = None if getattr(pipe, "unet", None) is None else merge_record(pipe.unet)
    if values["theta"] is None and record is not None and record.recipe.theta is not None:
        values["theta"] = [[0.0, 0.0]] * config["num_time_windows"]  # the scheduler has none, whatever the delta says
    return values


def _attention(pipe: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The plan that a call would take: of a component that was not run yet, else the configuration's."""
    attention: Any = getattr(pipe, "attention", None)
    is_new = hasattr(attention, "is_new_to") and attention.is_new_to(pipe)
    plan = parse_plan(attention.config.plan if is_new else values.get("attention_plan"))
    return {"attention_plan": None if plan is None else plan.as_list()}


def component_problems(name: str, component: Any) -> Iterator[str]:
    """A sentence for each reason why a saved component would not come back as it is."""
    yield from adapter_problems(name, component)
    if isinstance(component, nn.Module) and any(weight.is_meta for weight in component.parameters()):
        yield f"{name} has weights without values (device meta); load them first."
    if isinstance(component, nn.Module) and getattr(component, "hf_quantizer", None) is None:
        if any(type(weight) is not nn.Parameter for weight in component.parameters()):
            yield f"{name} was quantized without diffusers, so nothing says how; quantize it as it is loaded."
    if not is_stock(type(component)):
        yield foreign(name, component)
    elif not hasattr(component, "save_pretrained"):
        yield f"{name} was made with settings of its own, which are not saved; take the one that the blocks make."


def adapter_problems(name: str, component: Any) -> Iterator[str]:
    """A sentence for each change of a model that neither an index nor a saved model holds."""
    if isinstance(component, MultiControlNetModel):
        yield f"{name} holds several models, which one entry of an index cannot name; set one of them."
    adapters = getattr(component, "peft_config", None) if getattr(component, "_hf_peft_config_loaded", False) else None
    if adapters:
        yield (
            f"{name} has the LoRA {', '.join(map(str, adapters))}, which is not saved; unload it with "
            "pipe.unload_lora_weights(), after pipe.fuse_lora() if its effect is to stay in the weights."
        )
    if getattr(getattr(component, "config", None), "encoder_hid_dim_type", None) == "ip_image_proj":
        yield (
            f"{name} has an IP-Adapter, which is not saved; call pipe.unload_ip_adapter(), and load_ip_adapter again "
            "after loading."
        )
    stages = getattr(component, "up_blocks", ())
    if any(getattr(stage, factor, None) for stage in stages for factor in ("s1", "s2", "b1", "b2")):
        yield f"{name} has FreeU, which is not saved; call pipe.disable_freeu(), and enable_freeu again after loading."


def _delta(pipe: Any, default: Any, given: bool) -> tuple[dict[str, Any], Weights | None]:
    """The configuration values about the delta, and the file to copy: the configuration's, or the one that is merged.

    The latter is saved where the configuration names none, or a call merged another one in its place. If it has no
    file, or the file has changed since, the merged weights and their record are all that is saved.

    Raises:
        ValueError, OSError: the configuration's delta cannot be read and is not merged either, or it is the one that
            `export_workflow` was `given`, and another one is merged.
    """
    config, unet = pipe.config, pipe.components.get("unet")
    records = () if unet is None else merge_records(unet)
    values = {name: config[name] for name in DELTA_VALUES if config.get(name) is not None}
    named, weights = values.pop("delta", None), None
    if named is not None:
        try:
            weights = open_weights(delta_path(None, pipe) or "", values.get("delta_variant"))
        except (ValueError, OSError):
            if Path(named).name not in {Path(record.source).name for record in records}:
                raise
            return {**values, "delta": f"delta/{Path(named).name}"}, None  # the merged weights are what it names
        if records and takes_place(unet, weights):
            if given:
                merged = Path(records[0].source).name
                raise ValueError(
                    f"{merged} is merged, and delta= names another one; leave delta= out, or unmerge first."
                )
            weights = None
    if weights is None:
        weights = _only_merged(unet, records)
        if weights is None:
            return ({**values, "delta": None} if default is not None else values), None
        values = {"delta_scale": records[0].scale}
    source = Path(weights.label)
    values.pop("delta_variant", None)  # that of a folder
    name = source.name if source.suffix == ".safetensors" else "perflow_delta.safetensors"
    # In a folder: diffusers takes a file at the top for the weights of a component without a subfolder.
    return {**values, "delta": f"delta/{name}"}, weights


def _only_merged(unet: Any, records: tuple[MergeRecord, ...]) -> Weights | None:
    """The file of the only delta that is merged, unchanged since; None where there is none."""
    if len(records) != 1 or records[0].scales or not Path(records[0].source).is_absolute():
        return None
    with suppress(ValueError):
        weights = open_weights(records[0].source)
        return weights if find_merged(unet, weights) is not None else None
    return None


def save_delta_file(weights: Weights, path: Path) -> None:
    """Copies a delta: a file as it is, a folder or shards as one file."""
    path.parent.mkdir()
    source = Path(weights.label)
    if source.suffix == ".safetensors" and source.is_file():
        shutil.copyfile(source, path)
    else:
        tensors = {name: weights.tensor(name).contiguous() for name in weights.shapes}
        save_file(tensors, path, metadata=dict(weights.metadata))


def carry_over(old: Path, new: Path) -> None:
    """Links into a new directory what is in the old one besides, but for weights of the variants that are new."""

    def replaced(folder: str, names: list[str]) -> set[str]:
        place = new / Path(folder).relative_to(old)
        written = os.listdir(place) if place.is_dir() else []
        variants = set(variants_of(written).values())
        both = {name for name in written if not (place / name).is_dir() or not Path(folder, name).is_dir()}
        return both | {name for name, own in variants_of(names).items() if own in variants} | {new.parent.name}

    shutil.copytree(old, new, symlinks=True, ignore=replaced, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
