"""The README's section on sharing: its code runs on the pipeline that the README begins with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModularPipeline
from PIL import Image

import perflow_blocks
from perflow_blocks.demo import weights_directory
from perflow_blocks.hub.publish import PushReport, push_workflow
from tests.hub.conftest import use_own_modules
from tests.hub.loopback.server import LoopbackHub

README = Path(__file__).parent.parent.parent / "README.md"


def test_the_section_on_sharing_runs(
    loopback_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_own_modules(tmp_path / "modules", monkeypatch)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("star.png")
    reports: list[PushReport] = []

    def push(directory: str, repo_id: str) -> None:
        reports.append(push_workflow(directory, repo_id, endpoint=loopback_hub.endpoint, token=loopback_hub.token))
        for path, content in loopback_hub.files(repo_id).items():
            (tmp_path / repo_id / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / repo_id / path).write_bytes(content)  # which is then loaded by its path

    monkeypatch.setattr(perflow_blocks, "push_workflow", push)
    section = README.read_text().split("\n## Share\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"^```py\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    code = code.replace("your-name/", "someone/").replace('"cuda"', '"cpu"').replace("float16", "float32")
    pipe = ModularPipeline.from_pretrained(str(weights_directory()), trust_remote_code=True)
    pipe.load_components(dtype=torch.float32)
    defined: dict[str, Any] = {"pipe": pipe, "torch": torch}
    exec(compile(code, "README.md", "exec"), defined)
    (report,) = reports
    assert {"picture.png", "unet/config.json"} <= {file.path for file in report.files}
    shared = defined["pipe"]
    assert shared is not pipe and type(shared.blocks).__name__ == type(pipe.blocks).__name__
    drawn = [
        each(prompt="a red star", generator=torch.Generator().manual_seed(0), output_type="latent", output="images")
        for each in (pipe, shared)
    ]
    torch.testing.assert_close(drawn[1], drawn[0], atol=1e-4, rtol=1e-4)
