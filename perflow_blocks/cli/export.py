"""`perflow export`: a pipeline as a workflow repository."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options

NOT_SHOWN = 12
"""Of more files than this, those in folders are counted by folder."""


def export(
    source: Annotated[str, typer.Argument(help="Directory or repository of an SDXL model or workflow.")],
    directory: Annotated[Path, typer.Argument(help="Directory for the repository.")],
    mode: Annotated[
        str, typer.Option(help="self-contained needs diffusers only, thin this package.")
    ] = "self-contained",
    weights: Annotated[
        str, typer.Option(help="reference names repositories, include saves weights, delta-only copies the delta.")
    ] = "reference",
    delta: options.Delta = None,
    name: Annotated[str | None, typer.Option(help="Class of the workflow's blocks.")] = None,
    title: Annotated[
        str | None, typer.Option(help="Heading of the model card. By default the directory's name.")
    ] = None,
    notes: Annotated[Path | None, typer.Option(help="Markdown file with what users have to know.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Picture for the model card.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence for the model card, apache-2.0 say.")] = None,
    repo_id: Annotated[str | None, typer.Option(help="Repository that this will be, owner/name, if known.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository with code.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run SOURCE's code and export its blocks, not the preset.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Type of included weights: float16, float32 or bfloat16.")] = "float16",
    force: options.Force = False,
) -> None:
    """Write a repository that loads anywhere from SOURCE: blocks, index, model card, manifest, weights if asked."""
    precision = options.parse_dtype(dtype)
    if revision is not None and not trust_remote_code:
        raise ValueError(f"--revision {revision} is for the blocks of SOURCE; pass --trust-remote-code with it.")
    if notes is not None and not notes.is_file():
        raise ValueError(f"--notes {notes} is no file; pass a Markdown file.")
    from ..hub.export import export_workflow
    from .pipeline import model_location, quiet_libraries
    from .progress import busy

    quiet_libraries()
    location = model_location(source)
    with busy(f"reading {source}"):
        if trust_remote_code:
            from ..hub.load import load_workflow

            pipe = load_workflow(location, revision=revision, trust_remote_code=True, load_components=False)
        else:
            pipe = _preset(location)
        if weights == "include":
            pipe.load_components(_sources(pipe), dtype=precision)
    with busy(f"writing {directory}"):
        export_workflow(
            pipe,
            directory,
            mode=mode,  # type: ignore[arg-type]
            weights=weights,  # type: ignore[arg-type]
            name=name,
            title=title,
            notes="" if notes is None else notes.read_text(encoding="utf-8"),
            picture=picture,
            licence=licence,
            delta=delta,
            repo_id=repo_id,
            overwrite=force,
        )
    typer.echo("\n".join(list_written(directory)))


def list_written(directory: Path) -> list[str]:
    """A line for each file, or folder where there are many, with its size."""
    from ..hub.manifest import MANIFEST, read_manifest

    manifest = read_manifest(directory)
    sizes: dict[str, int] = {MANIFEST: (directory / MANIFEST).stat().st_size}
    many = len(manifest.files) > NOT_SHOWN
    for path, entry in manifest.files.items():
        folder, _, file = path.partition("/")
        place = f"{folder}/" if file and many else path
        sizes[place] = sizes.get(place, 0) + entry.size
    width = max(map(len, sizes))
    lines = [f"  {place:<{width}}  {size:>15,} bytes" for place, size in sorted(sizes.items())]
    total = f"{len(manifest.files) + 1} files, {sum(sizes.values()):,} bytes"
    return [f"{directory}: {manifest.blocks}, {manifest.mode}, {total}", *lines]


def _sources(pipe: Any) -> list[str]:
    """The components that the source has; one that its index names without a type it has not."""
    names = pipe.pretrained_component_names
    return [name for name in names if pipe.get_component_spec(name).type_hint is not None]


def _preset(location: str) -> Any:
    from ..blocks.auto_blocks import PeRFlowSDXLAutoBlocks

    try:
        return PeRFlowSDXLAutoBlocks().init_pipeline(location)
    except OSError as error:
        raise ValueError(
            f"cannot read {location} ({error}); pass a directory or repository of an SDXL model."
        ) from error
