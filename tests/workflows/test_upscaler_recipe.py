"""The upscaling recipe, on tiny components and on the embedded model."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perflow_blocks.testing import tiny_controlnet, tiny_image
from tests.conftest import count_unet_calls, make_pipeline

RECIPE = runpy.run_path(str(Path(__file__).parent.parent.parent / "workflows" / "sdxl-tile-upscaler" / "recipe.py"))


@pytest.mark.parametrize(
    ("small", "scale", "controlled", "large", "tiles"),
    [
        ((20, 13), 2, True, (40, 24), 2),  # 26 pixels are no multiple of 8
        ((20, 16), 4, True, (80, 64), 9),
        ((20, 16), 2, False, (40, 32), 2),
    ],
)
def test_the_recipe_enlarges(
    small: tuple[int, int], scale: int, controlled: bool, large: tuple[int, int], tiles: int
) -> None:
    components = {"controlnet": tiny_controlnet()} if controlled else {}
    pipe = make_pipeline(RECIPE["assemble"](with_controlnet=controlled), **components)
    calls = count_unet_calls(pipe)
    results = [
        RECIPE["upscale"](pipe, tiny_image(seed, small), "a star", scale, 0.6, num_inference_steps=4)
        for seed in (1, 2)
    ]
    assert results[0].size == large
    assert calls == [2] * (2 * 3 * tiles)  # from 0.6, 0.5 and 0.25
    assert results[0].tobytes() != results[1].tobytes()


def test_the_recipe_runs_with_the_embedded_model(tmp_path: Path) -> None:
    small = Image.new("RGB", (64, 48), "white")
    small.paste((214, 40, 40), (16, 12, 48, 36))
    small.save(tmp_path / "small.png")
    out = RECIPE["main"](prompt="a red square", image=tmp_path / "small.png", out=tmp_path / "out" / "large.png")
    with Image.open(out) as large:
        assert large.size == (128, 96)
        apart = np.asarray(large.convert("RGB"), float) - np.asarray(small.resize((128, 96), Image.Resampling.LANCZOS))
    assert np.abs(apart).mean() < 12.0
