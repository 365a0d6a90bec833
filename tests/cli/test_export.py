"""`perflow export`: what it writes and lists, and its mistakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from perflow_blocks.delta.extract import save_delta
from perflow_blocks.testing import tiny_image, tiny_sdxl_unet
from tests.conftest import index_of

pytestmark = pytest.mark.usefixtures("own_modules")

Run = Callable[..., tuple[int, str, str]]
WORKFLOW = Path(__file__).parent.parent.parent / "workflows" / "sdxl-text2image"


def mistake(run: Run, *arguments: object) -> str:
    status, out, err = run("export", *arguments)
    assert status == 2 and not out
    return err.splitlines()[-1]


def test_a_plain_model_becomes_a_workflow_with_its_weights(run: Run, repository: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    options = ("--weights", "include", "--dtype", "float32", "--title", "Mine", "--licence", "mit")
    status, out, err = run("export", repository, target, *options)
    assert status == 0, err
    files = [path for path in target.rglob("*") if path.is_file()]
    assert out == f"{target}: {len(files)} files, {sum(path.stat().st_size for path in files):,} bytes\n"
    assert (target / "unet").is_dir()
    assert "# Mine" in (target / "README.md").read_text()


def test_a_workflow_is_exported_with_its_own_blocks_and_a_delta(run: Run, tmp_path: Path) -> None:
    delta, image, notes = tmp_path / "d.safetensors", tmp_path / "p.png", tmp_path / "n.md"
    save_delta(tiny_sdxl_unet().state_dict(), delta)
    tiny_image(1).save(image)
    notes.write_text("Take care.")
    target = tmp_path / "out"
    status, _, err = run(
        "export", WORKFLOW, target, "--trust-remote-code", "--weights", "delta-only", "--delta", delta,
        "--image", image, "--notes", notes, "--mode", "self-contained",
    )  # fmt: skip
    assert status == 0, err
    assert "block.SavedBlocks" in (target / "modular_config.json").read_text() and list(target.glob("perflow_*.py"))
    index = index_of(target)
    assert index["unet"][2]["pretrained_model_name_or_path"] == "hansyan/perflow-sdxl-base"
    assert index["delta"] == "delta/d.safetensors" and index["num_time_windows"] == 4
    assert (target / "picture.png").is_file()
    card = (target / "README.md").read_text()
    assert "Take care." in card and '"your-name/out"' in card


def test_mistakes_are_one_line_and_leave_nothing(run: Run, repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "pass --weights 'include'" in mistake(run, repository, out)
    assert "'--mode'" in mistake(run, WORKFLOW, out, "--mode", "fat")
    assert "does not exist" in mistake(run, tmp_path / "absent", out)
    assert "--notes" in mistake(run, repository, out, "--notes", tmp_path / "absent.md")
    assert "--trust-remote-code" in mistake(run, WORKFLOW, out, "--revision", "main")
    assert "it has no modular_config.json" in mistake(run, repository, out, "--trust-remote-code")
    assert not out.exists()


def test_an_export_is_replaced_with_force_alone(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert run("export", WORKFLOW, target)[0] == 0
    assert "holds a workflow; pass --force" in mistake(run, WORKFLOW, target)
    assert run("export", WORKFLOW, target, "--title", "New", "--force")[0] == 0
    assert "# New" in (target / "README.md").read_text()
