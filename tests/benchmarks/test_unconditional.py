"""The recipe of unconditional models at a tiny size: from images to a table."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from benchmarks import unconditional
from perflow_blocks.testing import tiny_image


@pytest.mark.usefixtures("fresh_accelerate")
def test_images_become_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text(unconditional.SETTINGS.read_text().replace("batch_size = 32", "batch_size = 2"))
    for name, value in {"SETTINGS": settings, "BATCH": 4, "MANY": 9, "_ROUNDS": 2}.items():
        monkeypatch.setattr(unconditional, name, value)
    unconditional.main(tmp_path / "out", size=8, minutes=0.02, images=40, count=4)
    title, _, _, _, header, _, *rows = (tmp_path / "out" / "report.md").read_text().splitlines()
    assert title == "# An unconditional model"
    assert header.startswith("| sampler | steps | clean colours % | Frechet | ms per image | times as fast as ")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [tuple(row[:2]) for row in cells] == [
        ("real images", "-"),
        *(("teacher, DDIM", str(steps)) for steps in (9, 8, 4)),
        *(("teacher, DPM-Solver++", str(steps)) for steps in (9, 8, 4)),
        *(("student, PeRFlow", str(steps)) for steps in (8, 4)),
    ]
    assert all(float(row[3]) >= 0 for row in cells) and cells[1][-1] == "1.00"
    assert Image.open(tmp_path / "out" / "images.png").width > 8 * 9


def test_a_folder_is_read_once_and_judged_without_colours(tmp_path: Path) -> None:
    for number in range(40):
        tiny_image(number, (20, 24)).save(tmp_path / f"{number}.png")
    images = unconditional.read_images(tmp_path, 8, most=38)
    assert images.shape == (32, 3, 8, 8) and len({tuple(image.flatten().tolist()) for image in images}) == 32
    judged = unconditional.evaluation_set(images, 5, with_colors=False)
    [real] = judged.floors
    assert judged.latents.shape == (5, 3, 8, 8) and not real.scores and real.distances.keys() == {"Frechet"}
