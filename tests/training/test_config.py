"""Settings from files and the command line: typed, checked, and every mistake told at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from perflow_blocks.training.config_file import load_config, to_tree
from perflow_blocks.training.rules import ConfigError

from perflow_blocks.training.config import (
    DistillConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    TeacherConfig,
    WindowConfig,
)
from perflow_blocks.training.data.config import DataConfig

TREE = {
    "model": {"teacher": "owner/name", "student": "lora", "lora_targets": ["to_q", "to_k"]},
    "data": {"kind": "prompts", "path": "prompts.txt"},
    "windows": {"window_boundaries": [1, 0.6, 0.3, 0]},
    "teacher": {"starts": "trajectory"},
    "optimizer": {"learning_rate": 1e-4, "betas": [0.9, 0.99]},
    "output": {"directory": "runs/x"},
}
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
optimizer: {learning_rate: 1e-4, betas: [0.9, 0.99]}
output: {directory: runs/x}
"""


def write(folder: Path, text: str, name: str = "config.json") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def problems(path: Path, overrides: dict[str, str] | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


@pytest.mark.parametrize(("name", "text"), [("c.json", json.dumps(TREE)), ("c.toml", TOML), ("c.yaml", YAML)])
def test_three_formats_say_the_same(name: str, text: str, tmp_path: Path) -> None:
    assert load_config(write(tmp_path, text, name)) == WANTED


def test_a_configuration_survives_being_written(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, json.dumps(to_tree(WANTED)))) == WANTED


def test_overrides_are_read_by_the_type_of_their_field(tmp_path: Path) -> None:
    overrides = {
        "model.teacher": "123",
        "model.student": "full",
        "model.lora_targets": "null",
        "windows.window_boundaries": "[1, 0.5, 0]",
        "windows.zero_snr_start": "true",
        "optimizer.max_steps": "7",
        "optimizer.learning_rate": "2e-5",
        "output.resume": "latest",
    }
    config = load_config(write(tmp_path, json.dumps(TREE)), overrides)
    assert (config.model.teacher, config.model.student, config.model.lora_targets) == ("123", "full", None)
    assert config.windows.window_boundaries == (1.0, 0.5, 0.0) and config.windows.zero_snr_start is True
    assert config.optimizer.max_steps == 7 and config.optimizer.learning_rate == 2e-5
    assert config.output.resume == "latest" and config.data == WANTED.data


@pytest.mark.parametrize("text", [".5", "0.5", "5e-1", "+.5"])
def test_numbers_may_be_written_as_usual(text: str, tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(TREE))
    overrides = {"windows.start_share": text, "optimizer.betas": f"[0.9, {text}]", "model.teacher": text}
    config = load_config(path, overrides)
    assert config.windows.start_share == 0.5 and config.optimizer.betas == (0.9, 0.5)
    assert config.model.teacher == text
    assert "batch_size=.5 is wrong" in problems(path, {"optimizer.batch_size": ".5"})[0]


def test_numbers_that_yaml_takes_for_text_are_numbers_in_lists_too(tmp_path: Path) -> None:
    path = write(tmp_path, YAML.replace("[0.9, 0.99]", "[0.9, 1e-3]").replace("to_k]", "1e-3]"), "c.yaml")
    config = load_config(path)
    assert config.optimizer.betas == (0.9, 1e-3) and config.model.lora_targets == ("to_q", "1e-3")
    wrong = write(tmp_path, YAML.replace("[0.9, 0.99]", "[0.9, often]"), "d.yaml")
    assert problems(wrong) == ('optimizer.betas=[0.9, "often"] is wrong: input should be a valid number.',)


def test_a_value_of_the_wrong_type_is_told_once(tmp_path: Path) -> None:
    overrides = {"output.validation_prompts": "a red star", "output.validation_every": "2", "output.log_every": "0"}
    found = problems(write(tmp_path, json.dumps(TREE)), overrides)
    assert len(found) == 2
    assert "output.validation_prompts=a red star is wrong" in found[0] and "output.log_every=0" in found[1]


def test_the_home_directory_is_known_by_its_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for given, meant in (("~/run", str(tmp_path / "run")), ("./run", "./run")):
        output = OutputConfig(directory=given, resume=given)
        assert (output.directory, output.resume) == (meant, meant)
    assert OutputConfig(directory="x", resume="latest").resume == "latest"
    model = ModelConfig(teacher="~/teacher.safetensors", config="~/parts", init_student="~/unet")
    assert model.teacher == str(tmp_path / "teacher.safetensors")
    assert (model.config, model.init_student) == (str(tmp_path / "parts"), str(tmp_path / "unet"))
    assert ModelConfig(teacher="owner/name").teacher == "owner/name"


def test_every_field_can_be_overridden(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(TREE))
    for section, values in to_tree(WANTED).items():
        for name, value in values.items():
            text = value if isinstance(value, str) else json.dumps(value)
            assert load_config(path, {f"{section}.{name}": text}) == WANTED, f"{section}.{name}"


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    tree = {
        "model": {"student": "small", "lora_rank": 0, "speed": 1},
        "data": {"kind": "prompts"},
        "windows": {"window_boundaries": [1, 0.5, 0.7, 0], "start_share": 1.0},
        "teacher": {"steps_per_window": "ten", "guidance_scale": 0.5},
        "loss": {"weighting": "window", "huber_c": -1},
        "optimizer": {"max_steps": 1.5, "betas": [0.9], "ema_decay": True},
        "outputs": {},
    }
    found = problems(write(tmp_path, json.dumps(tree)), {"optimizer.batch_size": "many", "speed": "1"})
    for part in (
        "model.teacher is missing",
        "model.speed is unknown; model has teacher,",
        "model.student=\"small\" is wrong: input should be 'full' or 'lora'",
        "data.path is not set",
        "windows: window_boundaries=(1.0, 0.5, 0.7, 0.0)",
        "windows.start_share=1.0 leaves [0, 1)",
        'teacher.steps_per_window="ten" is wrong: input should be a valid integer',
        "teacher.guidance_scale=0.5 is below 1",
        "loss.weighting='window' and loss.window_weights=None do not go together",
        "loss.huber_c=-1.0 is no finite number above 0",
        "optimizer.max_steps=1.5 is wrong",
        "optimizer.betas=[0.9] is wrong",
        "optimizer.ema_decay=true is wrong",
        "optimizer.batch_size=many is wrong",
        "--speed is no setting; write --section.field",
        "outputs is no section; the sections are model, data, output,",
        "output.directory is missing",
    ):
        assert any(part in problem for problem in found), (part, found)
    assert len(found) == 17


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"windows.window_boundaries": "[0.9, 0.5, 0]"}, "window_boundaries="),
        ({"windows.num_time_windows": "0", "windows.window_boundaries": "null"}, "num_windows=0"),
        ({"loss.weighting": "window", "loss.window_weights": "[1, 2]"}, "has 2 weights for 3 windows; pass 3"),
        ({"loss.window_weights": "[1, 1, 1]"}, "pass weights with weighting='window'"),
        ({"output.num_inference_steps": "2"}, "output.num_inference_steps=2 is below 3"),
        ({"teacher.steps_per_window": "301"}, "exceeds a window's 300 timesteps"),
        ({"teacher.starts": "noised"}, "has no pictures to noise"),
        ({"teacher.starts": "noised", "teacher.on_policy_share": "0.5"}, "on_policy_share needs trajectories"),
        ({"windows.num_discrete_times": "2"}, "windows.num_discrete_times=2 is below 3"),
        ({"model.init_student": "x"}, "model.init_student is for full weights"),
        ({"optimizer.ema_decay": "1"}, "optimizer.ema_decay=1.0 leaves [0, 1)"),
        ({"loss.weighting": "window", "loss.window_weights": "[0, 0, 0]"}, "[0.0, 0.0, 0.0] train nothing; pass at"),
        ({"optimizer.schedule": "polynomial", "optimizer.learning_rate": "1e-7"}, "is not above 1e-07, where"),
        ({"optimizer.seed": "18446744073709551616"}, "is too large for a generator; pass one below 2**64"),
        ({"optimizer.learning_rate": "NaN"}, "optimizer.learning_rate=nan is no finite number above 0"),
    ],
)
def test_what_does_not_fit_together_is_refused(overrides: dict[str, str], message: str, tmp_path: Path) -> None:
    found = problems(write(tmp_path, json.dumps(TREE)), overrides)
    assert any(message in problem for problem in found), found


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.ini", "", "is no .toml, .yaml, .yml or .json file"),
        ("c.json", "{", "is no valid json file"),
        ("c.toml", "x = ", "is no valid toml file"),
        ("c.yaml", "a: [", "is no valid yaml file"),
        ("c.yaml", "", "holds values outside of sections"),
        ("c.json", '{"teacher": "x"}', "holds values outside of sections"),
    ],
)
def test_a_file_that_cannot_be_read_says_so(name: str, text: str, message: str, tmp_path: Path) -> None:
    assert message in problems(write(tmp_path, text, name))[0]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "cannot read" in problems(tmp_path / "none.toml")[0]


def test_sections_check_themselves_in_python() -> None:
    with pytest.raises(ConfigError) as caught:
        OptimizerConfig(learning_rate=0.0, max_steps=0)
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match="has 2 weights"):
        DistillConfig(
            model=ModelConfig(teacher="demo"),
            data=DataConfig(kind="demo", resolution=64, bucket_step=8),
            output=OutputConfig(directory="x"),
            loss=LossConfig(weighting="window", window_weights=(1, 2)),
        )
