"""The repository's id in the index of weights that lie in it."""

from __future__ import annotations

import json
from pathlib import Path

from perflow_blocks.hub.address import address_workflow
from perflow_blocks.hub.json_files import INDEX, write_json
from perflow_blocks.hub.manifest import verify_manifest, write_manifest

from .hub_export_support import hub_entry, index_of


def test_own_weights_get_the_id_and_all_else_stays(tmp_path: Path) -> None:
    own = hub_entry("UNet2DConditionModel", "x", subfolder="unet")
    own[2]["pretrained_model_name_or_path"] = None
    other = hub_entry("AutoencoderKL", "owner/vae", subfolder="vae")
    index = {"_class_name": "Pipeline", "unet": own, "vae": other, "delta": "delta/d.safetensors", "steps": [1, 2, 3]}
    write_json(tmp_path / INDEX, index)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    before = write_manifest(tmp_path, blocks="Blocks", mode="thin")
    for repo_id in ("me/first", "me/second"):
        manifest = address_workflow(tmp_path, repo_id)
        expected = json.loads(json.dumps(index))
        expected["unet"][2]["pretrained_model_name_or_path"] = repo_id
        assert index_of(tmp_path) == expected
        assert verify_manifest(tmp_path) == manifest
        assert {path for path in before.files if before.files[path] != manifest.files[path]} == {INDEX}


def test_an_index_that_needs_no_id_is_not_written(tmp_path: Path) -> None:
    text = '{"vae": ["diffusers", "AutoencoderKL", {"pretrained_model_name_or_path": "owner/vae"}]}'
    (tmp_path / INDEX).write_text(text)  # in a form that nobody here writes
    manifest = write_manifest(tmp_path, blocks="Blocks", mode="thin")
    assert address_workflow(tmp_path, "me/mine") == manifest
    assert (tmp_path / INDEX).read_text() == text
