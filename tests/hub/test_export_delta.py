"""Deltas in exports: merged and included, copied beside the index, or refused where they would be lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from perflow_blocks import export_workflow, extract_delta, merge_delta, rescale_delta
from perflow_blocks.blocks.workflows import PeRFlowSDXLText2ImageBlocks
from perflow_blocks.delta.extract import save_delta
from perflow_blocks.delta.merge import merge_record, merge_records
from perflow_blocks.delta.recipe import DeltaRecipe
from perflow_blocks.hub.delta import DELTA_FILE
from perflow_blocks.testing import tiny_sdxl_unet
from tests.conftest import run
from tests.hub.conftest import hub_entry, index_of, loaded, referring_pipeline, text_of, use_own_modules

RECIPE = DeltaRecipe(prediction_type="ddim_eps", num_time_windows=2, num_inference_steps=3, guidance_scale=1.0)


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_own_modules(tmp_path / "modules", monkeypatch)


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("delta") / "accelerator.safetensors"
    base = tiny_sdxl_unet()
    save_delta(extract_delta(tiny_sdxl_unet(1), base), path, RECIPE, torch.float32)
    return path


@pytest.fixture
def pipe(repository: Path) -> Any:
    pipe = PeRFlowSDXLText2ImageBlocks().init_pipeline(str(repository))
    pipe.load_components()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def referring(tmp_path: Path) -> Any:
    """A pipeline whose UNet is somewhere on the Hub, with nothing loaded."""
    index = {"unet": hub_entry("UNet2DConditionModel", "owner/model", subfolder="unet")}
    return referring_pipeline(PeRFlowSDXLText2ImageBlocks(), index, tmp_path / "given")


def test_a_merged_delta_is_in_the_included_weights_and_merged_once(tmp_path: Path, pipe: Any, delta: Path) -> None:
    expected = run(pipe, delta=delta)
    pipe.update_components(delta=str(delta))  # configured and merged
    directory = export_workflow(pipe, tmp_path / "out", mode="thin", weights="include")
    assert "delta" not in index_of(directory) and not (directory / "delta").exists()
    assert "| 3 | 1 | ddim_eps | 2, equal |" in (directory / "README.md").read_text()
    assert str(delta.parent) not in text_of(directory)
    again = loaded(directory)
    (record,) = merge_records(again.unet)
    assert (record.source, record.recipe, record.reloaded) == (delta.name, RECIPE, True)
    torch.testing.assert_close(run(again), expected, rtol=1e-4, atol=1e-3)
    assert again.scheduler.num_inference_steps == 3 and again.guider.guidance_scale == 1.0
    assert len(merge_records(again.unet)) == 1


def test_a_pipeline_that_diffusers_saved_with_its_delta_needs_no_file(tmp_path: Path, pipe: Any, delta: Path) -> None:
    pipe.update_components(delta=str(delta))
    run(pipe)
    pipe.update_components(delta=delta.name)  # as an index says it
    pipe.save_pretrained(str(tmp_path / "saved"), overwrite_modular_index=True)
    saved = PeRFlowSDXLText2ImageBlocks().init_pipeline(str(tmp_path / "saved"))
    saved.load_components()
    directory = export_workflow(saved, tmp_path / "out", mode="thin", weights="include")
    assert not {"delta", "delta_scale"} & set(index_of(directory)) and not (directory / "delta").exists()
    assert [record.source for record in merge_records(loaded(directory).unet)] == [delta.name]


def test_a_delta_that_waits_for_its_merge_is_copied_with_included_weights(
    tmp_path: Path, pipe: Any, delta: Path
) -> None:
    pipe.update_components(delta=str(delta), delta_scale=0.5)
    directory = export_workflow(pipe, tmp_path / "out", mode="thin", weights="include")
    assert (index_of(directory)["delta"], index_of(directory)["delta_scale"]) == (DELTA_FILE, 0.5)
    assert (directory / DELTA_FILE).read_bytes() == delta.read_bytes()
    assert merge_record(pipe.unet) is None
    again = loaded(directory)
    assert torch.equal(run(again), run(pipe))
    assert merge_record(again.unet).digest == merge_record(pipe.unet).digest  # type: ignore[union-attr]


@pytest.mark.parametrize("how", ["configured", "given"])
def test_a_delta_alone_goes_beside_an_index_of_references(
    tmp_path: Path, referring: Any, delta: Path, how: str
) -> None:
    if how == "configured":
        referring.update_components(delta=str(delta))
    options: dict[str, Any] = {"mode": "thin", "weights": "delta-only", "delta": delta if how == "given" else None}
    directory = export_workflow(referring, tmp_path / "out", **options)
    index = index_of(directory)
    assert index["delta"] == DELTA_FILE and index["unet"][2]["pretrained_model_name_or_path"] == "owner/model"
    assert (directory / DELTA_FILE).read_bytes() == delta.read_bytes()
    assert "| 3 | 1 | ddim_eps | 2, equal |" in (directory / "README.md").read_text()
    assert str(delta.parent) not in text_of(directory)


def test_the_copied_delta_is_what_a_call_merges(tmp_path: Path, referring: Any, pipe: Any, delta: Path) -> None:
    directory = export_workflow(referring, tmp_path / "out", mode="thin", weights="delta-only", delta=delta)
    again = loaded(directory, load_components=False)
    again.register_components(**{name: pipe.components[name] for name in pipe.pretrained_component_names})
    run(again)
    record = merge_record(pipe.unet)
    assert record is not None and record.source == str(directory / DELTA_FILE)


def test_a_component_without_a_subfolder_is_not_mistaken_for_the_delta(tmp_path: Path, delta: Path) -> None:
    index = {"vae": hub_entry("AutoencoderKL", "owner/vae")}
    referring = referring_pipeline(PeRFlowSDXLText2ImageBlocks(), index, tmp_path / "given")
    directory = export_workflow(referring, tmp_path / "out", mode="thin", weights="delta-only", delta=delta)
    spec = loaded(directory, load_components=False).get_component_spec("vae")
    assert spec.pretrained_model_name_or_path == "owner/vae"


def test_a_merged_delta_is_copied_for_a_referred_base(tmp_path: Path, referring: Any, delta: Path) -> None:
    spec = referring.get_component_spec("unet")
    unet = tiny_sdxl_unet()
    unet._diffusers_load_id = spec.load_id
    referring.update_components(unet=unet)
    merge_delta(unet, delta)
    directory = export_workflow(referring, tmp_path / "out", mode="thin", weights="delta-only")
    assert (directory / DELTA_FILE).read_bytes() == delta.read_bytes()
    with pytest.raises(ValueError, match=r"accelerator.safetensors is not part of the weights .*'delta-only'"):
        export_workflow(referring, tmp_path / "no", mode="thin")
    other = tmp_path / "other.safetensors"
    save_delta(extract_delta(tiny_sdxl_unet(2), tiny_sdxl_unet()), other, RECIPE)
    with pytest.raises(ValueError, match="is not the delta that is merged"):
        export_workflow(referring, tmp_path / "no", mode="thin", weights="delta-only", delta=other)
    unet = tiny_sdxl_unet()
    unet._diffusers_load_id = spec.load_id
    referring.update_components(unet=unet)
    merge_delta(unet, delta, 0.5)
    scaled = export_workflow(referring, tmp_path / "scaled", mode="thin", weights="delta-only")
    assert (index_of(directory)["delta_scale"], index_of(scaled)["delta_scale"]) == (1.0, 0.5)
    rescale_delta(unet, 0.5, scales={"up_blocks.*": 0.25})
    with pytest.raises(ValueError, match=r"merged at scales of its own .*, which no index keeps"):
        export_workflow(referring, tmp_path / "no", mode="thin", weights="delta-only")
    merge_delta(unet, other)
    with pytest.raises(ValueError, match=r"2 deltas are merged .* of which an index can name one"):
        export_workflow(referring, tmp_path / "no", mode="thin", weights="delta-only")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "delta-only"}, "needs a delta, and the pipeline has none"),
        ({"weights": "delta-only", "delta": "absent.safetensors"}, "is no .safetensors file"),
        ({"weights": "reference", "delta": "some.safetensors"}, "some.safetensors is not part of the weights"),
    ],
)
def test_deltas_that_cannot_be_exported(tmp_path: Path, referring: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export_workflow(referring, tmp_path / "no", mode="thin", **options)
    assert not (tmp_path / "no").exists()
