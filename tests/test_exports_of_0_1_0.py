"""Workflows that version 0.1.0 exported: they load and give the same image from now on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import python

FIXTURES = Path(__file__).parent / "fixtures" / "exports_of_0_1_0.zip"
"""The two exports, `thin` and `self_contained`; the `weights` of both; the image `expected` of both."""

DRAW = """
import sys
import torch
from diffusers import ModularPipeline
from safetensors.torch import save_file

images = {}
for mode in ("self_contained", "thin"):
    assert "perflow_blocks" not in sys.modules
    pipe = ModularPipeline.from_pretrained(mode, trust_remote_code=True)
    pipe.load_components(dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    inputs = {"num_inference_steps": 4, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    images[mode] = pipe(prompt="a red star", output="images", **inputs).contiguous()
    assert pipe.config.attention_plan == ["self=sliced"]
    assert {row.asked for row in pipe.attention.report().rows if row.kind == "self"} == {"sliced"}
assert "perflow_blocks" in sys.modules
save_file(images, "drawn.safetensors")
"""


@pytest.mark.behaviour
def test_the_exports_of_0_1_0_give_their_image(tmp_path: Path) -> None:
    """One after the other in a new process, the one that needs no package first."""
    shutil.unpack_archive(FIXTURES, tmp_path)
    for mode in ("thin", "self_contained"):
        shutil.copytree(tmp_path / "weights", tmp_path / mode, dirs_exist_ok=True)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    python("-c", DRAW, environment={**environment, "PYTHONPATH": str(Path(__file__).parent.parent)}, cwd=tmp_path)
    expected = load_file(tmp_path / "expected.safetensors")["image"]
    for image in load_file(tmp_path / "drawn.safetensors").values():
        torch.testing.assert_close(image, expected, atol=1e-4, rtol=0)
