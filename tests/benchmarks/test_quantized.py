"""The benchmark of quantized UNets draws with each of them, and counts the bytes that are held."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("bitsandbytes")

from benchmarks import quantized


def test_a_row_for_each_order_with_the_size_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = (quantized.EXACT, "torchao int8", "bitsandbytes nf4")
    monkeypatch.setattr(quantized, "METHODS", {name: quantized.METHODS[name] for name in kept})
    quantized.main(["--prompts", "2", "--rounds", "2", "--out", str(tmp_path / "quantized.md")])
    lines = (tmp_path / "quantized.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")][2:]
    assert [tuple(row[:2]) for row in rows] == [(name, how) for name in kept for how in ("merged", "LoRA")]
    exact, int8, nf4 = (float(row[5]) for row in rows[::2])
    linear, others = (exact - int8) * 4 / 3, exact - (exact - int8) * 4 / 3
    assert exact == pytest.approx(25.0, abs=0.2)  # 6.3 million numbers
    assert nf4 == pytest.approx(others + linear / 8, rel=0.03)
