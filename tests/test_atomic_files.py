"""Files and directories that are replaced as a whole, the litter of killed writers, and full disks."""

from __future__ import annotations

import resource
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from perflow_blocks import atomic_files
from perflow_blocks.atomic_files import atomic_directory, atomic_path
from perflow_blocks.delta.extract import extract_delta, save_delta
from perflow_blocks.testing.tiny import tiny_sdxl_unet
from tests.conftest import make_pipeline


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_writer_killed_between_two_moves_loses_nothing(tmp_path: Path) -> None:
    """Where the system cannot exchange directories."""
    old = tmp_path / ".saved.abcdefgh.tmp" / "new.old"
    old.mkdir(parents=True)
    (old / "notes.txt").write_text("of the user")
    with atomic_directory(tmp_path / "saved") as new:
        assert (tmp_path / "saved" / "notes.txt").read_text() == "of the user"
        (new / "x").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["saved", "x"]


@pytest.mark.parametrize("system", ["exchanges directories", "cannot"])
@pytest.mark.parametrize("place", ["beside", "working directory"])
def test_a_directory_appears_whole_or_stays_as_it_was(
    place: str, system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "deep" / "folder"
    if system == "cannot":
        monkeypatch.setattr(atomic_files.ctypes, "CDLL", lambda name: object())
    if place == "working directory":
        target.mkdir(parents=True)
        monkeypatch.chdir(target)
    with atomic_directory(target) as folder:
        (folder / "one").mkdir()
        (folder / "one" / "file").write_text("1")
        assert not (target / "one").exists()
    with pytest.raises(KeyboardInterrupt), atomic_directory(target) as folder:
        (folder / "two").write_text("2")
        raise KeyboardInterrupt
    assert names(target) == ["one"]
    for text in ("3", "4"):
        with atomic_directory(target) as folder:
            (folder / "three").mkdir()
            (folder / "three" / "file").write_text(text)
        assert names(target) == ["three"] and names(target.parent) == ["folder"]
        assert (target / "three" / "file").read_text() == text
    with (
        pytest.raises(ValueError, match="it is a file; name a directory"),
        atomic_directory(target / "three" / "file"),
    ):
        pytest.fail("entered")


def test_what_is_written_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    private = tmp_path / "private"
    private.touch(0o600)
    with atomic_path(tmp_path / "file") as file:
        save_file({"a": torch.ones(2)}, file)  # readable for its owner alone
    with atomic_directory(tmp_path / "folder") as folder:
        save_file({"a": torch.ones(2)}, folder / "file")
        (folder / "link").hardlink_to(private)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual", "file", "folder/file", "private")]
    assert modes == [modes[0]] * 3 + [0o600]


def test_two_writers_of_one_name_do_not_meet(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "file") as first:
        first.write_text("first")
        with atomic_path(tmp_path / "file") as second:
            second.write_text("second")
        assert (tmp_path / "file").read_text() == "second"
    assert (tmp_path / "file").read_text() == "first" and names(tmp_path) == ["file"]


def test_the_next_writer_removes_what_dead_ones_left_and_follows_no_link(tmp_path: Path) -> None:
    others, place = tmp_path / "others", tmp_path / "place"
    (others / "file").mkdir(parents=True)
    (place / ".file.00000000.tmp").mkdir(parents=True)
    (place / ".file.11111111.tmp").mkdir()
    (place / ".file.11111111.tmp" / "lock").symlink_to(others / "made")
    (place / ".file.22222222.tmp").symlink_to(others)
    (place / ".other.33333333.tmp").mkdir()
    with atomic_path(place / "file") as temporary:
        temporary.write_text("new")
    assert names(place) == [".file.11111111.tmp", ".file.22222222.tmp", ".other.33333333.tmp", "file"]
    assert names(others) == ["file"]


COMMANDS = {"merge": "{model} {delta} -o {out}", "export": "{model} {out} --weights include"}
COMMANDS["extract"] = "{model} {model} -o {out}"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_line(command: str, run: Callable[..., Any], repository: Path, tmp_path: Path) -> None:
    """No file gets larger than 50 kB."""
    delta, out = tmp_path / "delta.safetensors", tmp_path / "out.safetensors"
    save_delta(extract_delta(tiny_sdxl_unet(1), tiny_sdxl_unet(0)), delta)
    arguments = COMMANDS[command].format(model=repository, delta=delta, out=out).split()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        status, printed, error = run(command, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (status, printed) == (2, "")
    message = error.splitlines()[-1]
    assert message.startswith(f"Error: cannot write {out}: ") and message.endswith("choose a path with free space.")
    assert names(tmp_path) == ["delta.safetensors"]


def test_a_pipeline_saved_again_keeps_other_files_of_its_directory(tmp_path: Path) -> None:
    target, unet = tmp_path / "saved", tmp_path / "saved" / "unet"
    weights, half = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"
    make_pipeline().save_pretrained(target, max_shard_size="100KB")
    (target / "notes.txt").write_text("mine")
    make_pipeline().save_pretrained(target)
    assert names(unet) == ["config.json", weights] and (target / "notes.txt").read_text() == "mine"
    make_pipeline().save_pretrained(target, variant="fp16")
    assert names(unet) == ["config.json", half, weights]
    assert str(target) in (target / "modular_model_index.json").read_text() and names(tmp_path) == ["saved"]
