"""The Python of the README's section on recombining runs as it stands, with tiny weights in place of the Hub's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from perflow_blocks.attention import strategies
from perflow_blocks.testing import tiny_controlnet, tiny_controlnet_union, tiny_picture
from tests.conftest import make_pipeline
from tests.hub.conftest import save_ip_adapter

README = Path(__file__).parent.parent / "README.md"


def snippets(heading: str) -> list[str]:
    """The Python under a heading of the second level, in order."""
    sections = re.split(r"^## ", README.read_text(), flags=re.MULTILINE)
    (section,) = (text for text in sections if text.startswith(f"{heading}\n"))
    return re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)


def test_the_section_on_recombining_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(strategies, "_STRATEGIES", dict(strategies._STRATEGIES))
    repositories = {
        "diffusers/controlnet-canny-sdxl-1.0": tmp_path / "controlnet",
        "xinsir/controlnet-union-sdxl-1.0": tmp_path / "union",
        "h94/IP-Adapter": tmp_path / "adapter",
    }
    tiny_controlnet().save_pretrained(tmp_path / "controlnet")
    tiny_controlnet_union().save_pretrained(tmp_path / "union")
    save_ip_adapter(tmp_path / "adapter")
    for name in ("edges", "depth", "photo"):
        tiny_picture(len(name)).save(f"{name}.png")
    tiny, defined = make_pipeline(), dict[str, Any]()
    for snippet in snippets("Recombine"):
        names = [name for name in repositories if name in snippet]
        for name in names:
            snippet = snippet.replace(name, str(repositories[name]))
        pipe = defined.get("pipe")
        if names:
            defined["pipe"] = tiny
        with torch.compiler.set_stance("force_eager"):  # compiling for a CPU takes minutes
            exec(compile(snippet, "README.md", "exec"), defined)
        if names:
            defined["pipe"] = pipe
    assert (tmp_path / "star-3.png").is_file()
    assert (tmp_path / "preview-2.png").is_file() and not (tmp_path / "preview-3.png").is_file()
    assert (defined["hits"], defined["misses"]) == (3, 1)
    assert tiny.controlnet.config.num_control_type
    assert defined["image"].size == (64, 64)
