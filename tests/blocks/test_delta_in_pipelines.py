"""A merged delta in a pipeline that is offloaded, laid out anew, or saved and loaded again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from huggingface_hub.errors import LocalEntryNotFoundError

from perflow_blocks import PeRFlowSDXLAutoBlocks
from perflow_blocks.delta import apply, files
from perflow_blocks.delta.extract import save_delta
from perflow_blocks.delta.merge import merge_records
from perflow_blocks.delta.recipe import DeltaRecipe
from perflow_blocks.testing.tiny import tiny_sdxl_unet
from tests.conftest import make_pipeline, run

pytestmark = pytest.mark.behaviour


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    base, student = tiny_sdxl_unet(0).state_dict(), tiny_sdxl_unet(1).state_dict()
    path = tmp_path / "delta.safetensors"
    recipe = DeltaRecipe(num_inference_steps=4, guidance_scale=1.0)
    save_delta({name: student[name] - base[name] for name in base}, path, recipe, dtype=torch.float32)
    return path


@pytest.fixture
def rewrites(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every change of a model's weights."""
    made: list[int] = []
    inner = apply.change

    def counted(*args: Any) -> list[str]:
        made.append(1)
        return inner(*args)

    monkeypatch.setattr(apply, "change", counted)
    return made


def test_an_offloaded_pipeline_merges_once(delta: Path, rewrites: list[int]) -> None:
    usual, pipe = make_pipeline(), make_pipeline()
    expected = run(usual, delta=delta)
    rewrites.clear()
    cpu_offload_with_hook(pipe.unet, execution_device="cpu")
    assert torch.equal(run(pipe, delta=delta), expected)
    assert torch.equal(run(pipe, delta=delta), expected)
    assert rewrites == [1]
    assert len(merge_records(pipe.unet)) == 1


def test_weights_that_are_elsewhere_are_refused_before_anything_runs(delta: Path, rewrites: list[int]) -> None:
    pipe = make_pipeline()
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))  # layer by layer
    pipe.text_encoder.register_forward_pre_hook(lambda *_: pytest.fail("an encoder ran"))
    with pytest.raises(ValueError, match=r"offloaded .*; merge before enabling offload"):
        run(pipe, delta=delta)
    assert rewrites == []


def test_a_saved_pipeline_is_not_merged_again(delta: Path, tmp_path: Path, rewrites: list[int]) -> None:
    pipe = make_pipeline()
    expected = run(pipe, delta=delta)
    saved = tmp_path / "saved"
    pipe.save_pretrained(saved)
    rewrites.clear()
    again = PeRFlowSDXLAutoBlocks().init_pipeline(str(saved))
    again.load_components()
    again.set_progress_bar_config(disable=True)
    # Weights in a mapped file begin at other addresses, for which some processors' kernels round differently.
    torch.testing.assert_close(run(again, delta=delta), expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(w, again.unet.state_dict()[name]) for name, w in pipe.unet.state_dict().items())
    assert rewrites == []
    assert [record.reloaded for record in merge_records(again.unet)] == [True]


def test_a_saved_pipeline_whose_index_names_a_delta_is_called_as_it_is(delta: Path, tmp_path: Path) -> None:
    """The delta's file is gone, and the weights were saved with the delta in them."""
    for number, named in enumerate(("delta.safetensors", str(tmp_path / "gone" / "delta.safetensors"))):
        saved = tmp_path / f"saved{number}"
        pipe = make_pipeline()
        pipe.update_components(delta=str(delta))
        expected = run(pipe)
        pipe.update_components(delta=named)
        pipe.save_pretrained(saved)
        again = PeRFlowSDXLAutoBlocks().init_pipeline(str(saved))
        again.load_components()
        again.set_progress_bar_config(disable=True)
        torch.testing.assert_close(run(again), expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="does not exist"):
            run(again, delta_scale=0.5)
        again.unet.load_state_dict(make_pipeline().unet.state_dict())  # now the delta is not in the weights
        with pytest.raises(ValueError, match="does not exist"):
            run(again)


def loaded(folder: Path) -> Any:
    """A pipeline whose parts were loaded from a directory."""
    make_pipeline().save_pretrained(folder)
    pipe = PeRFlowSDXLAutoBlocks().init_pipeline(str(folder))
    pipe.load_components()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def state(pipe: Any) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}


def one_rounding(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings that not all weights come back exactly."""
    return [entry.getMessage() for entry in caplog.records if "exact to one rounding" in entry.getMessage()]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in other)


def test_a_pipelines_base_is_where_its_unet_was_loaded_from(
    delta: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = loaded(tmp_path / "saved")
    before = state(pipe)
    run(pipe, delta=delta)
    run(pipe, delta=delta, delta_scale=0.5)
    run(pipe, delta=False)
    assert same(state(pipe), before) and not one_rounding(caplog)


def test_a_pipeline_may_change_its_type_between_merge_and_way_back(
    delta: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = loaded(tmp_path / "saved")
    before = {name: weight.bfloat16() for name, weight in state(pipe).items()}
    run(pipe, delta=delta)
    pipe.to(torch.bfloat16)
    run(pipe, delta=False)
    assert same(state(pipe), before) and not one_rounding(caplog)


def test_weights_that_were_changed_after_loading_are_named(
    delta: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As by a LoRA that was fused, or training."""
    pipe = loaded(tmp_path / "saved")
    with torch.no_grad():
        pipe.unet.conv_out.bias.add_(1)
    before = state(pipe)
    run(pipe, delta=delta)
    run(pipe, delta=False)
    assert ["1 weights (conv_out.bias)" in warning for warning in one_rounding(caplog)] == [True, True]
    torch.testing.assert_close(pipe.unet.conv_out.bias.detach(), before.pop("conv_out.bias"))
    assert same(state(pipe), before)


@pytest.mark.parametrize("cached", [True, False])
def test_weights_from_the_hub_are_looked_for_in_the_cache_alone(
    delta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def snapshot(repository: str, *, revision: str | None, local_files_only: bool) -> str:
        assert (repository, revision, local_files_only) == ("owner/model", "v1", True)
        if not cached:
            raise LocalEntryNotFoundError("not in the cache")
        return str(tmp_path / "saved")

    monkeypatch.setattr(files, "snapshot_download", snapshot)
    pipe = loaded(tmp_path / "saved")
    pipe.unet._diffusers_load_id = "owner/model|unet|null|v1"
    before = state(pipe)
    run(pipe, delta=delta)
    run(pipe, delta=False)
    assert same(state(pipe), before) == cached
    assert bool(one_rounding(caplog)) != cached


def test_base_weights_that_are_loaded_over_a_merged_unet_are_merged_again(delta: Path) -> None:
    pipe = make_pipeline()
    base = state(pipe)
    expected, merged = run(pipe, delta=delta), state(pipe)
    for assign in (False, True):
        pipe.unet.load_state_dict({name: weight.clone() for name, weight in base.items()}, assign=assign)
        assert torch.equal(run(pipe, delta=delta), expected)
        assert same(state(pipe), merged) and len(merge_records(pipe.unet)) == 1


def test_an_interrupted_merge_is_put_right_by_the_next_call(
    delta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it names the delta or not."""
    pipe = loaded(tmp_path / "saved")
    before, plain = state(pipe), run(pipe, num_inference_steps=2)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "is_finite", interrupted)  # after the first rows are written
        patch.setattr(apply, "restore", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(pipe, delta=delta)
    assert not same(state(pipe), before)
    pipe.update_components(scheduler=None)
    assert torch.equal(run(pipe, num_inference_steps=2), plain)
    assert same(state(pipe), before)


def test_threads_that_make_the_first_call_merge_once(delta: Path, tmp_path: Path) -> None:
    once, shared = loaded(tmp_path / "once"), loaded(tmp_path / "shared")
    run(once, delta=delta)

    def call(number: int) -> None:
        with suppress(Exception):  # threads of one pipeline share more, such as the guider: not looked at here
            run(shared, delta=delta)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(4)))
    assert same(state(shared), state(once))
    assert [record.scale for record in merge_records(shared.unet)] == [1.0]
