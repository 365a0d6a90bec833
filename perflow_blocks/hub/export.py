"""A pipeline, or blocks alone, as a repository that loads anywhere and says what it is."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import diffusers
from diffusers.modular_pipelines.modular_pipeline import ModularPipeline, ModularPipelineBlocks

from ..blocks.merge_delta import guidance_in_effect
from ..builder.problems import Problems
from ..components.delta_recipe import DeltaRecipe
from ..components.files import atomic_directory
from ..components.specs import DEFAULT_NUM_INFERENCE_STEPS
from .card import CardFacts, make_card
from .delta import DELTA_FILE, choose_delta, recipe_of
from .entries import Entry, WeightsMode, component_entries
from .index import MELLON, make_blocks_config, make_index, make_mellon_config
from .json_files import BLOCKS_CONFIG, INDEX, write_json
from .manifest import MANIFEST, list_files, read_manifest, write_manifest
from .picture import PICTURE, require_picture, save_picture
from .settings import config_values, guider_entry
from .sources import Mode, WorkflowSources, workflow_sources


def export_workflow(
    pipe_or_blocks: ModularPipeline | ModularPipelineBlocks,
    directory: str | os.PathLike[str],
    *,
    mode: Mode = "self-contained",
    weights: WeightsMode = "reference",
    name: str | None = None,
    description: str | None = None,
    title: str | None = None,
    notes: str = "",
    picture: str | os.PathLike[str] | None = None,
    licence: str | None = None,
    delta: str | os.PathLike[str] | None = None,
    repo_id: str | None = None,
    files: Sequence[str | os.PathLike[str]] = (),
    overwrite: bool = False,
) -> Path:
    """Writes a workflow repository: code, index, Mellon's configuration, model card, manifest, and weights if asked.

    The directory appears complete or not at all. What was set on the pipeline is kept: windows, prediction type,
    steps, guidance and guider, attention plan, delta, and every configuration value of the blocks.

    Args:
        pipe_or_blocks: a pipeline, or blocks without components.
        directory: where to; it may not exist yet, or be empty.
        mode: "self-contained" needs only diffusers where it is loaded, "thin" needs this package.
        weights: "reference" names the repositories that components came from; "include" saves them here, with a
            merged delta in them; "delta-only" names the repositories and copies the delta.
        name: class of the workflow's blocks; by default that of the given blocks.
        description: what the blocks say of themselves, in their `doc` and on the card; by default what they say now.
        title: heading of the model card; by default the directory's name.
        notes: what the card tells users besides, in Markdown.
        picture: shown on the card; one larger than 1 MB is made smaller.
        licence: identifier as the Hub knows it, "apache-2.0" say, for the card.
        delta: the delta file, in place of the pipeline's own.
        repo_id: the repository of the Hub that this will be, if it is known. Publishing fills it in.
        files: further files to copy beside the others, such as a script that uses the workflow.
        overwrite: replace a workflow repository that is there, as a whole.

    Returns:
        The directory.

    Raises:
        ValueError: names all that cannot be exported, before anything is written.
    """
    target = Path(directory).expanduser()
    plan = _plan(pipe_or_blocks, target, mode, weights, name, delta, description)
    _require_target(target, overwrite)
    extras = _named_files(files, plan)
    if picture is not None:
        require_picture(picture)
    heading = title or target.absolute().name
    facts = CardFacts(
        title=heading,
        mode=mode,
        blocks=plan.blocks,
        description=description or plan.blocks.description,
        class_name=plan.class_name,
        entries=plan.entries,
        config=plan.config,
        recipe=_recipe(plan),
        repository=repo_id or f"your-name/{target.absolute().name}",
        licence=licence,
        picture=None if picture is None else PICTURE,
        notes=notes,
        requirements=plan.sources.requirements,
    )
    card = make_card(facts)
    mellon = make_mellon_config(plan.blocks, heading, repo_id)
    with atomic_directory(target) as folder:
        for file, text in plan.sources.files.items():
            (folder / file).write_text(text, encoding="utf-8")
        write_json(folder / BLOCKS_CONFIG, make_blocks_config(plan.class_name, plan.sources.requirements))
        write_json(folder / INDEX, make_index(type(plan.pipe).__name__, plan.entries, plan.config, repo_id))
        mellon.to_json_file(folder / MELLON)
        (folder / "README.md").write_text(card, encoding="utf-8")
        for file, source in extras.items():
            shutil.copyfile(source, folder / file)
        if picture is not None:
            save_picture(picture, folder / PICTURE)
        _save_weights(plan, folder)
        write_manifest(folder, blocks=plan.class_name, mode=mode)
    return target


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """All that is known before anything is written."""

    pipe: Any
    blocks: Any
    class_name: str
    sources: WorkflowSources
    entries: list[Entry]
    config: dict[str, Any]
    delta: Path | None


def _plan(
    given: Any,
    target: Path,
    mode: Mode,
    weights: WeightsMode,
    name: str | None,
    delta: str | os.PathLike[str] | None,
    description: str | None,
) -> _Plan:
    _require_choice("mode", mode, get_args(Mode))
    _require_choice("weights", weights, get_args(WeightsMode))
    if not isinstance(given, (ModularPipeline, ModularPipelineBlocks)):
        raise ValueError(f"{given!r} is neither a modular pipeline nor blocks; pass one of them.")
    pipe: Any = given if isinstance(given, ModularPipeline) else given.init_pipeline()
    blocks: Any = pipe.blocks
    problems = Problems()
    if weights == "include" and pipe is not given:
        problems.add("blocks have no weights to include; pass a pipeline, or weights='reference'.")
    if not hasattr(diffusers, type(pipe).__name__):
        problems.add(
            f"the pipeline is a {type(pipe).__qualname__}, which no index can name; use blocks.init_pipeline."
        )
    entries = component_entries(pipe, blocks, weights, problems)
    guider = guider_entry(pipe, blocks, problems)
    config: dict[str, Any] = {}
    with problems.noted():
        config = config_values(pipe, blocks, problems)
    source = choose_delta(pipe, blocks, weights, delta, problems)
    if source is not None:
        config["delta"] = DELTA_FILE
    class_name, sources = name or _class_name(blocks, target), None
    if not class_name.isidentifier():
        problems.add(f"name={class_name!r} is no name of a class; pass one such as MyWorkflow.")
    else:
        with problems.noted():
            sources = workflow_sources(blocks, class_name, mode, description=description)
    if problems or sources is None:
        raise ValueError(_complaint(list(problems)))
    return _Plan(
        pipe=pipe,
        blocks=blocks,
        class_name=class_name,
        sources=sources,
        entries=[*entries, *([] if guider is None else [guider])],
        config=config,
        delta=source,
    )


def _complaint(problems: list[str]) -> str:
    if len(problems) == 1:
        return f"nothing was exported: {problems[0]}"
    lines = [f"nothing was exported, for {len(problems)} reasons:", *(f"- {problem}" for problem in problems)]
    return "\n".join(lines)


def _class_name(blocks: Any, target: Path) -> str:
    """That of the blocks; of blocks that were put together from parts, one after the directory."""
    kind = type(blocks)
    if kind.__module__.split(".")[0] != "diffusers":
        return kind.__name__
    words = re.findall("[A-Za-z0-9]+", target.absolute().name)
    return "".join(word[:1].upper() + word[1:] for word in words) + "Blocks"


def _require_choice(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{option}={value!r} is unknown; pass one of {', '.join(known)}.")


def _require_target(target: Path, overwrite: bool) -> None:
    """Refuses to replace what is no workflow repository, or holds files that an export did not write."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir() or not (target / MANIFEST).is_file():
        raise ValueError(f"{target} exists and is no workflow repository; name a new or empty directory.")
    if not overwrite:
        raise ValueError(
            f"{target} holds a workflow already; pass overwrite=True to replace it, or another directory."
        )
    others = sorted(set(list_files(target)) - read_manifest(target).files.keys())
    if others:
        raise ValueError(
            f"{target} holds files that no export wrote ({', '.join(others[:5])}), which would be lost; move them "
            "away, or name another directory."
        )


def _named_files(files: Sequence[str | os.PathLike[str]], plan: _Plan) -> dict[str, Path]:
    """Further files by their names in the repository."""
    taken = {*plan.sources.files, BLOCKS_CONFIG, INDEX, MELLON, "README.md", MANIFEST, PICTURE}
    named: dict[str, Path] = {}
    for file in map(Path, files):
        if not file.is_file():
            raise ValueError(f"{file} is no file; pass files that exist.")
        if file.name in taken or file.name in named:
            raise ValueError(f"the repository has a file {file.name} already; rename {file}.")
        named[file.name] = file
    return named


def _recipe(plan: _Plan) -> dict[str, str]:
    """The sampling settings that a call without any will run with, for blocks of this package."""
    declared = {spec.name for spec in plan.blocks.expected_configs}
    if not {"prediction_type", "default_num_inference_steps"} <= declared:
        return {}
    recipe, config = recipe_of(plan.pipe, plan.delta), plan.config
    steps = config.get("default_num_inference_steps") or recipe.num_inference_steps or DEFAULT_NUM_INFERENCE_STEPS
    return {
        "steps": str(steps),
        "guidance": _guidance(plan, recipe),
        "prediction type": config.get("prediction_type") or recipe.prediction_type or "ddim_eps",
        "time windows": _window_text(config, recipe),
    }


def _guidance(plan: _Plan, recipe: DeltaRecipe) -> str:
    guider = next((entry.component for entry in plan.entries if entry.name == "guider"), None)
    if guider is not None:
        return type(guider).__name__
    return f"{guidance_in_effect(plan.pipe.guider, plan.config.get('guidance_scale'), recipe):g}"


def _window_text(config: dict[str, Any], recipe: DeltaRecipe) -> str:
    named = config if {"num_time_windows", "window_boundaries"} & config.keys() else vars(recipe)
    boundaries = named.get("window_boundaries")
    if boundaries is not None:
        return f"{len(boundaries) - 1}, from {', '.join(f'{time:g}' for time in boundaries)}"
    return f"{named.get('num_time_windows') or 4}, equal"


def _save_weights(plan: _Plan, folder: Path) -> None:
    for entry in plan.entries:
        if entry.component is not None:
            entry.component.save_pretrained(folder / entry.subfolder)
            for file in (folder / entry.subfolder).glob("*.json"):
                _forget_origin(file)
    if plan.delta is not None:
        (folder / DELTA_FILE).parent.mkdir()
        shutil.copyfile(plan.delta, folder / DELTA_FILE)


def _forget_origin(file: Path) -> None:
    """Takes out where a component was loaded from, which the libraries write into its configuration."""
    values = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(values, dict) and {"_name_or_path", "name_or_path"} & values.keys():
        write_json(file, {key: value for key, value in values.items() if key not in ("_name_or_path", "name_or_path")})
