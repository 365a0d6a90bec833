"""Going on: from an earlier step, with other settings, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from perflow_blocks.training.checkpoints import list_checkpoints, require_same
from perflow_blocks.training.config import ConfigError, load_config
from perflow_blocks.training.layout import sheet_path
from perflow_blocks.training.loop import Observer, _Run, train
from perflow_blocks.training.preflight import require_possible
from perflow_blocks.training.session import Session, open_session
from tests.training.conftest import tiny_config, write_config

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def teacher(teachers: dict[str, Path]) -> Path:
    return teachers["sd"]


class BrokenOff(BaseException):
    """Stands for a kill."""


class Breaks(Observer):
    def updated(self, session: Session, step: int) -> None:
        raise BrokenOff


class Draws(Observer):
    """In the validation's place."""

    def updated(self, session: Session, step: int) -> None:
        sheet_path(Path(session.config.output.directory), step).write_bytes(b"own")


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder / "run" / "checkpoints")]


def rates(folder: Path) -> list[float]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["learning_rate"] for line in lines]


def test_a_run_that_goes_on_from_an_earlier_step_takes_the_place_of_the_other(teacher: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"output__checkpoint_every": 1, "output__keep_checkpoints": 5}
    train(tiny_config(tmp_path, teacher, **settings))
    before = names(tmp_path)
    assert before == [f"step_0000000{step}" for step in (2, 3, 4, 5, 6)]
    for step in (2, 3, 6):
        sheet = sheet_path(tmp_path / "run", step)
        sheet.parent.mkdir(exist_ok=True)
        sheet.write_bytes(b"")
    settings |= {"output__resume": tmp_path / "run" / "checkpoints" / "step_00000002", "optimizer__max_steps": 4}
    (tmp_path / "run" / "validation.jsonl").write_text('{"step": 2}\n{"step": 6}\n')
    with pytest.raises(BrokenOff):
        train(tiny_config(tmp_path, teacher, **{**settings, "output__checkpoint_every": 2}), [Breaks()])
    assert names(tmp_path) == before  # nothing goes before there is something in its place
    assert len(list((tmp_path / "run" / "validation").iterdir())) == 3
    settings |= {"output__checkpoint_every": 2, "output__keep_checkpoints": 1}
    result = train(tiny_config(tmp_path, teacher, **settings), [Draws()])
    assert names(tmp_path) == ["step_00000004"] and result.steps == 4
    sheets = sorted((tmp_path / "run" / "validation").iterdir())
    assert {path.name: path.read_bytes() for path in sheets} == {
        "step_00000002.png": b"",
        "step_00000003.png": b"own",
        "step_00000004.png": b"own",
    }
    assert (tmp_path / "run" / "validation.jsonl").read_text() == '{"step": 2}\n'
    with pytest.raises(ConfigError, match=r"optimizer.max_steps=3 is below the 4 updates of step_00000004; pass at"):
        train(tiny_config(tmp_path, teacher, optimizer__max_steps=3, output__resume="latest"))


def test_checkpoints_of_another_run_are_not_gone_on_with_where_there_are_some(teacher: Path, tmp_path: Path) -> None:
    other = train(tiny_config(tmp_path, teacher, "other", optimizer__max_steps=1)).directory
    settings: dict[str, Any] = {"output__resume": other / "checkpoints" / "step_00000001", "optimizer__max_steps": 2}
    assert train(tiny_config(tmp_path, teacher, **settings)).steps == 2
    path = write_config(tmp_path, teacher)
    texts = {name.replace("__", "."): str(value) for name, value in settings.items()}
    with pytest.raises(ConfigError, match=r"holds other checkpoints .* up to step_00000002; pass output.resume"):
        require_possible(load_config(path, texts))


def test_another_schedule_counts_from_the_first_update(teacher: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"output__log_every": 1, "optimizer__max_steps": 2}
    train(tiny_config(tmp_path, teacher, **settings))
    settings |= {"optimizer__schedule": "cosine", "optimizer__warmup_steps": 4, "optimizer__learning_rate": 1e-2}
    train(tiny_config(tmp_path, teacher, **{**settings, "optimizer__max_steps": 8, "output__resume": "latest"}))
    falling = [0.5 * (1 + math.cos(math.pi * share)) for share in (0, 0.25, 0.5, 0.75)]
    assert rates(tmp_path) == pytest.approx([1e-3, 1e-3, *(1e-2 * factor for factor in (0.5, 0.75, *falling))])


@pytest.mark.parametrize(
    ("settings", "afresh"),
    [
        ({"optimizer__learning_rate": 1e-4}, False),
        ({"loss__kind": "huber"}, True),
        ({"teacher__dtype": "bfloat16"}, True),
    ],
)
def test_losses_of_another_kind_are_not_compared(
    settings: dict[str, Any], afresh: bool, teacher: Path, tmp_path: Path
) -> None:
    directory = train(tiny_config(tmp_path, teacher, optimizer__max_steps=2)).directory
    checkpoint = directory / "checkpoints" / "step_00000002"
    run = _Run(open_session(tiny_config(tmp_path, teacher, output__resume="latest", **settings)), [])
    run.start(checkpoint)
    assert run.position.step == 2
    kept = [tuple(row) for row in json.loads((checkpoint / "state.json").read_text())["window_losses"]]
    assert len(kept) == 2 and all(len(row) == 4 and any(row) for row in kept)
    assert run.guard.losses == ([] if afresh else kept)


def test_the_rank_that_a_full_student_is_written_with_may_change(tmp_path: Path) -> None:
    for student in ("full", "lora"):
        old, new = (
            tiny_config(tmp_path, "demo", data__resolution=64, model__student=student, model__lora_rank=rank).flat()
            for rank in (4, 8)
        )
        if student == "full":
            require_same(old, new, Path("step_1"))
        else:
            with pytest.raises(ValueError, match=r"model.lora_rank is 4 there and 8 here"):
                require_same(old, new, Path("step_1"))
