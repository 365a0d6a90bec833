"""`perflow to-lora`: a delta as a LoRA file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from . import options


def to_lora(
    delta: Annotated[Path, typer.Argument(help="The delta, a .safetensors file of a UNet.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The LoRA, a .safetensors file.")],
    rank: Annotated[int | None, typer.Option(help="Rank of every layer; or pass --energy.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Share in (0, 1] of each layer's squared norm to keep, at the least rank.")
    ] = None,
    max_rank: Annotated[int, typer.Option(help="Bound of the rank under --energy.")] = 128,
    layout: Annotated[str, typer.Option(help="Names of the tensors: peft, as diffusers writes, or kohya.")] = "peft",
    residual: Annotated[
        Path | None, typer.Option(help="Write what a LoRA cannot hold, norms say, to this file: a delta to merge too.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where to compute, such as cuda:0. By default an accelerator.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Type to store: float16, float32 or bfloat16.")] = "float16",
    force: options.Force = False,
) -> None:
    """Write DELTA as a LoRA for load_lora_weights, and say what it keeps."""
    from ..components.lora_files import Layout, save_lora, save_residual

    if layout not in get_args(Layout):
        raise ValueError(f"--layout {layout} is unknown; pass one of {', '.join(get_args(Layout))}.")
    precision = options.parse_dtype(dtype)
    options.require_free_file("--out", out, force)
    if residual is not None:
        options.require_free_file("--residual", residual, force)
        if residual.resolve() == out.resolve():
            raise ValueError(f"--residual {residual} is --out too; name two files.")
    place = options.choose_device(device)
    from ..components.delta_lora import delta_to_lora

    converted = delta_to_lora(delta, rank=rank, energy=energy, max_rank=max_rank, dtype=precision, device=place)
    save_lora(converted, out, layout)  # type: ignore[arg-type]
    written = [f"{out}: {converted.report.summary()}"]
    if residual is not None and converted.residual:
        save_residual(converted, residual)
        written.append(f"{residual}: {len(converted.residual)} tensors, to be merged beside the LoRA.")
    elif converted.residual:
        written.append("The tensors kept in full are in no file; --residual writes them.")
    typer.echo("\n".join(written))
