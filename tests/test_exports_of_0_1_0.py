"""Workflows that version 0.1.0 exported: they load and give the same image from now on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FIXTURES = Path(__file__).parent / "fixtures" / "exports_of_0_1_0.zip"
"""The two exports, `thin` and `self_contained`; the `weights` of both; the image `expected` of both."""
ROOT = Path(__file__).parent.parent

DRAW = """
import sys
import torch
from diffusers import ModularPipeline
from safetensors.torch import save_file

folder, expects_package = sys.argv[1], sys.argv[2] == "thin"
pipe = ModularPipeline.from_pretrained(folder, trust_remote_code=True)
pipe.load_components(dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
image = pipe(prompt="a red star", num_inference_steps=4, output_type="pt", generator=generator, output="images")
assert pipe.config.attention_plan == ["self=sliced"]
assert {row.asked for row in pipe.attention.report().rows if row.kind == "self"} == {"sliced"}
assert ("perflow_blocks" in sys.modules) == expects_package
save_file({"image": image.contiguous()}, f"{folder}/drawn.safetensors")
"""


@pytest.mark.behaviour
@pytest.mark.parametrize("mode", ["thin", "self_contained"])
def test_an_export_of_0_1_0_gives_its_image(mode: str, tmp_path: Path) -> None:
    fixtures, folder = tmp_path / "fixtures", tmp_path / "workflow"
    shutil.unpack_archive(FIXTURES, fixtures)
    for part in ("weights", mode):
        shutil.copytree(fixtures / part, folder, dirs_exist_ok=True)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", DRAW, str(folder), mode]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    image, expected = (
        load_file(path)["image"] for path in (folder / "drawn.safetensors", fixtures / "expected.safetensors")
    )
    torch.testing.assert_close(image, expected, atol=1e-4, rtol=0)
