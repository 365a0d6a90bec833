"""Commands that are killed at a file operation: every name holds the old or the new one whole, and no litter stays."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from perflow_blocks import export_workflow, extract_delta
from perflow_blocks.cli import main
from perflow_blocks.delta.extract import save_delta
from perflow_blocks.testing.tiny import tiny_sdxl_unet
from tests.conftest import make_pipeline, python

KILLS = 5
"""At random, of each operation, where there is no target yet and where there is one; besides those at `MOVES`."""

MOVES = {"ctypes.dlsym", "os.rename"}
"""When a target is replaced; the first is how ctypes exchanges two directories."""

CHANGES = MOVES | {"fcntl.flock", "os.chmod", "os.link", "os.mkdir", "os.remove", "os.rmdir"}
CHANGES |= {"shutil.copyfile", "shutil.rmtree"}


def perflow(*arguments: object) -> None:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as done:
        assert not done.code


def unet(seed: int) -> UNet2DConditionModel:
    """Of one level without attention, since most of the time goes into making its layers."""
    levels = {"block_out_channels": (16,), "attention_head_dim": (2,), "down_block_types": ("DownBlock2D",)}
    levels["up_block_types"] = ("UpBlock2D",)
    torch.manual_seed(seed)
    return UNet2DConditionModel.from_config({**tiny_sdxl_unet().config, **levels})


@cache
def pipeline(seed: int) -> Any:
    return make_pipeline(unet=unet(seed))


OPERATIONS: dict[str, Callable[[Path, int], object]] = {
    "merge": lambda out, seed: perflow("merge", "unet-0", f"delta-{seed}.safetensors", "-o", out / "unet", "--force"),
    "extract": lambda out, seed: perflow("extract", f"unet-{seed}", "unet-0", "-o", out / "d.safetensors", "--force"),
    "to-lora": lambda out, seed: perflow(
        "to-lora", f"delta-{seed}.safetensors", "--rank", 1, "-o", out / "lora.safetensors",
        "--residual", out / "rest.safetensors", "--force",
    ),
    "export": lambda out, seed: export_workflow(
        pipeline(seed), out / "flow", mode="thin", weights="include", overwrite=True
    ),
    "save": lambda out, seed: pipeline(seed).save_pretrained(out / "saved"),
}  # fmt: skip
"""What writes below a directory, from inputs in the working directory that a seed chooses."""


def in_child(operation: Callable[[], object], kill_at: int | None = None) -> list[str]:
    """Runs it in a copy of this process, which dies before its change number `kill_at`; else gives all changes."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        changes: list[str] = []

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            opens = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR) and "work" in str(arguments[0])
            if opens or event in CHANGES:
                if len(changes) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                changes.append(event)

        status = 1
        try:
            sys.addaudithook(hook)
            operation()
            os.write(writer, " ".join(changes).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended == (0 if kill_at is None else -signal.SIGKILL)
    return text.split()


def contents(place: Path) -> dict[str, Any]:
    """What stands under each name of a directory: bytes, or for a directory again its contents."""
    return {path.name: contents(path) if path.is_dir() else path.read_bytes() for path in place.iterdir()}


def faults_of(name: str) -> list[str]:
    """What is wrong after kills of an operation that replaces nothing, and of one that replaces an older result."""
    faults, work, older, chance = [], Path("work"), Path("older") / name, random.Random(name)

    def start_from(state: Path | None) -> dict[str, Any]:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(state, work) if state else work.mkdir()
        return contents(work)

    start_from(None)
    OPERATIONS[name](work, 1)
    if name == "save":
        (work / "saved" / "unet" / "notes.txt").write_text("of the user")
    shutil.copytree(work, older)
    for state in (None, older):
        before = start_from(state)
        changes = in_child(lambda: OPERATIONS[name](work, 2))
        after = contents(work)
        moves = {number for number, change in enumerate(changes) if change in MOVES}
        for kill_at in moves.union(chance.sample(range(len(changes)), KILLS)):
            start_from(state)
            in_child(lambda: OPERATIONS[name](work, 2), kill_at)
            found = contents(work)
            OPERATIONS[name](work, 2)
            case = f"{name} onto {'an older one' if state else 'nothing'}, killed at {changes[kill_at]} ({kill_at})"
            faults += [
                f"{case}: damaged {key}" for key in after if found.get(key) not in (before.get(key), after[key])
            ]
            faults += [f"{case}: the next run leaves {sorted(contents(work))}"] * (contents(work) != after)
    return faults


def write_report() -> None:
    """Kills all operations, in the working directory."""
    torch.set_num_threads(1)  # a forked process has no others
    for seed in range(3):
        unet(seed).save_pretrained(f"unet-{seed}")
        if seed:
            save_delta(extract_delta(unet(seed), unet(0)), f"delta-{seed}.safetensors")
            pipeline(seed)
    gc.freeze()  # copies of this process then do not look through all that they share
    Path("report.json").write_text(json.dumps({name: faults_of(name) for name in OPERATIONS}))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("kills")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "HF_HUB_OFFLINE": "1"}
    code = "from tests.test_kills import write_report; write_report()"
    python("-c", code, environment=environment, cwd=folder)
    return json.loads((folder / "report.json").read_text())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_kill_leaves_the_old_or_the_new_one_and_no_litter(name: str, report: dict[str, list[str]]) -> None:
    assert report[name] == []
