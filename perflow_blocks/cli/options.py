"""Options that several subcommands share: how they are written, and the checks that need no model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    import torch

DtypeName = Literal["float32", "float16", "bfloat16", "fp32", "fp16", "bf16"]

Model = Annotated[
    str | None, typer.Option(help="Repository or directory of an SDXL model. By default the embedded demo model.")
]
Delta = Annotated[Path | None, typer.Option(exists=True, help="Delta file (.safetensors) to merge into the UNet.")]
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


def require_prompts(prompts: list[str]) -> None:
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError('a prompt is empty; write what to draw, such as "a red star on a white background".')


def parse_size(text: str | None) -> tuple[int, int] | None:
    """(width, height) in pixels from "N" or "WxH"; None from None."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+)\s*(?:[xX]\s*(\d+)\s*)?", text)
    width, height = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if width < 1 or height < 1:
        raise ValueError(f"--size {text} is no size; pass N or WxH in pixels, both at least 1, such as 1024x768.")
    return width, height


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
