"""Four-step text to image with the embedded model, from the modular repository to the picture.

Run it with `python workflows/demo-text2image/recipe.py "a red star on a white background"`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import ModularPipeline

from perflow_blocks.demo import weights_directory


def main(prompt: str, out: Path) -> Path:
    """Draws one picture of `prompt` and returns where it was written."""
    pipe = ModularPipeline.from_pretrained(str(weights_directory()), trust_remote_code=True)
    pipe.load_components(dtype=torch.float32)
    image = pipe(prompt=prompt, num_inference_steps=4, generator=torch.manual_seed(0), output="images")[0]
    out.parent.mkdir(parents=True, exist_ok=True)
    image.save(out)
    return out


if __name__ == "__main__":
    request = " ".join(sys.argv[1:]) or "a red star on a white background"
    sys.stdout.write(f"{main(request, Path('outputs/recipe.png'))}\n")
