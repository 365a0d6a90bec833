"""`perflow distill` on the embedded model: students learn, alone and in two processes, and survive being killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from perflow_blocks import merge_delta
from perflow_blocks.cli.distill import parse_overrides
from perflow_blocks.delta.files import read_recipe
from perflow_blocks.demo import weights_directory
from perflow_blocks.training.config import ModelConfig, TeacherConfig, WindowConfig
from perflow_blocks.training.teacher import PromptEncoder, Teacher, WindowGeometry, open_teacher
from perflow_blocks.training.validation import Inputs, endpoint_errors, ratios, teacher_edges
from tests.training.conftest import losses

Run = Callable[..., tuple[int, str, str]]

DEMO = """
[model]
teacher = "demo"
[data]
kind = "demo"
resolution = 64
bucket_step = 8
max_samples = 200
[windows]
num_time_windows = 2
start_share = 0.5
[teacher]
steps_per_window = 2
starts = "trajectory"
cfg_mode = "fixed"
guidance_scale = 3.0
solve_every = 4
[loss]
weighting = "endpoint"
caption_dropout = 0.0
[optimizer]
learning_rate = 1e-4
schedule = "cosine"
warmup_steps = 0
max_steps = 32
batch_size = 4
ema_decay = 0.8
[output]
directory = "{directory}"
checkpoint_every = 32
log_every = 8
"""
PROMPTS = ["a red star", "a blue circle on a white background", "a ring", "a green heart on a black background"]


@pytest.fixture(scope="module")
def judge() -> Callable[[UNet2DConditionModel], float]:
    """The relative error of a UNet at the windows' ends, on fixed prompts and noise that no training saw."""
    source = open_teacher(ModelConfig(teacher="demo"))
    geometry = WindowGeometry(WindowConfig(num_time_windows=2), source.scheduler_config)
    torch.manual_seed(99)
    encoder = PromptEncoder(source.load_text_pipeline(torch.float32), torch.device("cpu"), 8)
    config = TeacherConfig(steps_per_window=2, cfg_mode="fixed", guidance_scale=3.0)
    teacher = Teacher(source.load_unet(), source.scheduler(), encoder, geometry, config)
    inputs = [
        Inputs(prompt, encoder.conditioning([prompt], [((64, 64), (0, 0), (64, 64))]), torch.randn(1, 4, 16, 16))
        for prompt in PROMPTS
    ]
    edges = [teacher_edges(teacher, each) for each in inputs]

    @torch.no_grad()
    def error(unet: UNet2DConditionModel) -> float:
        return sum(ratios([endpoint_errors(unet, geometry, *pair) for pair in zip(inputs, edges, strict=True)]))

    return error


def base() -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(weights_directory(), subfolder="unet", dtype=torch.float32)


def write(folder: Path, name: str) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(DEMO.format(directory=folder / name))
    return path


def start(*arguments: object, processes: int = 1) -> subprocess.Popen[str]:
    """`perflow distill` in processes of its own, on the CPU."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), "-m", "perflow_blocks.cli", "distill"]
    package = str(Path(__file__).parent.parent.parent)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": package, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def kill(process: subprocess.Popen[str]) -> None:
    """Without a warning, the launcher and all that it started."""
    processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in processes:
        each.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def test_full_weights_learn_in_one_process(
    run: Run, tmp_path: Path, judge: Callable[[UNet2DConditionModel], float]
) -> None:
    status, out, err = run("distill", "--config", write(tmp_path, "full"))
    assert status == 0, err
    lines = out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step")] == ["8/32", "16/32", "24/32", "32/32"]
    files = ["student", "delta.safetensors", "scheduler", "lora.safetensors", "lora_kohya.safetensors"]
    files += ["lora_residual.safetensors", "workflow", "report.md"]
    assert lines[-8:] == [str(tmp_path / "full" / name) for name in files]
    assert all((tmp_path / "full" / name).exists() for name in files)
    student = UNet2DConditionModel.from_pretrained(tmp_path / "full" / "student")
    assert judge(student) < 0.9 * judge(base())
    merged = base()
    merge_delta(merged, tmp_path / "full" / "delta.safetensors")
    assert judge(merged) == pytest.approx(judge(student), rel=0.02)
    recipe = read_recipe(tmp_path / "full" / "delta.safetensors")
    assert (recipe.num_time_windows, recipe.num_inference_steps, recipe.guidance_scale) == (2, 2, 1.0)
    assert recipe.base_model == "demo"


STEPS = 16
LORA: tuple[object, ...] = ("--model.student", "lora", "--model.lora_rank=8", "--optimizer.learning_rate", "5e-4")
LORA += ("--optimizer.max_steps", STEPS, "--output.checkpoint_every", STEPS // 2, "--output.log_every", 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that two processes trained without being killed."""
    folder = tmp_path_factory.mktemp("whole")
    out = finished(start("--config", write(folder, "whole"), *LORA, processes=2))
    assert out.count(f"step {STEPS}/{STEPS}") == 1
    return folder / "whole"


def test_a_lora_learns_in_two_processes_that_see_different_rows(
    whole: Path, judge: Callable[[UNet2DConditionModel], float]
) -> None:
    merged = base()
    merge_delta(merged, whole / "delta.safetensors")
    assert judge(merged) < 0.98 * judge(base())
    last = whole / "checkpoints" / f"step_{STEPS:08d}"
    buffers = [(last / f"trajectories_{index}.safetensors").read_bytes() for index in range(2)]
    rows = [json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["rows"] for data in buffers]
    seen = [{(prompt, tuple(map(tuple, sizes))) for prompt, _, sizes in json.loads(row)} for row in rows]
    assert len(seen[0]) > 8 and len(seen[0] & seen[1]) < len(seen[0]) / 2


def test_two_processes_that_are_killed_go_on_to_the_same_student(whole: Path, tmp_path: Path) -> None:
    config, killed = write(tmp_path, "killed"), tmp_path / "killed"
    process = start("--config", config, *LORA, processes=2)
    deadline = time.monotonic() + 200
    while not list(killed.glob("checkpoints/step_*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    kill(process)
    assert not (killed / "delta.safetensors").exists()
    assert STEPS // 2 <= len(losses(killed)) < STEPS
    out = finished(start("--config", config, *LORA, "--output.resume", "latest", processes=2))
    assert out.count(f"going on after step {STEPS // 2}") == 1
    assert losses(killed) == losses(whole) and len(losses(whole)) == STEPS
    one, other = (load_file(folder / "delta.safetensors") for folder in (whole, killed))
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_mistakes_are_all_told_and_nothing_is_written(run: Run, tmp_path: Path) -> None:
    config = write(tmp_path, "none")
    status, _, err = run("distill", "--config", config, "--optimizer.steps", 3, "--model.lora_rank", 0)
    assert status == 2 and "- optimizer.steps: unknown; did you mean max_steps?" in err
    assert err.splitlines()[-3:-1] == [
        "Error: 2 settings are wrong:",
        "- model.lora_rank: input should be greater than 0 (given 0).",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["none.toml"]
    status, _, err = run("distill", "--config", config, "max_steps", 3)
    assert status == 2 and "max_steps is not a setting" in err
    status, _, err = run("distill")
    assert status == 2 and "--config" in err


def test_settings_of_the_command_line() -> None:
    got = parse_overrides(["--a.b", "-1", "--c.d=x=y", "--e.f", "--g.h"])
    assert got == {"a.b": "-1", "c.d": "x=y", "e.f": "--g.h"}
    with pytest.raises(ValueError, match=r"--a\.b has no value"):
        parse_overrides(["--a.b"])
    for wrong in ("a.b", "--ab", "-a.b"):
        with pytest.raises(ValueError, match="is not a setting"):
            parse_overrides([wrong, "1"])
