"""The manifest of a workflow repository: what it records, what it finds, and what it refuses to read."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from perflow_blocks import __version__
from perflow_blocks.hub.manifest import MANIFEST, FileEntry, Manifest, read_manifest, verify_manifest, write_manifest

CONTENT = {
    "block.py": b"from .part import Blocks\n",
    "part.py": b"class Blocks: ...\n",
    "modular_config.json": b"{}\n",
    "unet/model.safetensors": bytes(range(256)),
}


@pytest.fixture
def workflow(tmp_path: Path) -> Path:
    directory = tmp_path / "workflow"
    for name, content in CONTENT.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    write_manifest(directory, blocks="block.Blocks", mode="thin")
    return directory


def rewritten(directory: Path, **changes: Any) -> Path:
    """The directory, with other values in its manifest."""
    values = json.loads((directory / MANIFEST).read_text())
    (directory / MANIFEST).write_text(json.dumps({**values, **changes}))
    return directory


def test_every_file_is_recorded_and_read_back(workflow: Path) -> None:
    manifest = read_manifest(workflow)
    assert (manifest.blocks, manifest.mode, manifest.package_version) == ("block.Blocks", "thin", __version__)
    assert manifest.files == {
        name: FileEntry(sha256=hashlib.sha256(content).hexdigest(), size=len(content))
        for name, content in CONTENT.items()
    }
    assert list(manifest.files) == sorted(CONTENT)
    assert verify_manifest(workflow) == manifest == write_manifest(workflow, blocks="block.Blocks", mode="thin")
    assert sorted(path.name for path in workflow.iterdir()) == sorted([*(n.split("/")[0] for n in CONTENT), MANIFEST])


def test_all_that_is_wrong_is_named_at_once(workflow: Path) -> None:
    (workflow / "block.py").write_bytes(CONTENT["block.py"].replace(b"B", b"C"))
    (workflow / "modular_config.json").write_bytes(b"{} \n")
    (workflow / "part.py").unlink()
    (workflow / "unet" / "evil.py").write_text("")
    (workflow / ".gitattributes").write_text("harmless")
    with pytest.raises(ValueError) as caught:
        verify_manifest(workflow)
    message = str(caught.value)
    assert "2 changed (block.py, modular_config.json), 1 missing (part.py), 1 unexpected (unet/evil.py)" in message
    assert "again" in message


def test_weights_are_compared_by_size_unless_asked(workflow: Path) -> None:
    file = workflow / "unet" / "model.safetensors"
    file.write_bytes(bytes(256))
    verify_manifest(workflow)
    with pytest.raises(ValueError, match=r"1 changed \(unet/model.safetensors\)"):
        verify_manifest(workflow, weights=True)
    file.write_bytes(bytes(255))
    with pytest.raises(ValueError, match=r"1 changed \(unet/model.safetensors\)"):
        verify_manifest(workflow)


def test_what_was_not_downloaded_may_be_absent_but_what_is_there_is_compared(workflow: Path) -> None:
    (workflow / "unet" / "model.safetensors").unlink()
    verify_manifest(workflow, only={"block.py", "part.py"})
    (workflow / "modular_config.json").write_bytes(b"[]\n")
    with pytest.raises(ValueError, match=r"says: 1 changed \(modular_config.json\);"):
        verify_manifest(workflow, only={"block.py", "part.py"})
    (workflow / "part.py").unlink()
    with pytest.raises(ValueError, match=r"1 missing \(part.py\)"):
        verify_manifest(workflow, only={"block.py", "part.py"})


def test_a_manifest_that_is_passed_counts_instead_of_the_one_there(workflow: Path) -> None:
    trusted = read_manifest(workflow)
    (workflow / "block.py").write_text("")
    write_manifest(workflow, blocks="block.Blocks", mode="thin")
    verify_manifest(workflow)
    with pytest.raises(ValueError, match=r"changed \(block.py\)"):
        verify_manifest(workflow, trusted)


def test_links_to_files_are_read_and_links_to_directories_refused(workflow: Path, tmp_path: Path) -> None:
    blob = (workflow / "block.py").rename(tmp_path / "blob")  # as the Hub's cache keeps its files
    (workflow / "block.py").symlink_to(blob)
    verify_manifest(workflow)
    blob.write_text("other")
    with pytest.raises(ValueError, match=r"changed \(block.py\)"):
        verify_manifest(workflow)
    blob.unlink()
    with pytest.raises(ValueError, match=r"changed \(block.py\)"):
        verify_manifest(workflow)
    (workflow / "block.py").unlink()
    (workflow / "block.py").write_bytes(CONTENT["block.py"])
    (workflow / "linked").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ValueError, match=r"1 unexpected \(linked\)"):
        verify_manifest(workflow)
    with pytest.raises(ValueError, match=r"links to directories \(linked\)"):
        write_manifest(workflow, blocks="block.Blocks", mode="thin")


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../up.py", "a/../b.py", "a//b.py", "./a.py", "", "C:/a.py", "a\\b.py", "a\n.py", MANIFEST]
)
def test_paths_outside_are_refused_when_read(workflow: Path, path: str) -> None:
    files = {path: {"sha256": "0" * 64, "size": 0}}
    with pytest.raises(ValueError, match="is not allowed"):
        read_manifest(rewritten(workflow, files=files))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"more": 1}, "needs the keys blocks, mode"),
        ({"files": []}, "needs the keys blocks, mode"),
        ({"mode": "thick"}, "mode='thick' is unknown; one of self-contained, thin"),
        ({"mode": ["thin"]}, "is unknown"),
        ({"blocks": "block.py; x"}, "names no class"),
        ({"blocks": 3}, "names no class"),
        ({"package_version": None}, "package_version=None"),
        ({"files": {"a.py": 3}}, "a.py needs the keys sha256 and size"),
        ({"files": {"a.py": {"sha256": "0" * 64, "size": 0, "x": 0}}}, "a.py needs the keys sha256 and size"),
        ({"files": {"a.py": {"sha256": "0" * 63, "size": 0}}}, "a.py: sha256="),
        ({"files": {"a.py": {"sha256": "0" * 64, "size": -1}}}, "a.py: size=-1"),
        ({"files": {"a.py": {"sha256": "0" * 64, "size": True}}}, "a.py: size=True"),
    ],
)
def test_wrong_values_are_refused_when_read(workflow: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        verify_manifest(rewritten(workflow, **changes))
    assert message in str(caught.value) and str(workflow / MANIFEST) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe{}", b'{"blocks": "block.Blocks"}', b"[" * 100_000])
def test_what_is_no_manifest_is_refused(workflow: Path, content: bytes) -> None:
    (workflow / MANIFEST).write_bytes(content)
    with pytest.raises(ValueError, match="is no manifest of a workflow"):
        read_manifest(workflow)


def test_a_directory_without_manifest_is_none_of_ours(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"holds no {MANIFEST}; name a directory"):
            read_manifest(directory)


def test_a_manifest_that_cannot_be_written_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no files"):
        write_manifest(tmp_path, blocks="block.Blocks", mode="thin")
    (tmp_path / "block.py").write_text("")
    with pytest.raises(ValueError, match="mode='x' is unknown"):
        write_manifest(tmp_path, blocks="block.Blocks", mode="x")
    os.symlink(tmp_path / "nowhere", tmp_path / "part.py")
    with pytest.raises(ValueError, match=r"part.py cannot be read"):
        write_manifest(tmp_path, blocks="block.Blocks", mode="thin")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block.py", "part.py"]


def test_a_manifest_made_by_hand_is_checked_as_well() -> None:
    with pytest.raises(ValueError, match="is not allowed"):
        Manifest(blocks="B", mode="thin", package_version="1", files={"../x": FileEntry(sha256="0" * 64, size=0)})
