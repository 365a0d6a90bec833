"""The benchmark of the solvers writes its sections side by side, and pairs what belongs together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.solvers import main, seconds_per_update


def test_parts_write_their_sections_and_leave_the_others(tmp_path: Path) -> None:
    out = tmp_path / "solvers.md"
    out.write_text("# Solvers of second order, and theta\n\n## Student\n\nkept\n\n## Teacher\n\nold\n")
    main(["teacher", "--prompts", "1", "--out", str(out)])
    text = out.read_text()
    assert "## Student\n\nkept\n" in text and "old" not in text and text.count("## Teacher") == 1
    rows = [line.split(" | ") for line in text.splitlines() if line[:3] in ("| 5", "| 1")]
    assert all(float(row[2].strip(" |")) < float(row[1]) for row in rows) and len(rows) == 2


def test_the_speed_of_a_run_is_the_median_of_its_readings(tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text('```json\n{"optimizer": {"batch_size": 12}}\n```')
    lines = [json.dumps({"samples_per_second": speed}) for speed in (1.0, 4.0, 6.0, 3.0)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert seconds_per_update(tmp_path) == 3.0


def test_the_comparison_of_trainings_needs_two_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["training"])
    assert "--runs goes with training" in capsys.readouterr().err
