"""Every recipe under workflows/ runs as it stands."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

RECIPES = sorted((Path(__file__).parent.parent / "workflows").glob("*/recipe.py"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.parent.name)
def test_the_recipe_draws_its_picture(recipe: Path, tmp_path: Path) -> None:
    path = runpy.run_path(str(recipe))["main"]("a red star on a white background", tmp_path / "out" / "picture.png")
    with Image.open(path) as picture:
        assert picture.size == (64, 64)
        inner = np.asarray(picture.convert("RGB"), dtype=float)
    darkest = inner[inner.sum(-1) < 600].mean(0)  # the shape; the background is white
    assert darkest[0] > 1.5 * darkest[1] and darkest[0] > 1.5 * darkest[2]


def test_there_are_recipes() -> None:
    assert RECIPES
