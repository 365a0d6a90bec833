"""Repositories have the same bytes on every system: lines that are written or checked out end in one character."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from perflow_blocks.hub.address import addressed_files
from perflow_blocks.hub.json_files import BLOCKS_CONFIG, INDEX, write_json
from perflow_blocks.hub.manifest import MANIFEST, read_manifest, write_manifest
from workflows.generate import ROOT, WORKFLOWS, generate

NAME = "sdxl-text2image"


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text files that are written as on Windows, where a line ends in two characters unless told otherwise."""

    def write_text(self: Path, data: str, encoding: Any = None, errors: Any = None, newline: str | None = None) -> int:
        with self.open("w", encoding=encoding, errors=errors, newline="\r\n" if newline is None else newline) as file:
            return file.write(data)

    monkeypatch.setattr(Path, "write_text", write_text)


@pytest.mark.usefixtures("windows")
def test_an_export_on_windows_has_the_bytes_of_any_other(tmp_path: Path) -> None:
    made = generate(NAME, tmp_path)
    for name in (MANIFEST, *read_manifest(made).files):
        assert (made / name).read_bytes() == (WORKFLOWS / NAME / name).read_bytes(), name


def test_an_address_is_sent_with_the_same_line_ends(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    write_json(tmp_path / "unet" / "config.json", {"a": 1})
    write_json(tmp_path / BLOCKS_CONFIG, {"a": 1})
    write_json(tmp_path / INDEX, {"unet": ["diffusers", "UNet2DConditionModel", {"subfolder": "unet"}]})
    write_manifest(tmp_path, blocks="Flow", mode="thin")
    sent = addressed_files(tmp_path, "someone/flow")
    assert json.loads(sent[INDEX])["unet"][2]["pretrained_model_name_or_path"] == "someone/flow"
    assert not [name for name, content in sent.items() if b"\r" in content]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
@pytest.mark.parametrize("attributes", [True, False])
def test_a_checkout_with_the_line_ends_of_windows_keeps_the_bytes(attributes: bool, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(WORKFLOWS / NAME, source / NAME)
    (source / "picture.png").write_bytes(b"\x89PNG\n\r\n")
    (source / "weights.safetensors").write_bytes(b"plain\ntext\n")
    if attributes:
        shutil.copyfile(ROOT / ".gitattributes", source / ".gitattributes")
    git(source, "init", "-q")
    git(source, "add", ".")
    git(source, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "All")
    git(tmp_path, "clone", "-q", "-c", "core.autocrlf=true", str(source), "clone")
    same = [
        path.read_bytes() == (tmp_path / "clone" / path.relative_to(source)).read_bytes()
        for path in [*sorted((source / NAME).iterdir()), source / "picture.png", source / "weights.safetensors"]
        if path.is_file()
    ]
    assert all(same) == attributes


def git(directory: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=directory, check=True, capture_output=True)
