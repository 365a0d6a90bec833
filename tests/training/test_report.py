"""The report says what the run wrote down, and draws it without touching anyone's matplotlib."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perflow_blocks.demo import judge
from perflow_blocks.training import distillation, report
from perflow_blocks.training.config import DistillConfig
from perflow_blocks.training.distillation import distill
from perflow_blocks.training.layout import sheet_path
from perflow_blocks.training.plots import save_plot
from perflow_blocks.training.report import write_report
from perflow_blocks.training.result import TrainingResult
from tests.training.conftest import tiny_config

PLOTS = {"loss", "learning_rate", "speed", "straightness", "endpoint_error"}


def metrics(step: int, loss: float, windows: list[float | None]) -> dict[str, Any]:
    return {
        "step": step,
        "losses": [loss, loss],
        "window_losses": windows,
        "learning_rate": 1e-4,
        "samples_per_second": 10.0 * step,
    }


@pytest.fixture
def finished(tmp_path: Path) -> tuple[DistillConfig, TrainingResult]:
    """A training of three readings and six sheets, as it would have written them."""
    config = tiny_config(tmp_path, "demo")
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [metrics(2, 0.8, [1.0, None]), metrics(4, 0.4, [0.5, 0.25]), metrics(6, 0.2, [0.3, 0.125])]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"half')
    seen = [
        {"step": step, "student": [0.1 / step, 0.0], "teacher": [0.4, 0.3], "endpoint_error": [1.0 / step, 0.5]}
        for step in (1, 6)
    ]
    (folder / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in seen))
    for step in range(6):
        path = sheet_path(folder, step)
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    result = TrainingResult(
        directory=folder,
        steps=6,
        delta=folder / "delta.safetensors",
        scheduler=folder / "scheduler",
        student=folder / "student",
        lora=None,
        metrics=folder / "metrics.jsonl",
    )
    return config, result


def test_it_holds_what_was_written_down(finished: tuple[DistillConfig, TrainingResult]) -> None:
    path = write_report(*finished, evaluation="| sampler | accuracy |\n")
    text = path.read_text()
    assert path.name == "report.md" and text.startswith("# Distillation of demo\n")
    assert "first third of the updates: 0.8; of the last third: 0.2 (0.25 times the first)" in text
    assert "| 1 | 1 | 0.3 |" in text and "| 2 | 0.25 | 0.125 |" in text  # windows; a reading may lack one
    assert "| samples a second | 40 (median) |" in text
    assert "| 1 | 0.4 | 0.1 | 0.0167 | 1 | 0.167 |" in text and "| 2 | 0.3 | 0 | 0 | 0.5 | 0.5 |" in text
    assert "## Evaluation\n\n| sampler | accuracy |" in text
    assert "`delta.safetensors`" in text and '"max_steps": 6' in text
    shown = [line for line in text.splitlines() if "](validation/" in line]
    assert len(shown) == 4 and "step_00000000" in shown[0] and "step_00000005" in shown[-1]
    links = {part.split(")")[0] for part in text.split("](")[1:]}
    assert all((path.parent / link).is_file() for link in links)
    assert {Path(link).stem for link in links if link.startswith("plots/")} == PLOTS
    assert not list(path.parent.glob(".*")) and not list((path.parent / "plots").glob(".*"))


def test_without_matplotlib_there_are_the_figures_alone(
    finished: tuple[DistillConfig, TrainingResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    text = write_report(*finished).read_text()
    assert "plots/" not in text and "of the last third: 0.2" in text and "| 1 | 0.4 |" in text
    assert "## Evaluation" not in text and not (finished[1].directory / "plots").exists()


def test_a_report_is_written_even_where_an_output_fails(
    finished: tuple[DistillConfig, TrainingResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, result = finished

    def fail(*arguments: object) -> None:
        raise ValueError("the disk is full")

    monkeypatch.setattr(distillation, "train", lambda *arguments: result)
    monkeypatch.setattr(distillation, "write_outputs", fail)
    with pytest.raises(ValueError, match="the disk is full"):
        distill(config)
    assert "of the last third: 0.2" in (result.directory / "report.md").read_text()


def test_losses_of_zero_have_no_ratio(finished: tuple[DistillConfig, TrainingResult]) -> None:
    config, result = finished
    result.metrics.write_text(json.dumps(metrics(2, 0.0, [0.0, None])) + "\n")
    assert "first third of the updates: 0; of the last third: 0.\n" in write_report(config, result).read_text()


def test_a_training_without_validation_has_no_such_parts(finished: tuple[DistillConfig, TrainingResult]) -> None:
    config, result = finished
    (result.directory / "validation.jsonl").unlink()
    empty = replace(result, metrics=result.directory / "none.jsonl")
    text = write_report(config, empty).read_text()
    assert "## Straightness" not in text and "No losses were written down." in text


def test_curves_are_drawn(tmp_path: Path) -> None:
    """Pixels of the curves' colours are there; of one more curve, more of them."""
    counts = []
    for curves in (
        {"a": ([0, 1, 2], [1.0, None, 4.0])},
        {"a": ([0, 1, 2], [1.0, 2.0, 4.0]), "b": ([0, 2], [0.0, 3.0])},
    ):
        save_plot(tmp_path / "plot.png", curves, label="loss", logarithmic=True, dashed=frozenset({"b"}))
        with Image.open(tmp_path / "plot.png") as opened:
            saturation = np.asarray(opened.convert("HSV"))[..., 1]
        counts.append(int((saturation > 100).sum()))
    assert 0 < counts[0] < counts[1]


def test_plots_leave_matplotlib_as_it_is(tmp_path: Path) -> None:
    code = (
        "import sys, matplotlib\n"
        "chosen = lambda: dict.__getitem__(matplotlib.rcParams, 'backend')\n"  # reading it otherwise chooses one
        "before = chosen()\n"
        "from pathlib import Path\n"
        "from perflow_blocks.training.plots import save_plot\n"
        f"save_plot(Path({str(tmp_path / 'plot.png')!r}), {{'a': ([0, 1], [1.0, 2.0])}}, label='x')\n"
        "assert chosen() is before\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_whole_distillation_of_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything at once, as `perflow distill` does it; the table is of the student that was trained."""
    given: list[Any] = []

    def evaluate(*arguments: Any) -> str:
        given.append(arguments)
        return "| the table |"

    monkeypatch.setattr(judge, "evaluate_student", evaluate)
    settings: dict[str, Any] = {"data__resolution": 64, "optimizer__max_steps": 2, "output__evaluation_prompts": 2}
    settings |= {"model__lora_rank": 2, "teacher__cfg_mode": "fixed", "teacher__guidance_scale": 3.0}
    config = tiny_config(tmp_path, "demo", optimizer__learning_rate=0.02, optimizer__ema_decay=0, **settings)
    done = distill(config)
    assert done.outputs is not None and done.report is not None and done.outputs.workflow is not None
    text = done.report.read_text()
    assert "## Evaluation\n\n| the table |" in text
    for name in ("student", "lora_kohya.safetensors", "lora_residual.safetensors", "workflow"):
        assert f"`{name}`" in text and (done.report.parent / name).exists()
    ((pipe, *others),) = given
    assert others == [done.result.delta, 2, 3.0] and pipe.unet.config.cross_attention_dim == 128


def test_a_table_is_only_made_where_it_is_asked_for(finished: tuple[DistillConfig, TrainingResult]) -> None:
    assert distillation._evaluate(*finished) is None
