"""What `PeRFlowModularPipeline.save_pretrained` writes, so that blocks, components, settings and image come back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import ConfigMixin, EulerDiscreteScheduler
from diffusers.configuration_utils import FrozenDict
from diffusers.models import MultiControlNetModel
from diffusers.modular_pipelines.modular_pipeline import ModularPipeline
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec
from diffusers.utils.torch_utils import unwrap_module
from safetensors.torch import save_file
from torch import nn

from ..delta.files import Weights, open_weights, variants_of
from ..delta.merge import find_merged, merge_records
from ..schedulers.scheduling_perflow import (
    BASE_TYPE,
    NOISE_SCHEDULE_KEYS,
    is_perflow_scheduler,
    settings_of_others,
)
from .block_source import block_files
from .merge_delta import delta_path
from .set_timesteps import OWN_ATTRIBUTE
from .settings import DELTA_VALUES, complaint, config_values, foreign, is_stock, kept_guider, library_of, python_number

DELTA_FILE = "delta/perflow_delta.safetensors"
"""Where the copy is. Not at the top: diffusers would take it for the weights of a component without a subfolder."""


def prepare(pipe: Any) -> tuple[Any, Weights | None]:
    """A copy of the pipeline that holds what is to be saved, and the delta to copy to its `config.delta`.

    Raises:
        ValueError: names all that cannot be saved.
    """
    problems = list[str]()
    saver, values, delta = settled(pipe, problems)
    try:
        block_files(pipe.blocks)
    except ValueError as error:
        problems.append(str(error))
    index: dict[str, Any] = {}
    for name, spec in saver._component_specs.items():
        component = unwrapped(getattr(saver, name, None))
        if spec.default_creation_method != "from_pretrained":
            continue
        place = spec.pretrained_model_name_or_path
        if component is not None:
            problems += component_problems(name, component)
            index[name] = index_entry(spec, type(component))
        elif place and spec.type_hint is not None:  # keeps the place that it can be loaded from
            here = str(Path(place).absolute()) if Path(place).exists() else place
            index[name] = index_entry(replace(spec, pretrained_model_name_or_path=here), None)
    if problems:
        raise ValueError(complaint("saved", problems))
    saver._internal_dict = FrozenDict({**index, **values})
    return saver, delta


def settled(pipe: Any, problems: list[str]) -> tuple[Any, dict[str, Any], Weights | None]:
    """A copy of the pipeline whose components can be saved, the configuration values, and the delta to copy.

    The components are the pipeline's own, but for the scheduler, which is the stock one that the window set-up
    converts again, and a guider that the configuration does not express. Adds what cannot be kept to `problems`.
    """
    blocks = pipe.blocks
    declared = {spec.name: spec for spec in blocks.expected_components}
    saver = copy(pipe)
    saver._component_specs = dict(pipe._component_specs)
    values, delta = dict[str, Any](), None
    try:
        values = config_values(pipe, blocks, problems.append)
        delta_values, delta = _delta(pipe, problems)
        values |= delta_values
    except ValueError as error:
        problems.append(str(error))
    guider = kept_guider(pipe, blocks, problems.append)
    if guider is not None:
        _put(saver, "guider", guider)
    elif "guider" in declared:
        saver._component_specs["guider"] = declared["guider"]
    if pipe.components.get("scheduler") is not None:
        _put(saver, "scheduler", stock_scheduler(pipe.scheduler))
    for name, spec in saver._component_specs.items():
        is_made = spec.default_creation_method != "from_pretrained" and name not in ("guider", "attention")
        if is_made and not _is_as_declared(getattr(saver, name, None), declared[name]):
            problems.append(
                f"{name} was made with settings of its own, which are not saved; use a component that was loaded with "
                "from_pretrained, or take the one that the blocks make."
            )
    return saver, values, delta


def _put(saver: Any, name: str, component: Any) -> None:
    setattr(saver, name, component)
    saver._component_specs[name] = ComponentSpec(name, type_hint=type(component))


def unwrapped(component: Any) -> Any:
    """A compiled model's own; other components as they are."""
    return unwrap_module(component) if isinstance(component, nn.Module) else component


def index_entry(spec: ComponentSpec, kind: type | None) -> list[Any]:
    """A component's entry in the index: its class, or None for one that is not loaded, and its place."""
    source = ModularPipeline._component_spec_to_dict(spec)
    if kind is None:
        return [None, None, source]
    names = [library_of(kind), kind.__name__]
    return [*names, {**source, "type_hint": names}]


def _is_as_declared(component: Any, spec: ComponentSpec) -> bool:
    """Whether the blocks make this component again, which is not saved."""
    if component is None or spec.default_creation_method != "from_config":
        return component is None
    usual = copy(spec).create()
    same = type(component) is type(usual)
    return same and (not isinstance(usual, ConfigMixin) or _settings(component) == _settings(usual))


def _settings(component: Any) -> dict[str, Any]:
    return {name: value for name, value in component.config.items() if not name.startswith("_")}


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


def component_problems(name: str, component: Any) -> Iterator[str]:
    """A sentence for each reason why a saved component would not come back as it is."""
    yield from adapter_problems(name, component)
    if isinstance(component, nn.Module) and any(weight.is_meta for weight in component.parameters()):
        yield f"{name} has weights without values (device meta); load them first."
    if not is_stock(type(component)) or not hasattr(component, "save_pretrained"):
        yield foreign(name, component)


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


def _delta(pipe: Any, problems: list[str]) -> tuple[dict[str, Any], Weights | None]:
    """The configuration values about the delta, and the file to copy.

    It is the configuration's delta, or the one that is merged. Where a merged delta has no file, or the file has
    changed since, the merged weights and their record are all that is saved.
    """
    if "delta" not in pipe._config_specs:
        return {}, None
    config, unet = pipe.config, pipe.components.get("unet")
    records = () if unet is None else merge_records(unet)
    values = {name: python_number(config[name]) for name in DELTA_VALUES if config.get(name) is not None}
    named = values.pop("delta", None)
    declared = {spec.name: spec.default for spec in pipe._blocks.expected_configs}["delta"]
    absent = {} if declared is None else {"delta": None}  # the blocks would name theirs
    if named is None:
        if len(records) != 1 or records[0].scales or not Path(records[0].source).is_absolute():
            return {**values, **absent}, None
        values = {"delta_scale": records[0].scale}
    try:
        path = Path(records[0].source) if named is None else delta_path(None, pipe)
        assert path is not None
        weights = open_weights(path, values.get("delta_variant"))
        is_merged = unet is not None and find_merged(unet, weights) is not None
    except ValueError as error:
        if named is None:
            return {**values, **absent}, None
        if Path(named).name not in {Path(record.source).name for record in records}:
            problems.append(str(error))
        return {**values, "delta": _target(named)}, None  # the merged weights are what it names
    if named is None and not is_merged:
        return absent, None
    single = path.is_file() and path.suffix == ".safetensors"
    values.pop("delta_variant", None)  # that of a folder
    return {**values, "delta": _target(path) if single else DELTA_FILE}, weights


def _target(path: str | Path) -> str:
    return Path(DELTA_FILE).with_name(Path(path).name).as_posix()


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
