"""A pipeline, or blocks alone, as a repository that loads anywhere and says what it is."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import diffusers
from diffusers.configuration_utils import FrozenDict
from diffusers.modular_pipelines.mellon_node_utils import MellonPipelineConfig
from diffusers.modular_pipelines.modular_pipeline import ModularPipeline, ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec
from diffusers.utils import load_image
from diffusers.utils.torch_utils import unwrap_module

from ..atomic_files import atomic_directory
from ..blocks.block_source import CODE, INDEX, block_files
from ..blocks.pipeline import stock_class_name
from ..blocks.saving import (
    Problems,
    adapter_problems,
    component_problems,
    foreign,
    index_entry,
    is_stock,
    save_delta_file,
    settled,
)
from ..blocks.set_timesteps import scheduler_source
from ..delta.files import Weights, read_json, read_recipe
from ..delta.merge import MergeRecord, find_merged, merge_records, recipe_record
from ..delta.recipe import DeltaRecipe
from .card import CARD, OWNER, make_card, make_recipe
from .sources import carried_modules

Mode = Literal["thin", "self-contained"]
WeightsMode = Literal["reference", "include", "delta-only"]

MELLON = "mellon_pipeline_config.json"
IMAGE = "picture.png"  # as earlier versions name it
FILES = (CODE, ModularPipelineBlocks.config_name, INDEX, MELLON, CARD, IMAGE)
MAX_SIDE = 1024  # of the card's image, in pixels
MELLON_STAGES = frozenset({"text_encoder", "denoise", "decode"})
"""The top-level blocks that make one node each in Mellon; blocks without them are one node as a whole."""
_IN_CACHE = re.compile(r"/models--(?P<id>[\w.-]+)/snapshots/(?P<sha>[0-9a-f]{40})/?$")
"""A repository of the Hub, as it lies in the cache."""


def export_workflow(
    pipe_or_blocks: ModularPipeline | ModularPipelineBlocks,
    directory: str | os.PathLike[str],
    *,
    mode: Mode = "thin",
    weights: WeightsMode = "reference",
    title: str | None = None,
    notes: str = "",
    image: str | os.PathLike[str] | None = None,
    licence: str | None = None,
    example: str | None = None,
    delta: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a workflow repository: code, index, Mellon's configuration, model card, and weights if asked.

    The directory appears complete or not at all. What `save_pretrained` keeps is kept: windows, prediction type,
    steps, guidance and guider, attention plan, delta, and every configuration value of the blocks.

    Args:
        pipe_or_blocks: a pipeline, or blocks without components.
        directory: where to; a new or empty directory.
        mode: "thin" needs this package where it is loaded, "self-contained" only diffusers. Your own modules that
            define blocks are copied in both.
        weights: "reference" names the repositories that components came from; "include" saves the components that
            are loaded, with a merged delta in them and a copy of it; "delta-only" names the repositories and copies
            the delta.
        title: heading of the model card; by default the directory's name.
        notes: what the card tells users besides, in Markdown.
        image: image file for the card; a side longer than 1024 pixels is scaled down.
        licence: identifier as the Hub knows it, for example "apache-2.0", for the card.
        example: Python that the card shows, from the imports on; by default a call with a prompt and images.
        delta: the delta file, in place of the pipeline's own.
        overwrite: replace a workflow repository that is there, as a whole.

    Returns:
        The directory.

    Raises:
        ValueError: names all that cannot be exported, before anything is written.
    """
    target = Path(directory).expanduser()
    for option, given, known in (("mode", mode, get_args(Mode)), ("weights", weights, get_args(WeightsMode))):
        if given not in known:
            raise ValueError(f"{option}={given!r} is unknown; pass one of {', '.join(known)}.")
    require_target(target, overwrite=overwrite)
    pipe: Any = pipe_or_blocks if isinstance(pipe_or_blocks, ModularPipeline) else pipe_or_blocks.init_pipeline()
    blocks, problems = pipe.blocks, Problems()
    if delta is not None:
        if "delta" not in pipe._config_specs:
            problems.add("the blocks merge no delta; insert a PeRFlowMergeDeltaStep, or leave delta= out.")
        pipe, place = copy(pipe), str(Path(delta).expanduser().absolute())
        pipe._internal_dict = FrozenDict({**pipe.config, "delta": place, "delta_variant": None})
    saver, values, delta_weights = settled(pipe, problems, delta_given=delta is not None)
    records = () if pipe.components.get("unet") is None else merge_records(pipe.unet)
    record = recipe_record(records)
    recipe = read_recipe(delta_weights) if delta_weights is not None else record.recipe if record else DeltaRecipe()
    if weights != "include":
        values, delta_weights = _unmerged(pipe, records, values, delta_weights, weights, problems)
    entries, saved = _components(pipe, saver, weights == "include", problems)
    if weights == "include" and not saved:
        problems.append("no component is loaded; pass a pipeline, after pipe.load_components(), or another weights=.")
    code = dict[str, str]()
    with problems.noted():
        siblings, modules = carried_modules(blocks, mode == "self-contained")
        code = {**block_files(blocks, siblings), **modules}
    with problems.noted(SyntaxError, about=f"image={str(image)!r} cannot be read: "):
        shown = None if image is None else load_image(str(image))
    problems.refuse("exported")
    folder_name = target.absolute().name
    title = title or folder_name
    names = {"_class_name": stock_class_name(pipe), "_diffusers_version": diffusers.__version__}
    index = {**names, **entries, **values}
    texts = {
        **code,
        INDEX: json.dumps(index, indent=2, ensure_ascii=False) + "\n",
        MELLON: _mellon_config(blocks, title).to_json_string(),
        CARD: make_card(
            blocks,
            title,
            notes=notes,
            recipe=make_recipe(pipe, values, recipe, guider=saver.guider if "guider" in saved else None),
            repository=f"{OWNER}/{re.sub(r'[^A-Za-z0-9.-]+', '-', folder_name).strip('-.') or 'workflow'}",
            index=index,
            saved=saved.keys(),
            requirements=json.loads(code[ModularPipelineBlocks.config_name])["requirements"],
            example=example,
            image=None if shown is None else IMAGE,
            licence=licence,
        ),
    }
    with atomic_directory(target) as folder:
        for text_file, text in texts.items():
            (folder / text_file).write_text(text, encoding="utf-8", newline="\n")
        for component, value in saved.items():
            _save(value, folder / component)
        if delta_weights is not None:
            save_delta_file(delta_weights, folder / values["delta"])
        if shown is not None:
            shown.thumbnail((MAX_SIDE, MAX_SIDE))
            shown.save(folder / IMAGE)  # without the prompts and paths that programs write into images
    return target


def require_target(target: Path, *, overwrite: bool = False) -> None:
    """Raises ValueError if `target` holds anything but an earlier export."""
    there = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if not there and not target.is_file():
        return
    if not {CODE, INDEX} <= there:
        raise ValueError(f"{target} exists and is not a workflow repository; name a new or empty directory.")
    if not overwrite:
        raise ValueError(f"{target} holds a workflow; pass overwrite=True to replace it, or name another directory.")
    known = {*FILES, "delta", "perflow_manifest.json", "__pycache__", *read_json(target / INDEX)}
    others = sorted(name for name in there - known if not re.fullmatch(r"perflow_\w+\.py", name))
    if others:
        raise ValueError(
            f"{target} holds files that no export wrote ({', '.join(others[:5])}), which would be lost; move them "
            "away, or name another directory."
        )


def _unmerged(
    pipe: Any,
    records: Sequence[MergeRecord],
    values: dict[str, Any],
    delta: Weights | None,
    weights: WeightsMode,
    problems: list[str],
) -> tuple[dict[str, Any], Weights | None]:
    """Configuration values and delta for weights that are read from elsewhere, without what is merged here."""
    merged = [record for record in records if not record.reloaded]
    own = find_merged(pipe.unet, delta) if records and delta is not None else None
    default = {spec.name: spec.default for spec in pipe.blocks.expected_configs}.get("delta")
    if weights == "reference":
        if merged or (delta is not None and own is None and pipe.config.get("delta") != default):
            names = [record.source for record in merged] or [delta.label if delta is not None else ""]
            problems.append(
                f"the delta {', '.join(Path(name).name for name in names)} is not part of the weights that are "
                "referred to; pass weights='delta-only' to copy it, or 'include' to save the merged weights."
            )
        return {name: value for name, value in values.items() if name != "delta"}, None
    if delta is None:
        problems.append(
            "weights='delta-only' needs one delta of one file, merged or in the configuration; pass delta= with its "
            "file, or weights='include'."
        )
    elif [record for record in merged if record != own or record.scales]:
        problems.append(
            "deltas are merged that the index cannot name: it names one, at one scale; pass weights='include', or "
            "leave out delta=."
        )
    elif own is not None:
        values = {**values, "delta_scale": float(own.scale)}
    return values, delta


def _components(
    pipe: Any, saver: Any, include: bool, problems: list[str]
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """The entry of each component in the index, and the components that the repository itself holds."""
    declared = {spec.name: spec for spec in pipe.blocks.expected_components}
    entries, saved, private = dict[str, list[Any]](), dict[str, Any](), dict[str, list[str]]()
    for name, spec in saver._component_specs.items():
        component = unwrap_module(getattr(saver, name, None))
        is_absent = component is None and spec.type_hint is None  # as model_index.json says it
        if spec.default_creation_method != "from_pretrained" or is_absent:
            continue
        place = (scheduler_source(pipe) if name == "scheduler" else None) or spec
        location, public = place.pretrained_model_name_or_path, _public(place)
        if component is not None and (include or (public is None and name in ("scheduler", "guider"))):
            problems += component_problems(name, component)
            entries[name] = index_entry(ComponentSpec(name, subfolder=name), type(component))
            saved[name] = component
        elif location is None and component is not None:
            problems.append(
                f"{name} was put in as an object, so no repository is known for it; pass weights='include', or load "
                "it with pipe.load_components()."
            )
        elif location is None or location == declared[name].pretrained_model_name_or_path:
            continue  # there is none, or the blocks name it themselves
        elif public is None:
            private.setdefault(str(location), []).append(name)
        else:
            problems += adapter_problems(name, component)
            if public.type_hint is not None and not is_stock(public.type_hint):
                problems.append(foreign(name, public.type_hint))
            entries[name] = index_entry(public, public.type_hint)
    for location, names in private.items():
        problems.append(
            f"{location}, where {', '.join(names)} came from, is a place that others do not have; call "
            "pipe.load_components() and pass weights='include'."
        )
    return entries, saved


def _public(spec: ComponentSpec) -> ComponentSpec | None:
    """The place of a component as everyone can read it: an id of the Hub or a URL. None for a path."""
    place = str(spec.pretrained_model_name_or_path or "")
    if found := _IN_CACHE.search(Path(place).as_posix()):
        name = found["id"].replace("--", "/")
        return replace(spec, pretrained_model_name_or_path=name, revision=found["sha"])
    is_id = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", place) is not None and not Path(place).exists()
    return spec if is_id or place.startswith("https://") else None


def _save(component: Any, folder: Path) -> None:
    """Saves a component without where it was loaded from, which the libraries write into its configuration."""
    component.save_pretrained(folder)
    for file in folder.glob("*.json"):
        values = json.loads(file.read_text(encoding="utf-8"))
        origin = {"_name_or_path", "name_or_path"}
        if isinstance(values, dict) and origin & values.keys():
            kept = {key: value for key, value in values.items() if key not in origin}
            file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def _mellon_config(blocks: Any, label: str) -> MellonPipelineConfig:
    """The nodes of the workflow in Mellon: one for each stage, or one for all where blocks have no such stages."""
    if MELLON_STAGES <= set(blocks.sub_blocks):
        return MellonPipelineConfig.from_blocks(blocks, label=label)
    widgets: dict[str, Any] = {"input_types": {"prompt": "textbox"}, "output_types": {"images": "image"}}
    return MellonPipelineConfig.from_custom_block(blocks, node_label=label, **widgets)
