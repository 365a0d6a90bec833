"""The Python on the cards under workflows/ runs as it stands, with tiny weights in place of the Hub's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ModularPipeline
from transformers import CLIPVisionModelWithProjection

from perflow_blocks import export_workflow
from perflow_blocks.testing import tiny_controlnet, tiny_mask, tiny_picture, tiny_sdxl_unet
from tests.hub.conftest import save_ip_adapter, tiny_pipeline, use_own_modules
from workflows.generate import PUBLISHED, WORKFLOWS

NAMES = sorted(PUBLISHED)


def snippets(name: str) -> list[str]:
    card = (WORKFLOWS / name / "README.md").read_text()
    return re.findall(r"^```py\n(.*?)^```", card, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """What the cards load from the Hub, at tiny size, and pictures in the current directory."""
    use_own_modules(tmp_path / "modules", monkeypatch)
    monkeypatch.chdir(tmp_path)
    for name, picture in {"photo": tiny_picture(1), "style": tiny_picture(2), "control": tiny_picture(3)}.items():
        picture.save(f"{name}.png")
    tiny_mask().save("mask.png")
    save_ip_adapter(tmp_path / "adapter")
    tiny_sdxl_unet(1).save_pretrained(tmp_path / "other" / "unet", variant="v0-fix")
    return {"h94/IP-Adapter": tmp_path / "adapter", "hansyan/perflow-sdxl-dreamshaper": tmp_path / "other"}


def published(name: str, places: dict[str, Path], folder: Path) -> Path:
    """The workflow with tiny weights in it; the demo's own are tiny."""
    if name.startswith("demo"):
        return WORKFLOWS / name
    blocks, further = PUBLISHED[name].blocks(), dict[str, Any]()
    if "controlnet" in PUBLISHED[name].sources:
        further["controlnet"] = tiny_controlnet()
    if "image_encoder" in PUBLISHED[name].sources:
        encoder = places["h94/IP-Adapter"] / "sdxl_models" / "image_encoder"
        further["image_encoder"] = CLIPVisionModelWithProjection.from_pretrained(encoder)
    pipe = tiny_pipeline(blocks, **further)
    return export_workflow(pipe, folder / name, mode="thin", weights="include")


def run_snippet(code: str, places: dict[str, Path]) -> dict[str, Any]:
    """What the code defines, on the CPU."""
    for name, place in places.items():
        code = code.replace(f'"{name}"', repr(str(place)))
    code = code.replace('"cuda"', '"cpu"').replace("torch.float16", "torch.float32")
    defined = dict[str, Any]()
    exec(compile(code, "README.md", "exec"), defined)
    return defined


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_card_runs(name: str, places: dict[str, Path], tmp_path: Path) -> None:
    example, loader = snippets(name)
    places[f"your-name/{name}"] = published(name, places, tmp_path)
    loaded = run_snippet(loader, places)["pipe"]
    assert type(loaded.blocks) is PUBLISHED[name].blocks
    torch.manual_seed(0)
    defined = run_snippet(example, places)
    image = defined["image"]
    assert (tmp_path / "picture.png").is_file()
    if name == "sdxl-tile-upscaler":
        assert image.size == (64, 64) and defined["photo"].size == (32, 32)
    if name == "sdxl-ip-adapter":
        assert defined["pipe"].unet.config.encoder_hid_dim_type == "ip_image_proj"
    if name == "sdxl-base-refiner":
        assert isinstance(defined["refiner"], ModularPipeline) and defined["refiner"].unet is not defined["pipe"].unet
    if name == "demo-text2image":
        pixels = np.asarray(image.convert("RGB"), dtype=int)
        red = (pixels[..., 0] > 120) & (pixels[..., 1:].max(-1) < 90)
        assert pixels[:4].max() < 60 and red.mean() > 0.05


def test_the_demo_s_card_says_what_a_cpu_does() -> None:
    text = "\n".join(snippets("demo-text2image"))
    assert "float16" not in text and "cuda" not in text
