"""`perflow export`: a pipeline as a workflow repository."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .tables import aligned


def export(
    source: Annotated[str, typer.Argument(help="Directory or repository of an SDXL model or workflow.")],
    directory: Annotated[Path, typer.Argument(help="Directory for the repository.")],
    mode: Annotated[str, typer.Option(help="thin needs this package, self-contained diffusers only.")] = "thin",
    weights: Annotated[
        str, typer.Option(help="reference names repositories, include saves weights, delta-only copies the delta.")
    ] = "reference",
    delta: options.Delta = None,
    name: Annotated[str | None, typer.Option(help="Class of the workflow's blocks.")] = None,
    title: Annotated[
        str | None, typer.Option(help="Heading of the model card. By default the directory's name.")
    ] = None,
    notes: Annotated[Path | None, typer.Option(help="Markdown file with what users have to know.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Image for the model card.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence for the model card, such as apache-2.0.")] = None,
    repo_id: Annotated[str | None, typer.Option(help="Repository that this will be, owner/name, if known.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository with code.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run SOURCE's code and export its blocks, not the preset.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Type of included weights: float16, float32 or bfloat16.")] = "float16",
    force: options.Force = False,
) -> None:
    """Write a repository that loads anywhere from SOURCE: blocks, index, model card, weights if asked."""
    precision = options.parse_dtype(dtype)
    if revision is not None and not trust_remote_code:
        raise ValueError(f"--revision {revision} is for the blocks of SOURCE; pass --trust-remote-code with it.")
    if notes is not None and not notes.is_file():
        raise ValueError(f"--notes {notes} is not a file; pass a Markdown file.")
    from ..blocks.auto_blocks import PeRFlowSDXLAutoBlocks
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
            pipe = PeRFlowSDXLAutoBlocks().init_pipeline(location)
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
    """A line for each file at the top and each folder, with its size in bytes."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    sizes = Counter[str]()
    for path in files:
        top, *inner = path.relative_to(directory).parts
        sizes[f"{top}/" if inner else top] += path.stat().st_size
    lines = aligned([[place, f"{size:,} bytes"] for place, size in sizes.items()])
    return [f"{directory}: {len(files)} files, {sizes.total():,} bytes", *(f"  {line}" for line in lines)]


def _sources(pipe: Any) -> list[str]:
    """The components that the source has; one that its index names without a type it has not."""
    names = pipe.pretrained_component_names
    return [name for name in names if pipe.get_component_spec(name).type_hint is not None]
