"""The repository's id in what is published: index, Mellon's configuration, card, and the manifest over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from perflow_blocks import export_workflow
from perflow_blocks.blocks.workflows import PeRFlowSDXLText2ImageBlocks
from perflow_blocks.hub.address import addressed_card, addressed_files, addressed_index
from perflow_blocks.hub.json_files import INDEX, MELLON, write_json
from perflow_blocks.hub.manifest import MANIFEST, bytes_entry, parse_manifest, verify_manifest, write_manifest
from tests.hub.conftest import files_of, hub_entry, index_of, referring_pipeline


def own_entry(location: str | None, subfolder: str = "unet") -> list[Any]:
    entry = hub_entry("UNet2DConditionModel", "x", subfolder=subfolder)
    entry[2]["pretrained_model_name_or_path"] = location
    return entry


def workflow(directory: Path, index: dict[str, Any], default_repo: str = "") -> Path:
    (directory / "unet").mkdir(parents=True)
    (directory / "unet" / "config.json").write_text("{}")
    write_json(directory / INDEX, index)
    write_json(directory / MELLON, {"label": "Mine", "default_repo": default_repo})
    write_manifest(directory, blocks="Blocks", mode="thin")
    return directory


def written(directory: Path, files: dict[str, bytes], target: Path) -> Path:
    """The directory as it is published."""
    for path, content in {**files_of(directory), **files}.items():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_bytes(content)
    return target


def test_own_weights_get_the_id_and_all_else_stays(tmp_path: Path) -> None:
    other = hub_entry("AutoencoderKL", "owner/vae", subfolder="vae")
    index = {"unet": own_entry(None), "vae": other, "delta": "delta/d.safetensors", "steps": [1, 2, 3]}
    directory = workflow(tmp_path / "given", index)
    before = files_of(directory)
    for repo_id in ("me/first", "me/second"):
        changed = addressed_files(directory, repo_id)
        assert changed.keys() == {INDEX, MELLON, MANIFEST}
        assert json.loads(changed[INDEX]) == {**index, "unet": own_entry(repo_id)}
        assert json.loads(changed[MELLON]) == {"label": "Mine", "default_repo": repo_id}
        manifest = parse_manifest(changed[MANIFEST])
        assert manifest.files[INDEX] == bytes_entry(changed[INDEX])
        published = written(directory, changed, tmp_path / repo_id)
        assert verify_manifest(published, weights=True) == manifest
        assert addressed_files(published, repo_id) == {}
    assert files_of(directory) == before


def test_what_was_published_can_be_published_elsewhere(tmp_path: Path) -> None:
    directory = workflow(tmp_path / "given", {"unet": own_entry("me/first")}, "me/first")
    changed = addressed_files(directory, "me/second")
    assert json.loads(changed[INDEX])["unet"] == own_entry("me/second")
    assert json.loads(changed[MELLON])["default_repo"] == "me/second"


@pytest.mark.parametrize("former", ["", "me/first"])
def test_weights_of_other_repositories_stay_theirs_whatever_their_folder(former: str) -> None:
    """A UNet that is referred to, in a folder of the same name as one that lies here."""
    index = {"unet": own_entry("owner/model"), "unet_2": own_entry(None), "vae": own_entry(None, "vae")}
    expected = {**index, "unet_2": own_entry("me/mine")}
    assert addressed_index(index, "me/mine", {"unet"}, former) == expected


def test_an_index_that_needs_no_id_is_not_written(tmp_path: Path) -> None:
    text = '{"vae": ["diffusers", "AutoencoderKL", {"pretrained_model_name_or_path": "owner/vae"}]}'
    (tmp_path / INDEX).write_text(text)  # in a form that nobody here writes
    write_manifest(tmp_path, blocks="Blocks", mode="thin")
    assert addressed_files(tmp_path, "me/mine") == {}


@pytest.mark.parametrize("content", ["[]", "{"])
def test_a_file_that_is_no_json_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    write_manifest(tmp_path, blocks="Blocks", mode="thin")
    with pytest.raises(ValueError, match=f"{INDEX} .*export the workflow again"):
        addressed_files(tmp_path, "me/mine")


@pytest.mark.parametrize("repo_id", [None, "me/first"])
def test_card_and_mellon_name_the_repository(tmp_path: Path, repo_id: str | None) -> None:
    index = {"unet": hub_entry("UNet2DConditionModel", "me/first", subfolder="unet")}
    pipe = referring_pipeline(PeRFlowSDXLText2ImageBlocks(), index, tmp_path / "given")
    notes = 'Unlike `load_workflow("owner/other")`.'
    directory = export_workflow(pipe, tmp_path / "flow", mode="thin", repo_id=repo_id, notes=notes)
    changed = addressed_files(directory, "me/second")
    assert changed.keys() == {"README.md", MELLON, MANIFEST}
    card = changed["README.md"].decode()
    assert 'ModularPipeline.from_pretrained("me/second", trust_remote_code=True)' in card
    assert 'load_workflow("me/second", trust_remote_code=True' in card
    assert "your-name" not in card and notes in card
    assert "[me/first](https://huggingface.co/me/first)" in card  # where the UNet is from
    assert index_of(directory)["unet"] == index["unet"]
    verify_manifest(written(directory, changed, tmp_path / "published"))
    named_at_once = export_workflow(pipe, tmp_path / "b" / "flow", mode="thin", repo_id="me/second", notes=notes)
    assert files_of(named_at_once) == files_of(tmp_path / "published")


def test_a_card_that_loads_another_workflow_too_keeps_it() -> None:
    card = b'load_workflow("me/first") load_workflow("me/first-2") from_pretrained("your-name/x") "me/first"'
    expected = b'load_workflow("me/second") load_workflow("me/first-2") from_pretrained("your-name/x") "me/first"'
    assert addressed_card(card, "me/second", "me/first") == expected
