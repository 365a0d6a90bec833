r"""Loads a workflow's repository, from a directory or the Hub, and runs it. It draws with the embedded demo model.

    python workflows/demo-text2image/recipe.py "a red star on a white background"
    python workflows/demo-text2image/recipe.py "a lighthouse at dusk" --workflow workflows/sdxl-text2image \
        --device cuda

`--workflow` is a directory or a repository of the Hub; its code runs, so it should be one that you trust.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from perflow_blocks import load_workflow


def draw(pipe: Any, prompt: str, seed: int = 0, **settings: Any) -> Image.Image:
    """An image of the prompt; `settings` are further inputs of the call, such as `num_inference_steps`."""
    return pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), output="images", **settings)[0]


def load(workflow: str, device: str) -> Any:
    """The pipeline of a workflow's directory or repository."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    return load_workflow(workflow, trust_remote_code=True, dtype=dtype, device=device)


def main(
    prompt: str = "a red star on a white background",
    *,
    workflow: str = str(Path(__file__).parent),
    device: str = "cpu",
    seed: int = 0,
    out: Path = Path("outputs/demo.png"),
) -> Path:
    """Writes the image and returns where; the number of steps is what the weights recommend."""
    image = draw(load(workflow, device), prompt, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    image.save(out)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.add_argument("prompt", nargs="?")
    parser.add_argument("--workflow")
    parser.add_argument("--device")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", type=Path)
    sys.stdout.write(f"{main(**vars(parser.parse_args()))}\n")
