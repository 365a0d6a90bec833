"""`perflow export`: a pipeline as a workflow repository."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from ..batches import require_image
from . import options


def export(
    source: Annotated[str, typer.Argument(help="Directory or repository of an SDXL or SD model or workflow.")],
    directory: Annotated[Path, typer.Argument(help="Directory for the repository.")],
    mode: Annotated[
        Literal["thin", "self-contained"], typer.Option(help="thin needs this package, self-contained only diffusers.")
    ] = "thin",
    weights: Annotated[
        Literal["reference", "include", "delta-only"],
        typer.Option(help="reference names repositories, include saves weights, delta-only copies the delta."),
    ] = "reference",
    delta: options.Delta = None,
    title: Annotated[str | None, typer.Option(help="Heading of the model card, by default DIRECTORY's name.")] = None,
    notes: Annotated[Path | None, options.file("Markdown file with what users have to know.")] = None,
    image: Annotated[Path | None, options.file("Image for the model card.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence for the model card, such as apache-2.0.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository with code.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run SOURCE's code and export its blocks, not the preset.")
    ] = False,
    dtype: options.StoredDtype = "float16",
    force: options.Force = False,
) -> None:
    """Write a repository that loads anywhere from SOURCE: blocks, index, model card, weights if asked."""
    if revision is not None and not trust_remote_code:
        raise ValueError(f"--revision {revision} is for the blocks of SOURCE; pass --trust-remote-code with it.")
    from .pipeline import is_pipeline, model_location, quiet_libraries, see_own_modules

    location = model_location(source)
    if not force and is_pipeline(directory):
        raise ValueError(f"{directory} holds a workflow; pass --force to replace it, or name another directory.")
    options.require_free_directory("DIRECTORY", directory, force)
    if image is not None:
        require_image("--image", image)
    quiet_libraries()
    from ..blocks.block_source import load_blocks
    from ..hub.export import export_workflow

    console = Console(stderr=True)
    with console.status(f"reading {source}"):
        if trust_remote_code:
            from ..hub.load import load_workflow

            see_own_modules()
            pipe = load_workflow(location, revision=revision, trust_remote_code=True, load_components=False)
        else:
            blocks: Any = load_blocks(location, trust_remote_code=False)
            pipe = blocks.init_pipeline(location)
        if weights == "include":
            named = pipe.pretrained_component_names  # the source lacks those that its index names without a type
            held = [name for name in named if pipe.get_component_spec(name).type_hint is not None]
            pipe.load_components(held, dtype=options.parse_dtype(dtype))
    with console.status(f"writing {directory}"):
        export_workflow(
            pipe,
            directory,
            mode=mode,
            weights=weights,
            title=title,
            notes="" if notes is None else notes.read_text(encoding="utf-8"),
            image=image,
            licence=licence,
            delta=delta,
            overwrite=force,
        )
    sizes = [path.stat().st_size for path in directory.rglob("*") if path.is_file()]
    typer.echo(f"{directory}: {len(sizes)} files, {sum(sizes):,} bytes")
