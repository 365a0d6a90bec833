"""A pipeline, or blocks alone, as a repository that loads anywhere and says what it is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from diffusers.modular_pipelines.modular_pipeline import ModularPipeline, ModularPipelineBlocks

from ..atomic_files import atomic_directory
from ..blocks.block_source import blocks_config
from ..blocks.pipeline import stock_class_name
from ..blocks.saving import DELTA_FILE
from .address import CARD, OWNER, require_repo_id
from .card import CardFacts, make_card
from .card_example import CardExample, require_example
from .entries import WeightsMode
from .index import make_index, make_mellon_config
from .json_files import BLOCKS_CONFIG, INDEX, MELLON, to_json, write_json
from .manifest import MANIFEST, list_files, read_manifest, write_manifest
from .picture import PICTURE, require_picture, save_picture
from .plan import ExportPlan, make_plan, recipe_table
from .sources import Mode


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
    example: CardExample | None = None,
    delta: str | os.PathLike[str] | None = None,
    repo_id: str | None = None,
    files: Sequence[str | os.PathLike[str]] = (),
    exclude: Collection[str] = (),
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
        picture: shown on the card; one larger than 1024 pixels a side is made smaller.
        licence: identifier as the Hub knows it, "apache-2.0" say, for the card.
        example: how the card shows the workflow in use, where a prompt and pictures alone would not do.
        delta: the delta file, in place of the pipeline's own.
        repo_id: the repository of the Hub that this will be, "owner/name", if it is known. Publishing fills it in.
        files: further files to copy beside the others, such as a script that uses the workflow.
        exclude: names of components that the index shall not have.
        overwrite: replace a workflow repository that is there, as a whole.

    Returns:
        The directory.

    Raises:
        ValueError: names all that cannot be exported, before anything is written.
    """
    target = Path(directory).expanduser()
    if repo_id is not None:
        require_repo_id(repo_id)
    plan = make_plan(pipe_or_blocks, target, mode, weights, name, delta, description, exclude)
    require_target(target, overwrite=overwrite)
    extras = _named_files(files, plan)
    if picture is not None:
        require_picture(picture)
    if example is not None:
        require_example(example, plan.blocks)
    folder_name = target.absolute().name
    facts = CardFacts(
        title=title or folder_name,
        mode=mode,
        blocks=plan.blocks,
        description=description or plan.blocks.description,
        class_name=plan.class_name,
        entries=plan.entries,
        config=plan.config,
        recipe=recipe_table(plan),
        repository=repo_id or f"{OWNER}/{folder_name}",
        licence=licence,
        picture=None if picture is None else PICTURE,
        notes=notes,
        requirements=plan.sources.requirements,
        example=example or CardExample(),
    )
    texts = _texts(plan, facts, repo_id)
    with atomic_directory(target) as folder:
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8", newline="\n")
        for file, source in extras.items():
            shutil.copyfile(source, folder / file)
        if picture is not None:
            save_picture(picture, folder / PICTURE)
        _save_weights(plan, folder)
        write_manifest(folder, blocks=plan.class_name, mode=mode)
    return target


def _texts(plan: ExportPlan, facts: CardFacts, repo_id: str | None) -> dict[str, str]:
    """The text files of the repository by their names."""
    return {
        **plan.sources.files,
        BLOCKS_CONFIG: to_json(blocks_config(plan.class_name, plan.sources.requirements, plan.preset)),
        INDEX: to_json(make_index(stock_class_name(plan.pipe), plan.entries, plan.config, repo_id)),
        MELLON: make_mellon_config(plan.blocks, facts.title, repo_id).to_json_string(),
        CARD: make_card(facts),
    }


def require_target(target: Path, *, overwrite: bool = False) -> None:
    """Refuses to replace what is no workflow repository, or holds files that an export did not write.

    Raises:
        ValueError: what is at `target`, and what to do about it.
    """
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


def _named_files(files: Sequence[str | os.PathLike[str]], plan: ExportPlan) -> dict[str, Path]:
    """Further files by their names in the repository."""
    taken = {*plan.sources.files, BLOCKS_CONFIG, INDEX, MELLON, CARD, MANIFEST, PICTURE}
    named: dict[str, Path] = {}
    for file in map(Path, files):
        if not file.is_file():
            raise ValueError(f"{file} is no file; pass files that exist.")
        if file.name in taken or file.name in named:
            raise ValueError(f"the repository has a file {file.name} already; rename {file}.")
        named[file.name] = file
    return named


def _save_weights(plan: ExportPlan, folder: Path) -> None:
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
