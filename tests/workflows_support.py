"""Tiny weights saved as the repositories that recipes load from the Hub."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from perflow_blocks.testing import load_tiny_ip_adapter, tiny_sdxl_unet
from perflow_blocks.testing.tiny import IMAGE_WIDTH


def save_ip_adapter(path: Path) -> None:
    """Lays out IP-Adapter and image encoder for `tiny_sdxl_unet` as "h94/IP-Adapter" does for SDXL."""
    # Of the size that diffusers brings pictures to where nothing says otherwise.
    size = {"image_size": 224, "patch_size": 56, "hidden_size": 16, "intermediate_size": 32}
    config = CLIPVisionConfig(**size, projection_dim=IMAGE_WIDTH, num_hidden_layers=1, num_attention_heads=2)
    folder = path / "sdxl_models"
    CLIPVisionModelWithProjection(config).eval().save_pretrained(folder / "image_encoder")
    save_file(_ip_adapter_tensors(), folder / "ip-adapter_sdxl.safetensors")


def _ip_adapter_tensors() -> dict[str, Tensor]:
    """What `load_tiny_ip_adapter` loads, as a file holds it."""
    loaded: list[Any] = []
    pipe = SimpleNamespace(
        unet=tiny_sdxl_unet(), null_component_names=[], load_ip_adapter=lambda weights, **_: loaded.extend(weights)
    )
    load_tiny_ip_adapter(pipe)
    (parts,) = loaded
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
