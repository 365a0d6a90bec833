"""Settings from files and the command line: typed, checked, and every mistake told at once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from perflow_blocks.training.config import (
    ConfigError,
    DataConfig,
    DistillConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    Section,
    TeacherConfig,
    WindowConfig,
    load_config,
)

WANTED = DistillConfig(
    model=ModelConfig(teacher="owner/name", student="lora", lora_targets=("to_q", "to_k")),
    data=DataConfig(kind="prompts", path="prompts.txt"),
    windows=WindowConfig(window_boundaries=(1.0, 0.6, 0.3, 0.0)),
    teacher=TeacherConfig(starts="trajectory"),
    optimizer=OptimizerConfig(learning_rate=1e-4, betas=(0.9, 0.99)),
    output=OutputConfig(directory="runs/x"),
)
TOML = """
[model]
teacher = "owner/name"
student = "lora"
lora_targets = ["to_q", "to_k"]
[data]
kind = "prompts"
path = "prompts.txt"
[windows]
window_boundaries = [1, 0.6, 0.3, 0]
[teacher]
starts = "trajectory"
[optimizer]
learning_rate = 1e-4
betas = [0.9, 0.99]
[output]
directory = "runs/x"
"""
YAML = """
model: {teacher: owner/name, student: lora, lora_targets: [to_q, to_k]}
data: {kind: prompts, path: prompts.txt}
windows: {window_boundaries: [1, 0.6, 0.3, 0]}
teacher: {starts: trajectory}
optimizer: {learning_rate: 1e-4, betas: [0.9, 99e-2]}
output: {directory: runs/x}
"""


def write(folder: Path, text: str = TOML, name: str = "config.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def problems(path: Path, overrides: dict[str, str] | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert all(problem in str(caught.value) and "\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


def test_three_formats_say_the_same(tmp_path: Path) -> None:
    for name, text in (("c.toml", TOML), ("c.yaml", YAML), ("c.json", json.dumps(WANTED.model_dump(mode="json")))):
        assert load_config(write(tmp_path, text, name)) == WANTED


def test_overrides_are_read_by_the_type_of_their_field(tmp_path: Path) -> None:
    overrides = {
        "model.teacher": "123",
        "model.student": "full",
        "model.lora_targets": "null",
        "windows.window_boundaries": "[1, .5, 0]",
        "windows.zero_snr_start": "true",
        "optimizer.max_steps": "7",
        "optimizer.learning_rate": "2e-5",
        "output.resume": "latest",
        "output.validation_prompts": '["a star, red", a ring]',
        "data.trigger": "[V] toy",
    }
    config = load_config(write(tmp_path), overrides)
    assert (config.model.teacher, config.model.student, config.model.lora_targets) == ("123", "full", None)
    assert config.windows.window_boundaries == (1.0, 0.5, 0.0) and config.windows.zero_snr_start is True
    assert config.optimizer.max_steps == 7 and config.optimizer.learning_rate == 2e-5
    assert config.output.resume == "latest" and config.output.validation_prompts == ("a star, red", "a ring")
    assert config.data.trigger == "[V] toy" and config.data.path == "prompts.txt"


def test_every_field_can_be_overridden_and_is_described(tmp_path: Path) -> None:
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in WANTED.flat().items()}
    assert load_config(write(tmp_path), texts) == WANTED
    for section in DistillConfig.model_fields.values():
        assert isinstance(section.annotation, type) and issubclass(section.annotation, Section)
        assert all(field.description for field in section.annotation.model_fields.values())


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        WANTED.data.resolution = 512


def test_the_home_directory_is_known_by_its_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert OutputConfig(directory="~/run", resume="latest").directory == str(tmp_path / "run")
    assert DataConfig(path="~/a.txt").path == str(tmp_path / "a.txt")


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    text = """
        [model]
        student = "small"
        lora_rank = 0
        speed = 1
        [data]
        kind = "prompts"
        [windows]
        window_boundaries = [1, 0.5, 0.7, 0]
        [teacher]
        steps_per_windo = 10
        guidance_scale = 0.5
        [optimizer]
        max_steps = 1.5
        betas = [0.9, 1.0]
        learning_rate = nan
        [outputs]
    """
    overrides = {"optimizer.batch_size": "many", "speed": "1", "output.validation_prompts": "a red\nstar"}
    assert sorted(problems(write(tmp_path, text), overrides)) == sorted(
        [
            "--speed: not a setting; write --section.field VALUE.",
            "model.teacher: missing; set it.",
            "model.student: input should be 'full' or 'lora' (given small).",
            "model.lora_rank: input should be greater than 0 (given 0).",
            "model.speed: unknown; leave it out.",
            "data.path: missing for data.kind=prompts; say where the data is.",
            "windows: window_boundaries=(1.0, 0.5, 0.7, 0.0) must be strictly descending, by at least one of 1000 "
            "timesteps.",
            "teacher.steps_per_windo: unknown; did you mean steps_per_window?",
            "teacher.guidance_scale: input should be greater than or equal to 1 (given 0.5).",
            "optimizer.max_steps: input should be a valid integer, got a number with a fractional part (given 1.5).",
            "optimizer.betas.1: input should be less than 1 (given 1.0).",
            "optimizer.learning_rate: input should be a finite number (given nan).",
            "optimizer.batch_size: input should be a valid integer, unable to parse string as an integer "
            "(given many).",
            "outputs: unknown; did you mean output?",
            "output.directory: missing; set it.",
            "output.validation_prompts: input should be a valid list (given a red star).",
        ]
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"windows.window_boundaries": "[0.9, 0.5, 0]"}, "windows: window_boundaries="),
        ({"windows.num_discrete_times": "2"}, "windows.num_discrete_times: 2 is below the 3 windows"),
        ({"output.num_inference_steps": "2"}, "output.num_inference_steps: 2 is below the 3 windows"),
        ({"output.validation_every": "5"}, "output.validation_every: needs output.validation_prompts"),
        ({"teacher.steps_per_window": "301"}, "teacher.steps_per_window: must be at most 300"),
        ({"teacher.starts": "noised"}, "data.kind: prompts have no images to noise"),
        (
            {"teacher.starts": "noised", "teacher.on_policy_share": "0.5"},
            "on_policy_share: needs trajectories",
        ),
        ({"model.frozen": "[conv_in]"}, "model.frozen: for full weights"),
        ({"optimizer.seed": "18446744073709551616"}, "optimizer.seed: input should be less than 184467440737"),
        ({"data.kind": "demo", "data.path": "null"}, "data.resolution: 1024 is too large for the demo's images"),
        ({"data.streaming": "true"}, "data.streaming: goes with data.kind=datasets, not prompts"),
        ({"data.kind": "folder", "data.resolution": "1000"}, "must be a multiple of 64 (given 1000); pass 960"),
        ({"data.resolution": "1001"}, "must be a multiple of 8 (given 1001); pass 1000"),
        ({"data.num_workers": "1000000000000"}, "data.num_workers: input should be less than or equal to 256"),
    ],
)
def test_what_does_not_fit_together_is_refused(overrides: dict[str, str], message: str, tmp_path: Path) -> None:
    assert any(message in problem for problem in problems(write(tmp_path), overrides))


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.ini", "", "is not a .toml, .json, .yaml, .yml file"),
        ("c.json", "{", "cannot be read as json"),
        ("c.toml", "x = ", "cannot be read as toml"),
        ("c.yaml", "a: [", "cannot be read as yaml"),
        ("c.yaml", BOMB, "cannot be read as yaml (aliases such as *name are not supported)"),
        ("c.yaml", "a: " + "[" * 5000, "cannot be read as yaml (maximum recursion depth exceeded"),
        ("c.json", '{"a":' * 200_000, "cannot be read as json (maximum recursion depth exceeded"),
        ("c.yaml", "", "has no sections"),
        ("c.json", '{"model": 3}', "model: must be a table of settings."),
        ("none/c.toml", None, "is not a file"),
    ],
)
def test_a_file_that_cannot_be_read_says_so(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    assert re.search(re.escape(message), problems(path)[0])
