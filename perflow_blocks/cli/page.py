"""`perflow app`: a page to draw on, in the browser."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import options
from .generate import name_of

if TYPE_CHECKING:
    import torch


def page(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Repository or directory of a model to offer; may be repeated. By default the embedded one."
        ),
    ] = None,
    delta: Annotated[list[Path] | None, options.path("Delta to offer; may be repeated. The first is preset.")] = None,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0: to the whole network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 7860,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    offload: Annotated[
        Literal["model", "group"] | None, typer.Option(help="Keep models, or their layers, on the CPU while unused.")
    ] = None,
) -> None:
    """Serve a page that draws: previews, comparison with the teacher, image-to-image and inpainting."""
    from .pipeline import model_location, quiet_libraries

    models = {name_of(one): model_location(one) for one in model or ()} or {"embedded": model_location(None)}
    deltas = {name_of(path): path.absolute() for path in delta or ()}
    for what, named, given in (("models", models, model), ("deltas", deltas, delta)):
        if len(named) < len(given or ()):
            raise ValueError(f"two {what} have the same name; rename one.")
    if not find_spec("gradio"):
        raise ValueError("perflow app needs gradio; install it with pip install 'perflow-blocks[app]'.")
    place = options.choose_device(device)
    quiet_libraries()
    from ..app.page import served
    from ..app.studio import Studio

    def load(location: str) -> Any:
        return opened(location, place, options.choose_dtype(dtype, place), embedded=model is None, offload=offload)

    studio = Studio(models, deltas, load)
    with served(studio, host, port, inbrowser=open_browser) as server:
        typer.echo(server.local_url)
        server.block_thread()


def opened(
    location: str, device: torch.device, dtype: torch.dtype, *, embedded: bool = False, offload: str | None = None
) -> Any:
    """A model for the page, and its teacher, which shares all parts with it."""
    from ..app.studio import Opened
    from ..blocks.auto_blocks import PeRFlowSDXLAutoBlocks
    from ..evaluation.samplers import classic_pipeline
    from .evaluate import usual_guidance
    from .pipeline import load_pipeline

    pipeline = load_pipeline(location, device=device, dtype=dtype, images=True, offload=offload, watched=True)
    pipeline.set_progress_bar_config(disable=True)
    if embedded or not isinstance(pipeline.blocks, PeRFlowSDXLAutoBlocks):
        pipeline.update_components(preview_decoder=pipeline.vae)  # the default map of colours is of SDXL's own VAE
    classic = classic_pipeline(pipeline)
    return Opened(pipeline, classic, usual_guidance(classic, embedded))
