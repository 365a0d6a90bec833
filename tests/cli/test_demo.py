"""`perflow demo`, `compare` and `evaluate` on the embedded model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from perflow_blocks.cli.demo import PROMPTS
from perflow_blocks.demo.judge import make_demo_set

Run = Callable[..., tuple[int, str, str]]


def test_the_demo_writes_twelve_pictures_and_a_sheet(run: Run, tmp_path: Path) -> None:
    status, out, _ = run("demo", "--out", tmp_path)
    assert status == 0
    pictures = sorted(tmp_path.glob("*-seed*.png"))
    assert len(pictures) == len(PROMPTS) == 12
    assert out.split()[-1] == str(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 4 * 384


@pytest.mark.parametrize(("name", "kind"), [("compare.png", "PNG"), ("compare.jpg", "JPEG"), ("a.webp", "WEBP")])
def test_compare_draws_a_sheet_of_four_columns(run: Run, tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / "deep" / name
    status, out, _ = run("compare", "a red star", "--num-images", 1, "--out", path)
    assert status == 0 and out.strip() == str(path)
    with Image.open(path) as sheet:
        assert sheet.format == kind and 4 * 384 < sheet.width < 5 * 410


def test_evaluate_judges_the_embedded_model(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perflow_blocks.demo.judge.make_demo_set", partial(make_demo_set, references=32))
    arguments = ("--count", 4, "--teacher", "ddim:3", "--samplers", "dpm:2,ddim:2@1,perflow:4", "--out", tmp_path)
    status, out, _ = run("evaluate", "--demo", *arguments)
    assert status == 0 and (tmp_path / "report.md").read_text() == out
    assert "| real renders | - | - | - | 100.0 ± 0.0 |" in out and "| Frechet | ms per image |" in out
    for start in ("teacher, DDIM | 3 | 3 | 6", "teacher, DPM-Solver++ | 2 | 3 | 4", "student, PeRFlow | 4 | 1 | 4"):
        assert f"| {start} |" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compare", "a star", "--steps", "2"), "below the model's 4 time windows"),
        (("compare", "a star", "--model", "someone/model"), "--delta"),
        (("compare", "a star", "--delta", "nowhere.safetensors"), "nowhere.safetensors"),
    ],
)
def test_a_mistake_is_one_line(run: Run, arguments: tuple[str, ...], message: str) -> None:
    status, out, err = run(*arguments)
    assert status == 2 and out == "" and err.count("\n") == 1 and message in err


@pytest.mark.parametrize("command", [("generate", "a star"), ("compare", "a star"), ("evaluate", "--demo"), ("demo",)])
def test_an_unusable_path_is_found_first(run: Run, tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "file").write_text("kept")
    status, _, err = run(*command, "--out", tmp_path / "file" / "below")
    assert (
        status == 2
        and "cannot write into" in err
        and err.count("\n") == 1
        and (tmp_path / "file").read_text() == "kept"
    )
