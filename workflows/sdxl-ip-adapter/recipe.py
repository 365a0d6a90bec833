"""IP-Adapter: an image as part of the prompt, for its style and its subject.

    python workflows/sdxl-ip-adapter/recipe.py photo.png "a bear in a forest"

Full-size SDXL on a GPU: PeRFlow's published weights, unless `--model` names others, and the IP-Adapter of
`--adapter`, a directory or repository, with its image encoder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from perflow_blocks import PeRFlowSDXLAutoBlocks

HERE = Path(__file__).parent
"""This workflow's repository, whose index names PeRFlow's published weights for SDXL."""


def draw(
    pipe: Any, image: Image.Image, prompt: str, scale: float = 0.6, seed: int = 0, **settings: Any
) -> Image.Image:
    """An image of prompt and given image; `scale` is the weight of the latter, 0 for none, 1 for most."""
    pipe.set_ip_adapter_scale(scale)
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt=prompt, ip_adapter_image=image, generator=generator, output="images", **settings)[0]


def load(model: str, adapter: str, subfolder: str, weight_name: str, device: str) -> Any:
    """The pipeline of a directory or repository, with the IP-Adapter of another."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    pipe = PeRFlowSDXLAutoBlocks().init_pipeline(model)
    pipe.load_components([name for name in pipe.pretrained_component_names if name != "image_encoder"], dtype=dtype)
    encoder = CLIPVisionModelWithProjection.from_pretrained(
        adapter, subfolder=f"{subfolder}/image_encoder", dtype=dtype
    )
    # Both, since the index of a repository may say that there is neither.
    pipe.register_components(image_encoder=encoder, feature_extractor=CLIPImageProcessor())
    pipe.load_ip_adapter(adapter, subfolder=subfolder, weight_name=weight_name)
    return pipe.to(device)


def main(
    image: Path,
    prompt: str,
    *,
    scale: float = 0.6,
    model: str = str(HERE),
    adapter: str = "h94/IP-Adapter",
    subfolder: str = "sdxl_models",
    weight_name: str = "ip-adapter_sdxl.safetensors",
    device: str = "cuda",
    seed: int = 0,
    out: Path = Path("outputs/ip_adapter.png"),
) -> Path:
    """Writes the new image and returns where; the number of steps is what the weights recommend."""
    pipe = load(model, adapter, subfolder, weight_name, device)
    drawn = draw(pipe, Image.open(image).convert("RGB"), prompt, scale, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    drawn.save(out)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.add_argument("image", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--scale", type=float)
    parser.add_argument("--model")
    parser.add_argument("--adapter")
    parser.add_argument("--subfolder")
    parser.add_argument("--weight-name")
    parser.add_argument("--device")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", type=Path)
    sys.stdout.write(f"{main(**vars(parser.parse_args()))}\n")
