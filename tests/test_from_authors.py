"""Every call in the right column of `docs/from-authors.md` runs, and its settings are the trainer's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline

import perflow_blocks
from perflow_blocks.core.distillation import student_output
from perflow_blocks.delta.extract import save_delta
from perflow_blocks.testing import tiny_sdxl_components
from perflow_blocks.testing.tiny import BETAS, MAX_TOKENS, TEXT_WIDTH, tiny_sdxl_unet
from perflow_blocks.training.config import DistillConfig

DOCUMENT = Path(__file__).parent.parent / "docs" / "from-authors.md"
ROWS = [
    re.split(r" \| ", line.strip("| ")) for line in DOCUMENT.read_text().splitlines() if line[:3] in ("| `", "| t")
]
CALLS = [code for row in ROWS for code in re.findall(r"`(.+?)`", row[-1]) if "(" in code]
SETTINGS = [
    code for row in ROWS if row[0][:3] == "`--" for code in re.findall(r"`([a-z]+\.[a-z_]+)(?: = .+?)?`", row[-1])
]


def base_sd(latents: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
    return (latents,)


@pytest.mark.parametrize("code", CALLS)
def test_each_call_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, base = tiny_sdxl_unet(1), tiny_sdxl_unet(0)
    delta_weights = perflow_blocks.extract_delta(student, base)
    (tmp_path / "folder").mkdir()
    save_delta(delta_weights, tmp_path / "folder" / "delta_weights.safetensors")
    monkeypatch.chdir(tmp_path)
    pipe = StableDiffusionXLPipeline(**{**tiny_sdxl_components(), "scheduler": DDIMScheduler(**BETAS)})
    if code.startswith("unmerge"):
        perflow_blocks.merge_delta(pipe, delta_weights)
    names = {
        **{name: getattr(perflow_blocks, name) for name in perflow_blocks.__all__},
        "student_output": student_output,
        "torch": torch,
        "pipe": pipe,
        "delta_weights": delta_weights,
        "student": student,
        "base": base,
        "base_sd": base_sd,
        "scheduler": pipe.scheduler,
        "latents": torch.ones(1, 4, 16, 16),
        "noise": torch.ones(1, 4, 16, 16),
        "embeds": torch.ones(1, MAX_TOKENS, 2 * TEXT_WIDTH),
        "pooled": torch.ones(1, TEXT_WIDTH),
    }
    exec(compile(code, DOCUMENT.name, "exec"), names)


def test_the_rows_are_read() -> None:
    assert len(CALLS) >= 14 and len(SETTINGS) >= 20


@pytest.mark.parametrize("key", SETTINGS)
def test_each_setting_is_the_trainers(key: str) -> None:
    section, name = key.split(".")
    assert name in DistillConfig.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
