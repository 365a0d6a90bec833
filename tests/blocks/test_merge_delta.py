"""The delta as a block: merged before the loop, once, with its recipe; guiders that users set are left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance, UNet2DConditionModel

from perflow_blocks import PeRFlowSDXLAutoBlocks
from perflow_blocks.blocks import merge_delta as block
from perflow_blocks.delta.extract import save_delta
from perflow_blocks.delta.merge import merge_delta, merge_record, merge_records
from perflow_blocks.delta.recipe import DeltaRecipe
from perflow_blocks.testing.tiny import tiny_sd_unet, tiny_sdxl_components, tiny_sdxl_unet
from tests.conftest import count_unet_calls, make_pipeline, run

pytestmark = pytest.mark.behaviour

RECIPE = DeltaRecipe(prediction_type="diff_eps", num_time_windows=2, num_inference_steps=3, guidance_scale=1.0)
OTHER_RECIPE = DeltaRecipe(prediction_type="ddim_eps", num_time_windows=4, num_inference_steps=4, guidance_scale=1.0)


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dW between two tiny UNets, so that the merged one is known."""
    base, student = tiny_sdxl_unet(0).state_dict(), tiny_sdxl_unet(1).state_dict()
    path = tmp_path_factory.mktemp("delta") / "perflow_delta.safetensors"
    save_delta({name: student[name] - base[name] for name in base}, path, RECIPE, dtype=torch.float32)
    return path


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_merging_gives_the_student_and_its_recipe(delta: Path) -> None:
    pipe = make_pipeline()
    batches = count_unet_calls(pipe)
    run(pipe, delta=delta)
    student = tiny_sdxl_unet(1).state_dict()
    for name, tensor in pipe.unet.state_dict().items():
        torch.testing.assert_close(tensor, student[name], rtol=0, atol=1e-6)
    assert batches == [1, 1, 1]  # guidance 1 and 3 steps, as the recipe says
    assert pipe.scheduler.config.prediction_type == "diff_eps"
    assert pipe.scheduler.config.num_time_windows == 2


def test_repeated_calls_merge_once(delta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = make_pipeline()
    first, merged = run(pipe, delta=str(delta)), weights(pipe)
    with monkeypatch.context() as patch:  # no file is opened, no recipe made
        patch.setattr("perflow_blocks.delta.files.safe_open", lambda *_, **__: pytest.fail("opened"))
        patch.setattr(DeltaRecipe, "__post_init__", lambda _: pytest.fail("made"))
        assert torch.equal(run(pipe, delta=str(delta)), first)
    assert torch.equal(run(pipe), first)  # the merge is remembered, and so is its recipe
    assert equal(weights(pipe), merged)


def test_nothing_is_merged_when_nothing_is_named() -> None:
    pipe = make_pipeline()
    before = weights(pipe)
    state = pipe(prompt="a star", output_type="latent")
    assert equal(weights(pipe), before)
    assert state.delta_recipe is None
    assert pipe.guider.guidance_scale == 2.0


def test_the_scale_can_change_and_zero_takes_the_delta_out(delta: Path) -> None:
    pipe = make_pipeline()
    base = weights(pipe)
    plain = run(pipe, num_inference_steps=4)
    run(pipe, delta=delta, delta_scale=0.5)
    half = weights(pipe)
    pipe.update_components(scheduler=None)
    again = run(pipe, delta=delta, delta_scale=0.0, num_inference_steps=4)
    name = "conv_in.weight"
    assert not torch.equal(half[name], base[name])
    torch.testing.assert_close(pipe.unet.state_dict()[name], base[name], rtol=0, atol=1e-6)
    assert pipe.guider.guidance_scale == 2.0
    torch.testing.assert_close(again, plain, rtol=1e-3, atol=1e-3)


def index_pipeline(tmp_path: Path, index: dict[str, Any], **components: Any) -> Any:
    """A pipeline that was loaded from a directory with these configuration values."""
    (tmp_path / "modular_model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionXLModularPipeline", **index})
    )
    pipe = PeRFlowSDXLAutoBlocks().init_pipeline(str(tmp_path))
    pipe.update_components(**{**tiny_sdxl_components(), **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_an_index_names_a_file_in_its_own_directory(
    tmp_path: Path, delta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "repository"
    home.mkdir()
    (home / "d.safetensors").write_bytes(delta.read_bytes())
    pipe = index_pipeline(home, {"delta": "d.safetensors"})
    monkeypatch.chdir(tmp_path)
    batches = count_unet_calls(pipe)
    run(pipe)
    assert batches == [1, 1, 1]


def test_the_configuration_s_scale_holds_where_a_call_names_none(tmp_path: Path, delta: Path) -> None:
    pipe = index_pipeline(tmp_path, {"delta": str(delta), "delta_scale": 0.5})
    run(pipe)
    record = merge_record(pipe.unet)
    assert record is not None and record.scale == 0.5
    run(pipe, delta_scale=np.float32(0.25))
    record = merge_record(pipe.unet)
    assert record is not None and record.scale == 0.25
    run(pipe)
    record = merge_record(pipe.unet)
    assert record is not None and record.scale == 0.5


@pytest.mark.parametrize("scale", ["1", float("nan"), True])
def test_a_scale_that_is_no_number_is_an_error(tmp_path: Path, delta: Path, scale: Any) -> None:
    pipe = make_pipeline()
    with pytest.raises(ValueError, match=rf"delta_scale={scale!r}"):
        run(pipe, delta=delta, delta_scale=scale)
    with pytest.raises(ValueError, match=rf"delta_scale={scale!r}"):
        run(index_pipeline(tmp_path, {"delta": str(delta), "delta_scale": scale}))
    assert merge_records(pipe.unet) == ()


@pytest.mark.parametrize("value", [False, "../delta.safetensors", "delta.safetensors"])
def test_a_configuration_that_names_no_path_beside_it_is_an_error(value: Any) -> None:
    pipe = make_pipeline()
    pipe.update_components(delta=value)
    with pytest.raises(ValueError, match=f"the configuration('s| names) delta={value!r}"):
        run(pipe)


def test_an_index_names_a_variant_in_a_folder(tmp_path: Path, delta: Path) -> None:
    """Where a call names another delta, the variant is not meant for that."""
    folder = tmp_path / "delta"
    folder.mkdir()
    for kind in ("v0-1", "v0-2"):
        (folder / f"diffusion_pytorch_model.{kind}.safetensors").write_bytes(delta.read_bytes())
    pipe = index_pipeline(tmp_path, {"delta": "delta", "delta_variant": "v0-2"})
    run(pipe)
    run(pipe)
    assert len(merge_records(pipe.unet)) == 1
    run(pipe, delta=delta)
    with pytest.raises(ValueError, match="v0-3"):
        run(index_pipeline(tmp_path, {"delta": "delta", "delta_variant": "v0-3"}))


def test_false_asks_for_the_base_model(tmp_path: Path, delta: Path) -> None:
    tiny_sdxl_unet(0).save_pretrained(tmp_path / "unet")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    pipe = index_pipeline(tmp_path, {"delta": str(delta)}, unet=unet)
    before = weights(pipe)
    batches = count_unet_calls(pipe)
    run(pipe, delta=False)
    assert equal(weights(pipe), before)
    assert batches == [2] * 6
    run(pipe)
    assert not equal(weights(pipe), before)
    assert run(pipe, delta=False) is not None
    assert equal(weights(pipe), before) and merge_record(pipe.unet) is None


def test_a_delta_takes_the_place_of_one_that_says_how_to_sample_too(
    tmp_path: Path, delta: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_sdxl_unet(0).save_pretrained(tmp_path / "unet")  # a base that can be read again
    alone, pipe = (
        index_pipeline(tmp_path, {"delta": str(delta)}, unet=UNet2DConditionModel.from_pretrained(tmp_path / "unet"))
        for _ in range(2)
    )
    other = tmp_path / "other.safetensors"
    save_delta({name: torch.full_like(tensor, 0.01) for name, tensor in weights(pipe).items()}, other, OTHER_RECIPE)
    run(alone, delta=other)
    run(pipe)
    state = pipe(prompt="a star", delta=other, output_type="latent")
    assert state.delta_recipe == OTHER_RECIPE and equal(weights(pipe), weights(alone))
    assert "takes the place" not in caplog.text
    run(pipe)
    assert f"{delta}, which the configuration names, takes the place of {other} in the UNet" in caplog.text
    assert [record.source for record in merge_records(pipe.unet)] == [str(delta)]
    run(pipe, delta=other, delta_scale=0.0)
    assert merge_record(pipe.unet) is None


def test_a_delta_that_does_not_fit_leaves_the_other_one_where_it_is(tmp_path: Path, delta: Path) -> None:
    pipe, other = make_pipeline(), tmp_path / "other.safetensors"
    run(pipe, delta=delta)
    merged = weights(pipe)
    save_delta({"conv_in.weight": torch.zeros(2, 2)}, other, OTHER_RECIPE)
    with pytest.raises(ValueError, match="does not fit this UNet2DConditionModel"):
        run(pipe, delta=other)
    assert equal(weights(pipe), merged) and len(merge_records(pipe.unet)) == 1


def test_a_delta_without_a_recipe_is_added_to_what_is_there(tmp_path: Path, delta: Path) -> None:
    pipe, style = make_pipeline(), tmp_path / "style.safetensors"
    run(pipe, delta=delta)
    save_delta({name: torch.full_like(tensor, 0.01) for name, tensor in weights(pipe).items()}, style)
    run(pipe, delta=style)
    assert [Path(record.source).name for record in merge_records(pipe.unet)] == [delta.name, style.name]
    run(pipe, delta=delta)  # still there, and the recipe is its own
    assert len(merge_records(pipe.unet)) == 2 and pipe.guider.guidance_scale == 1.0


def test_a_scale_without_a_delta_is_that_of_the_merged_one(delta: Path) -> None:
    pipe = make_pipeline()
    run(pipe, delta=delta, delta_scale=0.5)
    run(pipe, delta_scale=0.25)
    record = merge_record(pipe.unet)
    assert record is not None and record.scale == 0.25
    run(pipe)
    assert merge_record(pipe.unet) == record
    run(pipe, delta_scale=0.0)
    assert merge_record(pipe.unet) is None
    run(pipe, delta_scale=0.5)  # of nothing


def test_an_index_on_the_hub_names_a_file_beside_it(delta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, str | None]] = []

    def download(repository: str, name: str, revision: str | None) -> str:
        asked.append((repository, name, revision))
        return str(delta)

    monkeypatch.setattr(block, "hf_hub_download", download)
    pipe = make_pipeline()
    pipe._pretrained_model_name_or_path = "owner/model"
    pipe.update_components(delta="d.safetensors")
    assert pipe(prompt="a star", output_type="latent").delta_recipe == RECIPE
    assert asked[-1] == ("owner/model", "d.safetensors", None)

    spec = pipe._component_specs["unet"]
    spec.pretrained_model_name_or_path, spec.revision = "owner/model", "v1"
    run(pipe)
    assert asked[-1] == ("owner/model", "d.safetensors", "v1")


def test_bad_files_are_errors_that_change_nothing(tmp_path: Path, delta: Path) -> None:
    pipe = make_pipeline()
    before = weights(pipe)
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(delta.read_bytes()[:-100])
    other = tmp_path / "other.safetensors"
    save_delta(tiny_sd_unet().state_dict(), other)
    for path, message in [
        (truncated, "complete safetensors file"),
        (other, "does not fit this UNet2DConditionModel"),
        (tmp_path / "missing.safetensors", "does not exist"),
        (True, "delta=True"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(pipe, delta=path)
    assert equal(weights(pipe), before)


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=2.0)),  # as the default's
        lambda pipe: setattr(pipe.guider, "guidance_scale", 2.0 + (pipe.guider.guidance_scale == 2.0)),
    ],
    ids=["new", "attribute"],
)
def test_a_guider_that_the_user_set_wins(delta: Path, change: Any) -> None:
    for merged_before in (False, True):
        pipe = make_pipeline()
        if merged_before:
            run(pipe, delta=delta)
        change(pipe)
        scale = pipe.guider.guidance_scale
        run(pipe, delta=delta)
        assert pipe.guider.guidance_scale == scale >= 2.0


def test_the_index_decides_the_default_guidance_before_the_recipe(tmp_path: Path, delta: Path) -> None:
    pipe = index_pipeline(tmp_path, {"guidance_scale": 1.5})
    run(pipe, delta=delta)
    assert pipe.guider.guidance_scale == 1.5


def test_a_compiled_unet_is_merged_as_the_module_it_wraps(delta: Path) -> None:
    unet = tiny_sdxl_unet(0)
    compiled: Any = torch.compile(unet)
    record = merge_delta(compiled, delta)
    assert merge_record(compiled) is merge_record(unet) is record
    merged = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    again: Any = torch.compile(unet)
    merge_delta(again, delta)
    assert equal(unet.state_dict(), merged)
