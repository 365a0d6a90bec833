"""What fails around a training does not take its updates along, and what cannot be gone on from is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils.constants import SCALER_NAME
from safetensors.torch import load_file

from perflow_blocks.training.checkpoints import list_checkpoints, require_same
from perflow_blocks.training.loop import Observer, train
from perflow_blocks.training.progress import Progress
from perflow_blocks.training.session import Session
from tests.training.conftest import tiny_config

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def teacher(teachers: dict[str, Path]) -> Path:
    return teachers["sd"]


class Fails(Observer):
    """As a validation does for which there is not enough memory, or as a terminal that is gone."""

    def __init__(self, updated: int | None = None, read: int | None = None) -> None:
        self.updated_at, self.read_at = updated, read
        self.kept: list[str] = []

    def updated(self, session: Session, step: int) -> None:
        folder = Path(session.config.output.directory) / "checkpoints"
        self.kept = [path.name for path in list_checkpoints(folder)]
        if step == self.updated_at:
            raise MemoryError

    def read(self, progress: Progress) -> None:
        if progress.step == self.read_at:
            raise BrokenPipeError


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [loss for line in lines for loss in json.loads(line)["losses"]]


@pytest.mark.parametrize(
    ("fails", "error", "step"),
    [(Fails(updated=5), MemoryError, 5), (Fails(read=4), BrokenPipeError, 4)],
    ids=["updated", "read"],
)
def test_the_updates_before_a_failing_observer_are_kept(
    fails: Fails, error: type[Exception], step: int, teacher: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"optimizer__ema_decay": 0.5}
    whole = train(tiny_config(tmp_path, teacher, "whole", **settings))
    with pytest.raises(error):
        train(tiny_config(tmp_path, teacher, "broken", **settings), [fails])
    assert list_checkpoints(tmp_path / "broken" / "checkpoints")[-1].name == f"step_{step:08d}"
    broken = train(tiny_config(tmp_path, teacher, "broken", output__resume="latest", **settings))
    assert losses(broken.directory) == losses(whole.directory) and len(losses(whole.directory)) == 6
    one, other = load_file(whole.delta), load_file(broken.delta)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_checkpoint_of_a_step_is_there_before_its_validation(teacher: Path, tmp_path: Path) -> None:
    fails = Fails(updated=3)
    with pytest.raises(MemoryError):
        train(tiny_config(tmp_path, teacher), [fails])
    assert fails.kept == ["step_00000003"]


def test_an_observer_that_fails_at_the_start_leaves_no_checkpoint(teacher: Path, tmp_path: Path) -> None:
    class FailsFirst(Observer):
        def started(self, session: Session, step: int) -> None:
            raise MemoryError

    with pytest.raises(MemoryError):
        train(tiny_config(tmp_path, teacher), [FailsFirst()])
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []


@pytest.mark.parametrize(
    ("old", "new", "possible"),
    [("no", "bf16", True), (None, "no", True), ("fp16", "fp16", True), ("bf16", "fp16", False), ("fp16", None, False)],
)
def test_a_gradient_scaler_stays_what_it_is(old: str | None, new: str | None, possible: bool) -> None:
    there, here = (
        {"model.student": "full", "optimizer.mixed_precision": value, "optimizer.max_steps": 1} for value in (old, new)
    )
    if possible:
        require_same(there, here, Path("step_00000001"))
        return
    told = f"optimizer.mixed_precision is {json.dumps(old)} there and {json.dumps(new)} here; set these back"
    with pytest.raises(ValueError, match=told):
        require_same(there, here, Path("step_00000001"))


def test_a_launch_with_another_gradient_scaler_is_told(teacher: Path, tmp_path: Path) -> None:
    """accelerate's settings decide where the configuration says nothing, so that this alone does not show it."""
    checkpoint = list_checkpoints(train(tiny_config(tmp_path, teacher)).directory / "checkpoints")[-1]
    (checkpoint / SCALER_NAME).touch()
    with pytest.raises(
        ValueError, match="was written with mixed precision fp16 and this run has no; launch it as before"
    ):
        train(tiny_config(tmp_path, teacher, optimizer__max_steps=8, output__resume="latest"))
