"""Checkpoints: exact to go on from, whole whenever a run is killed, and unable to run code."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils.constants import SCALER_NAME
from safetensors.torch import load_file

from perflow_blocks.testing.tiny import tiny_image
from perflow_blocks.training.checkpoints import append_line, list_checkpoints, require_same, sheet_path, trim
from perflow_blocks.training.config import DistillConfig
from perflow_blocks.training.loop import Observer, Session, TrainingRun, train
from tests.training.conftest import losses, tiny_config, write_config

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

TRAJECTORIES: dict[str, Any] = {"teacher__starts": "trajectory", "teacher__on_policy_share": 0.5}


@pytest.fixture
def teacher(teachers: dict[str, Path]) -> Path:
    return teachers["sd"]


class Broken(BaseException):
    """Stands for a kill."""


class Notes(Observer):
    def __init__(self, breaks_at: int | None = None) -> None:
        self.steps: list[int] = []
        self.breaks_at = breaks_at

    def started(self, session: Session, step: int) -> None:
        self.steps.append(step)

    def updated(self, session: Session, step: int) -> None:
        self.steps.append(step)
        if step == self.breaks_at:
            raise Broken


def names(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(run)]


def assert_same(one: Path, other: Path) -> None:
    """The same losses and weights, to the bit."""
    assert losses(one) == losses(other)
    first, second = (load_file(run / "delta.safetensors") for run in (one, other))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("sdxl", TRAJECTORIES),
        ("sdxl", {"model__student": "lora", "data__kind": "folder"}),
        ("sd", {"optimizer__ema_decay": 0.5}),
    ],
)
def test_a_broken_run_goes_on_to_the_same_losses_and_weights(
    family: str, settings: dict[str, Any], teachers: dict[str, Path], tmp_path: Path
) -> None:
    settings = {**settings, "optimizer__gradient_accumulation_steps": 2, "optimizer__schedule": "cosine"}
    if settings.get("data__kind") == "folder":  # of several shapes
        settings |= {"data__path": tmp_path / "images", "data__random_flip": "true", "data__max_samples": "null"}
        (tmp_path / "images").mkdir()
        for number in range(12):
            tiny_image(number, [(40, 40), (64, 32), (30, 62)][number % 3]).save(tmp_path / f"images/{number}.png")
            (tmp_path / f"images/{number}.txt").write_text(f"image {number}")
    train(tiny_config(tmp_path, teachers[family], "whole", optimizer__max_steps=5, **settings))
    settings["optimizer__max_steps"] = 5
    with pytest.raises(Broken):
        train(tiny_config(tmp_path, teachers[family], "broken", **settings), [Notes(4)])
    torch.manual_seed(123)
    notes = Notes()
    train(tiny_config(tmp_path, teachers[family], "broken", output__resume="latest", **settings), [notes])
    assert notes.steps == [3, 4, 5] and len(losses(tmp_path / "whole")) == 5
    assert_same(tmp_path / "whole", tmp_path / "broken")


def killed_at(number: int, config: DistillConfig) -> None:
    """Trains, and ends the process without a warning at the `number`-th change of a file."""
    left = [number]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax")
        if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    train(config)


def test_a_run_that_is_killed_at_any_moment_goes_on_from_the_latest(teacher: Path, tmp_path: Path) -> None:
    """At 20 random changes of files, deletions of old checkpoints among them; always to the weights of a whole run."""
    settings: dict[str, Any] = {"output__checkpoint_every": 1, "output__keep_checkpoints": 1, "output__log_every": 1}
    settings |= {**TRAJECTORIES, "output__resume": "latest", "optimizer__max_steps": 5}
    train(tiny_config(tmp_path, teacher, "whole", **settings))
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)  # a forked process has no other threads
    numbers, context = random.Random(0), multiprocessing.get_context("fork")
    kills, finished, moments = 0, 0, set[tuple[str, ...]]()
    while kills < 20:
        name = f"killed{finished}"
        config, before = tiny_config(tmp_path, teacher, name, **settings), names(tmp_path / name)
        process = context.Process(target=killed_at, args=(numbers.randint(1, 60), config))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        present = sorted(path.name for path in (tmp_path / name / "checkpoints").glob("*"))
        assert not before or max(names(tmp_path / name)) >= max(before)
        moments.add(tuple(name[:1] + name[-4:] for name in present))
        kills += process.exitcode != 0
        if process.exitcode == 0:
            assert_same(tmp_path / "whole", tmp_path / name)
            finished += 1
    assert any(".old" in part for moment in moments for part in moment)  # one was killed while it deleted
    train(tiny_config(tmp_path, teacher, name, **settings))
    assert_same(tmp_path / "whole", tmp_path / name)


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def resumed(teacher: Path, tmp_path: Path) -> tuple[TrainingRun, Path]:
    """A run that is about to go on, and its checkpoint."""
    settings: dict[str, Any] = {**TRAJECTORIES, "optimizer__ema_decay": 0.5, "optimizer__max_steps": 1}
    train(tiny_config(tmp_path, teacher, **settings))
    [checkpoint] = list_checkpoints(tmp_path / "run")
    AcceleratorState._reset_state(reset_partial_state=True)
    return TrainingRun(Session(tiny_config(tmp_path, teacher, **settings))), checkpoint


def damages(checkpoint: Path, contents: dict[str, bytes], files: list[str]) -> Iterator[Path]:
    """The checkpoint with each file replaced in turn by each of the contents."""
    for file in files:
        original = (checkpoint / file).read_bytes() if (checkpoint / file).exists() else None
        for content in contents.values():
            (checkpoint / file).write_bytes(content)
            yield checkpoint
        (checkpoint / file).unlink()
        if original is not None:
            (checkpoint / file).write_bytes(original)


def test_no_file_of_a_checkpoint_can_run_code_and_damage_is_told_in_one_line(
    resumed: tuple[TrainingRun, Path], tmp_path: Path
) -> None:
    run, checkpoint = resumed
    there = sorted(path.name for path in checkpoint.iterdir())
    pickles = ["optimizer.bin", "random_states_0.pkl", "scheduler.bin"]
    own = ["averages.safetensors", "data_0.json", "state.json", "student.safetensors", "trajectories_0.safetensors"]
    assert there == sorted(pickles + own)
    trace = tmp_path / "ran"
    torch.save({"state": Evil(trace)}, tmp_path / "evil.pt")
    evil = {"pickle": pickle.dumps(Evil(trace)), "archive": (tmp_path / "evil.pt").read_bytes()}
    garbage = {"empty": b"", "bytes": bytes(range(256)) * 9, "list": b"[1, 2]", "object": b'{"step": 1}'}
    garbage["deep"] = b"[" * 100_000
    torch.save({}, tmp_path / "empty.pt")
    garbage["empty archive"] = (tmp_path / "empty.pt").read_bytes()
    count = 0
    for contents, files in ((evil, [*pickles, *own, "custom_checkpoint_0.pkl"]), (garbage, pickles + own)):
        for damaged in damages(checkpoint, contents, files):
            with pytest.raises(ValueError, match="cannot be resumed") as caught:
                run.start(damaged)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(checkpoint))
            assert not trace.exists() and "weights_only" not in str(caught.value)
            count += 1
    assert count == 2 * 9 + 6 * 8
    run.start(checkpoint)
    assert run.step == 1


@pytest.mark.parametrize("file", ["state.json", "optimizer.bin", "metrics.jsonl"])
def test_the_command_says_in_one_line_what_is_damaged(
    file: str, run: Callable[..., tuple[int, str, str]], teacher: Path, tmp_path: Path
) -> None:
    train(tiny_config(tmp_path, teacher, optimizer__max_steps=1))
    AcceleratorState._reset_state(reset_partial_state=True)
    directory = tmp_path / "run"
    path = directory / file if file == "metrics.jsonl" else list_checkpoints(directory)[-1] / file
    path.write_bytes(b"[" * 100_000 + b"\n")
    status, _, err = run("distill", "--config", write_config(tmp_path, teacher), "--output.resume", "latest")
    assert status == 2 and err.splitlines()[-1].startswith("Error: ") and "Traceback" not in err
    assert path.name in err.splitlines()[-1] or path.parent.name in err.splitlines()[-1]


def test_only_the_last_checkpoints_stay_and_half_written_ones_are_never_taken(teacher: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"output__checkpoint_every": 1, "optimizer__max_steps": 4}
    train(tiny_config(tmp_path, teacher, **settings))
    folder = tmp_path / "run" / "checkpoints"
    assert names(tmp_path / "run") == [3, 4]
    (folder / ".step_00000005.tmp").mkdir()
    (folder / ".step_00000002.old").mkdir()
    (folder / "step_00000009").mkdir()  # which no run of ours leaves: a copy without its last file
    notes = Notes()
    settings |= {"output__resume": "latest", "optimizer__max_steps": 5}
    with pytest.raises(ValueError, match=r"step_00000009 is not a checkpoint, as it has no state.json"):
        train(tiny_config(tmp_path, teacher, **settings))
    (folder / "step_00000009").rmdir()
    train(tiny_config(tmp_path, teacher, **settings), [notes])
    assert notes.steps == [4, 5] and sorted(path.name for path in folder.iterdir()) == [
        "step_00000004",
        "step_00000005",
    ]


def test_a_run_that_goes_on_from_an_earlier_step_takes_the_place_of_the_other(teacher: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"output__checkpoint_every": 1, "output__keep_checkpoints": 5}
    run = tmp_path / "run"
    train(tiny_config(tmp_path, teacher, **settings))
    assert names(run) == [2, 3, 4, 5, 6]
    for step in (2, 3, 6):
        sheet_path(run, step).parent.mkdir(exist_ok=True)
        sheet_path(run, step).write_bytes(b"")
    (run / "validation.jsonl").write_text('{"step": 2}\n{"step": 6}\n{"half')
    settings |= {"output__resume": run / "checkpoints" / "step_00000002", "output__checkpoint_every": 2}
    settings["optimizer__max_steps"] = 4
    with pytest.raises(Broken):
        train(tiny_config(tmp_path, teacher, **settings), [Notes(3)])
    assert names(run) == [2, 3, 4, 5, 6]  # none goes before there is one in its place
    train(tiny_config(tmp_path, teacher, **settings))
    assert names(run) == [2, 4] and len(losses(run)) == 4
    assert [path.name for path in (run / "validation").iterdir()] == ["step_00000002.png"]
    assert (run / "validation.jsonl").read_text() == '{"step": 2}\n'
    append_line(run / "validation.jsonl", {"step": 0})
    trim(run, 0)  # a run that starts anew measures its first step again
    assert (run / "validation.jsonl").read_text() == ""


def test_what_cannot_be_gone_on_from_is_told(teacher: Path, tmp_path: Path) -> None:
    train(tiny_config(tmp_path, teacher, optimizer__max_steps=2))
    train(tiny_config(tmp_path, teacher, "other", optimizer__max_steps=1))
    elsewhere = tmp_path / "other" / "checkpoints" / "step_00000001"
    for settings, message in (
        ({}, "holds checkpoints up to step_00000002; pass output.resume=latest"),
        ({"output__resume": "latest", "optimizer__batch_size": 4}, "optimizer.batch_size is 2 there and 4 here"),
        ({"output__resume": "latest", "optimizer__max_steps": 1}, "max_steps=1 is below the 2 updates"),
        ({"output__resume": tmp_path}, "is not a checkpoint"),
        ({"output__resume": elsewhere}, "holds checkpoints up to step_00000002"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tiny_config(tmp_path, teacher, **settings))
    (list_checkpoints(tmp_path / "run")[-1] / SCALER_NAME).touch()  # as accelerate's own settings may have it
    with pytest.raises(ValueError, match="is of 1 processes with fp16, and this run has 1 with precision no"):
        train(tiny_config(tmp_path, teacher, output__resume="latest"))
    shutil.rmtree(tmp_path / "run")
    train(tiny_config(tmp_path, teacher, output__resume=elsewhere, optimizer__max_steps=2))
    assert names(tmp_path / "run") == [2]


def test_learning_rate_and_schedule_may_change_and_count_from_the_first_update(teacher: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"output__log_every": 1, "optimizer__max_steps": 2}
    train(tiny_config(tmp_path, teacher, **settings))
    settings |= {"optimizer__schedule": "cosine", "optimizer__warmup_steps": 4, "optimizer__learning_rate": 1e-2}
    train(tiny_config(tmp_path, teacher, **{**settings, "optimizer__max_steps": 8, "output__resume": "latest"}))
    falling = [0.5 * (1 + math.cos(math.pi * share)) for share in (0, 0.25, 0.5, 0.75)]
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert rates == pytest.approx([1e-3, 1e-3, *(1e-2 * factor for factor in (0.5, 0.75, *falling))])


@pytest.mark.parametrize(
    ("key", "old", "new", "student", "possible"),
    [
        ("optimizer.mixed_precision", "no", "bf16", "full", True),
        ("optimizer.mixed_precision", "fp16", "fp16", "full", True),
        ("optimizer.mixed_precision", "bf16", "fp16", "full", False),
        ("optimizer.mixed_precision", "fp16", None, "full", False),
        ("model.lora_rank", 4, 8, "full", True),  # of the LoRA that it is written as
        ("model.lora_rank", 4, 8, "lora", False),
        ("loss.kind", "l2", "huber", "full", True),
    ],
)
def test_settings_that_may_change(key: str, old: object, new: object, student: str, possible: bool) -> None:
    there, here = ({"model.student": student, key: value} for value in (old, new))
    if possible:
        require_same(there, here, Path("step_1"))
    else:
        with pytest.raises(
            ValueError, match=f"{key} is {json.dumps(old)} there and {json.dumps(new)} here; set these"
        ):
            require_same(there, here, Path("step_1"))


def test_a_checkpoint_from_before_there_was_an_order_is_of_order_1() -> None:
    old = {"model.student": "full", "teacher.steps_per_window": 10}
    with pytest.raises(ValueError, match=r"teacher.order is 1 there and 2 here"):
        require_same(old, {**old, "teacher.order": 2}, Path("old"))
    require_same({**old, "teacher.order": 2}, {**old, "teacher.order": 2}, Path("new"))
