"""Options that several subcommands share: how they are written, and the checks that need no model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")
MAX_SEED = 2**63 - 1

Model = Annotated[
    str | None, typer.Option(help="Repository or directory of an SDXL model. By default the embedded demo model.")
]
Delta = Annotated[Path | None, typer.Option(help="Delta file (.safetensors) to merge into the UNet.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps, at least 1. By default as the weights recommend.")]
Guidance = Annotated[
    float | None, typer.Option(help="Guidance scale, at least 0; 1 is none. By default as the weights recommend.")
]
Negative = Annotated[str | None, typer.Option(help="What not to draw.")]
Seed = Annotated[int, typer.Option(help="Seed of the first picture; each further picture takes the next.")]
Size = Annotated[str | None, typer.Option(help="Size in pixels, N or WxH. By default the model's own.")]
Device = Annotated[str | None, typer.Option(help="Where to run, such as cpu or cuda:0. By default an accelerator.")]
Dtype = Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}. By default float32 on the CPU, else float16.")]

RecipeSteps = Annotated[int | None, typer.Option("--steps", help="Steps to recommend, at least 1.")]
RecipeGuidance = Annotated[float | None, typer.Option("--guidance", help="Guidance to recommend; 1 is none.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


def require_prompts(prompts: list[str]) -> None:
    empty = [str(number) for number, prompt in enumerate(prompts, start=1) if not prompt.strip()]
    if not prompts or empty:
        which = f"prompt {', '.join(empty)} is empty" if empty else "no prompt is given"
        raise ValueError(f'{which}; write what to draw, such as "a red star on a white background".')


def require_seeds(seed: int, count: int) -> None:
    if not 0 <= seed <= MAX_SEED - count:
        raise ValueError(f"--seed {seed} is out of range; pass a number from 0 to {MAX_SEED - count}.")


def parse_size(text: str | None) -> tuple[int, int] | None:
    """(width, height) in pixels from "N" or "WxH"; None for None."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+)\s*(?:[xX]\s*(\d+)\s*)?", text)
    width, height = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if width < 1 or height < 1:
        raise ValueError(f"--size {text} is no size; pass N or WxH in pixels, both at least 1, such as 1024x768.")
    return width, height


def choose_device(name: str | None) -> torch.device:
    """The named device, else the first accelerator, else the CPU.

    Raises:
        ValueError: torch knows no such device, or this machine has none.
    """
    import torch

    if name is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0].split(". ")[0]
        raise ValueError(f"--device {name} cannot be used here ({reason}); pass cpu.") from error
    if device.type == "meta":
        raise ValueError("--device meta holds no values; pass cpu.")
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The named type, else float32 on the CPU and float16 elsewhere."""
    import torch

    if name is None:
        return torch.float32 if device.type == "cpu" else torch.float16
    return parse_dtype(name)


def parse_dtype(name: str) -> torch.dtype:
    """The type of a name, which may be short: fp16, fp32, bf16.

    Raises:
        ValueError: an unknown name.
    """
    import torch

    known = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(name, name)
    if known not in DTYPES:
        raise ValueError(f"--dtype {name} is unknown; pass one of {', '.join(DTYPES)}.")
    return getattr(torch, known)


def require_weights(name: str, path: Path) -> None:
    if not path.expanduser().exists():
        raise ValueError(f"{name} {path} does not exist; pass a file or a folder of weights.")


def require_free_file(option: str, path: Path, force: bool) -> None:
    """
    Raises:
        ValueError: the path is a directory, has another ending, stands there already and is not to be replaced, or
            cannot be written to.
    """
    from ..atomic_files import require_writable_directory

    if path.is_dir() or path.suffix != ".safetensors":
        raise ValueError(f"{option} {path} is {'a directory' if path.is_dir() else 'no .safetensors file'}; name one.")
    if path.exists() and not force:
        raise ValueError(f"{option} {path} exists; name another file, or pass --force to replace it.")
    require_writable_directory(path.parent)
