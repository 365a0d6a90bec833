"""`perflow demo`, `compare` and `evaluate` on the embedded model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from perflow_blocks.cli import demo
from perflow_blocks.evaluation import comparison

Run = Callable[..., tuple[int, str, str]]


def test_the_demo_writes_twelve_pictures_and_a_sheet(run: Run, tmp_path: Path) -> None:
    status, out, _ = run("demo", "--out", tmp_path)
    assert status == 0
    pictures = sorted(tmp_path.glob("*-seed*.png"))
    assert len(pictures) == len(demo.PROMPTS) == 12
    assert out.split()[-1] == str(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 4 * 192


def test_compare_draws_a_sheet_of_four_columns(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "compare.png"
    status, out, _ = run("compare", "a red star", "--num-images", 1, "--out", path)
    assert status == 0 and out.strip() == str(path)
    with Image.open(path) as sheet:
        assert 4 * 192 < sheet.width < 5 * 220


def test_evaluate_writes_its_table(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small_set(count: int) -> comparison.EvaluationSet:
        data = make_evaluation_set(count)
        return replace(data, reference=data.reference[:32])  # each row's distance is measured to all of them

    make_evaluation_set = comparison.make_evaluation_set
    monkeypatch.setattr(comparison, "make_evaluation_set", small_set)
    path = tmp_path / "table.md"
    status, out, _ = run("evaluate", "--prompts", 4, "--quick", "--out", path)
    assert status == 0
    table = path.read_text()
    assert table.strip() == out.strip()
    assert table.count("| student, PeRFlow |") == 3
    assert table.count("| teacher, DDIM |") == 5
    assert "| teacher, DDIM | 50 |" not in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compare", " "), "empty"),
        (("compare", "a star", "--steps", "0"), "steps=0"),
        (("compare", "a star", "--guidance", "nan"), "guidance_scale=nan"),
        (("compare", "a star", "--model", "someone/model"), "--delta"),
        (("compare", "a star", "--delta", "nowhere.safetensors"), "nowhere.safetensors"),
        (("evaluate", "--prompts", "1"), "prompts=1"),
    ],
)
def test_a_mistake_is_one_line(run: Run, arguments: tuple[str, ...], message: str) -> None:
    status, out, err = run(*arguments)
    assert status == 2 and out == "" and err.count("\n") == 1 and message in err


@pytest.mark.parametrize("command", [("compare", "a star"), ("evaluate",), ("demo",)])
def test_an_unusable_path_is_found_first(run: Run, tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "file").write_text("kept")
    status, _, err = run(*command, "--out", tmp_path / "file" / "below")
    assert status == 2 and err.count("\n") == 1 and (tmp_path / "file").read_text() == "kept"
