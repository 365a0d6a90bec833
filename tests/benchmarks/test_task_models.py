"""What the images of three task pages are drawn with is trained, loads by the usual calls, and does something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import load_file

from benchmarks import task_models
from perflow_blocks.demo import perflow_pipeline
from perflow_blocks.demo.train import SETTINGS
from perflow_blocks.training.checkpoints import DELTA


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Trains one part for seconds, and returns where its models are and its image."""
    settings = tmp_path / "settings.toml"
    text = SETTINGS.read_text()
    for old, new in {"batch_size = 32": "batch_size = 2", "buffer_size = 1536": "buffer_size = 8"}.items():
        assert old in text
        text = text.replace(old, new)
    settings.write_text(text.replace("max_samples = 32000", "max_samples = 16"))
    monkeypatch.setattr(task_models, "SETTINGS", settings)
    monkeypatch.setattr(task_models, "IMAGES", 60)

    def run(part: str) -> tuple[Path, Image.Image]:
        task_models.main([part], out=tmp_path / "models", docs=tmp_path, minutes=0.03)
        return tmp_path / "models" / part, Image.open(tmp_path / f"{part}.png")

    return run


def test_a_controlnet_learns_from_edges(train: Any) -> None:
    models, image = train("controlnet")
    controlnet: Any = ControlNetModel.from_pretrained(models)
    assert all(block.weight.abs().max() > 0 for block in controlnet.controlnet_down_blocks)  # they start at 0
    assert image.width > image.height


def test_edges_are_where_an_image_changes() -> None:
    image = Image.new("RGB", (16, 16), "white")
    image.paste("red", (4, 4, 12, 12))
    found = np.asarray(task_models.edges(image).convert("L"))
    assert found[3:5, 6:10].max() == 255 and found[6:10, 6:10].max() == 0
    assert found[[0, -1]].max() == 0 and found[:, [0, -1]].max() == 0


def test_an_ip_adapter_loads_and_changes_the_image(train: Any) -> None:
    models, image = train("ip-adapter")
    given, without, _, with_it, *_ = (np.asarray(cell) for cell, _ in task_models.draw_ip_adapter(models))
    assert given.shape == without.shape and not np.array_equal(without, with_it)
    assert np.array_equal(without, np.asarray(perflow_pipeline()("a star", generator=task_models.seeded()).images[0]))
    assert image.width > image.height


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_stable_diffusion_model_is_made_and_distilled(train: Any) -> None:
    models, image = train("stable-diffusion")
    delta = load_file(models / "student" / DELTA)
    assert max(change.abs().max() for change in delta.values()) > 0
    assert all(torch.isfinite(change).all() for change in delta.values())
    assert image.height > image.width
