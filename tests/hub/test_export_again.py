"""Exports of workflows that were loaded or changed since: nothing is lost, and nothing stale is kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AdaptiveProjectedGuidance

from perflow_blocks import AttentionConfig, PeRFlowScheduler, PeRFlowSetTimestepsStep, export_workflow
from perflow_blocks.blocks.workflows import PeRFlowSDXLText2ImageBlocks
from tests.attention.conftest import calls_of
from tests.conftest import run
from tests.hub.conftest import hub_entry, index_of, loaded, referring_pipeline, tiny_pipeline, use_own_modules


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_own_modules(tmp_path / "modules", monkeypatch)


def exported(pipe: Any, directory: Path, **options: Any) -> Path:
    return export_workflow(pipe, directory, **{"mode": "thin", "weights": "include", **options})


def text2image(**components: Any) -> Any:
    return tiny_pipeline(PeRFlowSDXLText2ImageBlocks(), **components)


@pytest.mark.parametrize("windows", [{"num_time_windows": 8}, {"window_boundaries": [1.0, 0.6, 0.0]}])
def test_windows_of_the_users_scheduler_replace_those_of_the_configuration(
    tmp_path: Path, windows: dict[str, Any]
) -> None:
    pipe = text2image()
    pipe.update_components(window_boundaries=[1.0, 0.7, 0.3, 0.0], prediction_type="velocity")
    pipe.update_components(scheduler=PeRFlowScheduler(**windows))
    expected = run(pipe, num_inference_steps=8)
    directory = exported(pipe, tmp_path / "out")
    assert index_of(directory)["prediction_type"] == "ddim_eps"
    again = loaded(directory)
    torch.testing.assert_close(run(again, num_inference_steps=8), expected, rtol=1e-4, atol=1e-4)
    assert again.scheduler.windows == pipe.scheduler.windows


def test_a_guider_that_was_not_loaded_is_kept(tmp_path: Path) -> None:
    pipe = text2image(guider=AdaptiveProjectedGuidance(guidance_scale=4.0, eta=0.5))
    first = exported(pipe, tmp_path / "first")
    others = [name for name in pipe.pretrained_component_names if name != "guider"]
    for load, options in ((False, {"weights": "reference", "exclude": others}), (True, {})):
        unloaded = loaded(first, load_components=load)
        unloaded.update_components(guider=None)
        directory = exported(unloaded, tmp_path / f"again {load}", **options)
        assert index_of(directory)["guider"][1] == "AdaptiveProjectedGuidance"
        assert "AdaptiveProjectedGuidance" in (directory / "README.md").read_text()
        guider = loaded(directory, load_components=load).get_component_spec("guider").load()
        assert (guider.guidance_scale, guider.eta) == (4.0, 0.5)


def test_components_that_are_excluded_are_in_no_index(tmp_path: Path) -> None:
    index = {"unet": hub_entry("UNet2DConditionModel", "owner/unet"), "vae": hub_entry("AutoencoderKL", "owner/vae")}
    pipe = referring_pipeline(PeRFlowSDXLText2ImageBlocks(), index, tmp_path / "given")
    with pytest.raises(ValueError, match=r"vae of owner/vae is not loaded.*exclude=\['vae'\]"):
        exported(pipe, tmp_path / "no")
    assert "vae" not in index_of(exported(pipe, tmp_path / "out", weights="reference", exclude=["vae"]))
    with pytest.raises(ValueError, match=r"exclude names vea; the components are .*vae"):
        exported(pipe, tmp_path / "no", weights="reference", exclude=["vea"])
    assert not (tmp_path / "no").exists()


def test_a_snapshot_of_the_hub_is_referred_to_by_its_id_and_commit(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--owner--flow" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    index = {"unet": hub_entry("UNet2DConditionModel", str(snapshot) + os.sep, subfolder="unet")}
    pipe = referring_pipeline(PeRFlowSDXLText2ImageBlocks(), index, tmp_path / "given")
    source = index_of(exported(pipe, tmp_path / "out", weights="reference"))["unet"][2]
    assert (source["pretrained_model_name_or_path"], source["revision"]) == ("owner/flow", commit)
    assert source["subfolder"] == "unet"


def test_words_of_a_textual_inversion_are_not_lost_in_silence(tmp_path: Path) -> None:
    index = {"tokenizer": hub_entry("CLIPTokenizer", "owner/tokenizer", "transformers")}
    pipe = referring_pipeline(PeRFlowSDXLText2ImageBlocks(), index, tmp_path / "given")
    tokenizer = text2image().tokenizer
    tokenizer._diffusers_load_id = pipe.get_component_spec("tokenizer").load_id
    pipe.update_components(tokenizer=tokenizer)
    exported(pipe, tmp_path / "plain", weights="reference")
    tokenizer.add_tokens(["<cat-toy>"])
    with pytest.raises(ValueError, match=r"tokenizer has 1 tokens more than its vocabulary \(<cat-toy>\).*'include'"):
        exported(pipe, tmp_path / "no", weights="reference")


def test_objects_of_the_package_go_into_a_self_contained_pipeline(tmp_path: Path) -> None:
    """Its classes are other objects than the package's, of the same names."""
    pipe = text2image()
    again = loaded(exported(pipe, tmp_path / "out", mode="self-contained"))
    assert type(again.blocks).__module__.startswith("diffusers_modules")
    for each in (pipe, again):
        each.update_components(scheduler=PeRFlowScheduler(num_time_windows=2), attention=AttentionConfig("sliced"))
    expected = run(pipe, num_inference_steps=4)
    torch.testing.assert_close(run(again, num_inference_steps=4), expected, rtol=1e-4, atol=1e-4)
    assert again.scheduler.windows.num_windows == 2
    assert again.config["attention_plan"] == pipe.config["attention_plan"]
    assert any("sliced" in calls for calls in calls_of(again).values())


def test_blocks_without_a_recipe_are_exported_too(tmp_path: Path) -> None:
    assert "guider" not in index_of(exported(PeRFlowSetTimestepsStep(), tmp_path / "out", weights="reference"))
