"""Options that several subcommands share: how they are written, and the checks that need no model."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    import torch

DtypeName = Literal["float32", "float16", "bfloat16", "fp32", "fp16", "bf16"]


def path(help: str, **settings: Any) -> Any:
    """An option for a file or directory that exists."""
    return typer.Option(exists=True, help=help, **settings)


def file(help: str) -> Any:
    return path(help, dir_okay=False)


Model = Annotated[
    str | None,
    typer.Option(help="Repository or directory of an SDXL or SD model. By default the embedded one."),
]
Unet = Annotated[Path | None, path("Folder of a UNet that perflow merge wrote, for --model.")]
Delta = Annotated[Path | None, path("Delta file (.safetensors) to merge into the UNet.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps. By default as the weights recommend.")]
Guidance = Annotated[
    float | None, typer.Option(min=0, help="Guidance scale; 1 is none. By default as the weights recommend.")
]
NumImages = Annotated[int, typer.Option(min=1, help="Images for each prompt, each with another seed.")]
Seed = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="Seed of the first image; each further image takes the next.")
]
Size = Annotated[str | None, typer.Option(help="Size in pixels, N or WxH. By default the model's own.")]
Device = Annotated[str | None, typer.Option(help="Where to run, such as cpu or cuda:0. By default an accelerator.")]
Dtype = Annotated[DtypeName | None, typer.Option(help="By default float32 on the CPU, else float16.")]

DeltaArgument = Annotated[
    Path, typer.Argument(exists=True, help="A delta: a .safetensors file or a folder of weights.")
]
OutFile = Annotated[Path, typer.Option("--out", "-o", help="The file to write, a .safetensors file.")]
StoredDtype = Annotated[DtypeName, typer.Option(help="Type to store.")]
Variant = Annotated[str | None, typer.Option(help="Which files of the folder, fp16 say, if it has several.")]
BaseVariant = Annotated[str | None, typer.Option(help="Which files of the base's folder.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


def parse_lora(text: str) -> tuple[Path, float]:
    """A LoRA's file or folder and its factor, from "FILE" or "FILE:SCALE"."""
    file, _, scale = text.rpartition(":")
    try:
        path, factor = (Path(file), float(scale)) if file and not Path(text).exists() else (Path(text), 1.0)
    except ValueError:
        path, factor = Path(text), 1.0
    if not path.exists() or not math.isfinite(factor):
        raise ValueError(f"--lora {text} must name a file that exists, and may give a factor: FILE or FILE:0.8.")
    return path, factor


def require_image_name(name: str, path: Path) -> None:
    """Raises ValueError unless PIL writes files of this suffix."""
    from PIL import Image

    Image.init()
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"{name} {path} is of no kind of image that can be written; name it .png, .jpg or .webp.")


def choose_device(name: str | None) -> torch.device:
    """The named device, else the first accelerator, else the CPU. ValueError where it cannot be used."""
    if name is not None and not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", name):
        raise ValueError(f"--device {name} is unknown; pass one such as cpu, cuda, cuda:1 or mps.")
    import torch

    if name is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0].split(". ")[0]
        raise ValueError(f"--device {name} cannot be used here ({reason}); pass cpu.") from error


def choose_place(name: str | None) -> tuple[torch.device, Any]:
    """The device of this process, and accelerate's state, of one process or of those of `accelerate launch`."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and name not in (None, "cpu"):
        raise ValueError(f"--device {name} is for one process; leave it out, or pass cpu.")
    device = choose_device(name)
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    state = PartialState(cpu=device.type == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU"))
    return state.device if state.num_processes > 1 else device, state


def choose_dtype(name: DtypeName | None, device: torch.device) -> torch.dtype:
    """The named type, else float32 on the CPU and float16 elsewhere."""
    return parse_dtype(name or ("float32" if device.type == "cpu" else "float16"))


def parse_dtype(name: DtypeName) -> torch.dtype:
    import torch

    return getattr(torch, {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(name, name))


def require_free_file(option: str, path: Path, force: bool) -> None:
    """Raises a ValueError unless a .safetensors file can be written there, and with `force` be replaced."""
    from ..atomic_files import require_writable_directory

    if path.is_dir() or path.suffix != ".safetensors":
        raise ValueError(f"{option} {path} is {'a directory' if path.is_dir() else 'no .safetensors file'}; name one.")
    if path.exists() and not force:
        raise ValueError(f"{option} {path} exists; name another file, or pass --force to replace it.")
    require_writable_directory(path.parent)


def require_free_directory(name: str, path: Path, force: bool) -> None:
    """Raises a ValueError unless a directory can be written there, and with `force` be replaced."""
    from ..atomic_files import require_writable_directory

    if path.is_dir() and any(path.iterdir()) and not force:
        raise ValueError(f"{name} {path} exists; name another directory, or pass --force to replace it.")
    require_writable_directory(path)


def table(*rows: Sequence[object]) -> str:
    """Rows in columns, the first to the left and the others to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells)
    return "\n".join("  ".join(line) for line in lines)
