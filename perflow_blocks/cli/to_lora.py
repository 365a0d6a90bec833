"""`perflow to-lora`: a delta as a LoRA file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from . import options


def to_lora(
    delta: options.DeltaArgument,
    out: options.OutFile,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of every layer; or pass --energy.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Share in (0, 1] of each layer's squared norm to keep, at the least rank.")
    ] = None,
    max_rank: Annotated[int, typer.Option(min=1, help="Bound of the rank under --energy.")] = 128,
    layout: Annotated[
        Literal["peft", "kohya"], typer.Option(help="Names of the tensors: peft, as diffusers writes, or kohya.")
    ] = "peft",
    keep_embeddings: Annotated[
        bool, typer.Option(help="Whether the residual holds the embeddings of time; not for a quantized UNet.")
    ] = True,
    residual: Annotated[
        Path | None, typer.Option(help="Write what a LoRA cannot hold, norms say, to this file: a delta to merge too.")
    ] = None,
    device: options.Device = None,
    dtype: options.StoredDtype = "float16",
    variant: options.Variant = None,
    force: options.Force = False,
) -> None:
    """Write DELTA as a LoRA for load_lora_weights, and say what it keeps."""
    if (rank is None) == (energy is None):
        raise ValueError("--rank and --energy: pass exactly one of the two.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"--energy {energy} must be a share in (0, 1], for example 0.9.")
    written = [("--out", out)] if residual is None else [("--out", out), ("--residual", residual)]
    taken = {delta.resolve()}
    for option, path in written:
        options.require_free_file(option, path, force)
        if path.resolve() in taken:
            raise ValueError(f"{option} {path} is the delta or another output too; name another file.")
        taken.add(path.resolve())
    place = options.choose_device(device)
    from ..delta.files import open_weights
    from ..delta.lora import delta_to_lora, save_lora, save_residual

    converted = delta_to_lora(
        open_weights(delta, variant),
        rank=rank,
        energy=energy,
        max_rank=max_rank,
        keep_embeddings=keep_embeddings,
        dtype=options.parse_dtype(dtype),
        device=place,
    )
    save_lora(converted, out, layout)
    typer.echo(f"{out}: {converted.report}")
    if not converted.residual:
        if residual is not None:
            residual.unlink(missing_ok=True)  # an older one is not of this LoRA
        typer.echo("Nothing is left beside it: no residual is written.")
    elif residual is None:
        typer.echo("The tensors kept in full are in no file; --residual writes them.")
    else:
        save_residual(converted, residual)
        typer.echo(f"{residual}: {len(converted.residual)} tensors, to be merged beside the LoRA.")
