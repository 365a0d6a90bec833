"""What a session is put together of: offloaded text encoders, averages, processes that wait for each other."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import UserCpuOffloadHook
from torch import nn

from perflow_blocks.training.session import make_accelerator, open_session
from perflow_blocks.training.student import make_ema
from tests.training.conftest import tiny_config

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.mark.parametrize("offload", ["none", "encoders", "all"])
@pytest.mark.parametrize("family", ["sdxl", "sd"])
def test_text_encoders_leave_the_device_whenever_they_were_used(
    family: str, offload: str, teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken_back: list[str] = []
    original = UserCpuOffloadHook.offload

    def note(self: Any) -> None:
        taken_back.append(type(self.model).__name__)
        original(self)

    monkeypatch.setattr(UserCpuOffloadHook, "offload", note)
    session = open_session(tiny_config(tmp_path, teachers[family], teacher__offload=offload))
    encoders = ["CLIPTextModel", "CLIPTextModelWithProjection"][: 2 if family == "sdxl" else 1]
    each_time = [] if offload == "none" else encoders
    assert taken_back == each_time  # after the empty prompt
    session.teacher.encoder.rows(["a", "b"])
    assert taken_back == each_time * 2
    session.teacher.encoder.rows(["b"])
    assert taken_back == each_time * 2


def test_averages_of_half_precision_weights_follow_them() -> None:
    """An average in bfloat16 would stay at 1: a thousandth of 0.05 is less than its rounding."""
    layer = nn.Linear(3, 3, bias=False).to(torch.bfloat16)
    nn.init.ones_(layer.weight)
    ema = make_ema(layer, 0.999)
    assert ema is not None
    ema.optimization_step = 20_000  # the first averages are of little memory
    with torch.no_grad():
        layer.weight.fill_(1.046875)
    for _ in range(1000):
        ema.step(layer.parameters())
    torch.testing.assert_close(ema.shadow_params[0], torch.full((3, 3), 1 + 0.046875 * (1 - 0.999**1000)))
    ema.store(layer.parameters())
    ema.copy_to(layer.parameters())
    assert layer.weight.dtype == torch.bfloat16 and 1.02 < layer.weight[0, 0].item() < 1.04
    ema.restore(layer.parameters())
    assert layer.weight[0, 0].item() == 1.046875


def test_processes_wait_for_the_main_one_s_pictures(tmp_path: Path) -> None:
    handler = make_accelerator(tiny_config(tmp_path, "demo")).init_handler
    assert handler is not None and handler.timeout == timedelta(hours=2)
