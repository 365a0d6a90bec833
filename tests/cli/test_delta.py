"""`perflow extract`, `merge`, `unmerge` and `to-lora` on tiny models: what they write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from perflow_blocks import delta_to_lora, extract_delta, merge_delta
from perflow_blocks.delta.extract import save_delta
from perflow_blocks.delta.files import read_recipe
from perflow_blocks.delta.merge import merge_records
from perflow_blocks.delta.recipe import DeltaRecipe
from perflow_blocks.testing.tiny import tiny_sdxl_components, tiny_sdxl_unet

Run = Callable[..., tuple[int, str, str]]
RECIPE = DeltaRecipe(prediction_type="ddim_eps", num_time_windows=4, num_inference_steps=5, guidance_scale=1.5)
OPTIONS = ["--prediction-type", "ddim_eps", "--windows", 4, "--steps", 5, "--guidance", 1.5]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """UNet folders base, student and other, base-fp16 with a variant; style.safetensors, a delta without recipe."""
    path = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "student", "other")):
        tiny_sdxl_unet(seed).save_pretrained(path / name)
    tiny_sdxl_unet(0).half().save_pretrained(path / "base-fp16", variant="fp16")
    save_delta(extract_delta(tiny_sdxl_unet(2), tiny_sdxl_unet(0)), path / "style.safetensors")
    return path


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("delta") / "delta.safetensors"
    save_delta(extract_delta(tiny_sdxl_unet(1), tiny_sdxl_unet(0)), path, RECIPE, torch.float32)
    return path


def done(run: Run, *arguments: object) -> str:
    status, out, err = run(*arguments)
    assert status == 0, err
    return out


def load(path: Path) -> Any:
    return UNet2DConditionModel.from_pretrained(path)


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_an_extracted_file_is_what_save_delta_writes(run: Run, models: Path, tmp_path: Path, dtype: str) -> None:
    ours, theirs = tmp_path / "new" / "ours.safetensors", tmp_path / "theirs.safetensors"
    out = done(run, "extract", models / "student", models / "base", "-o", ours, "--dtype", dtype, *OPTIONS)
    kind = {"fp16": torch.float16, "bfloat16": torch.bfloat16, "fp32": torch.float32}[dtype]
    difference = extract_delta(tiny_sdxl_unet(1), tiny_sdxl_unet(0))
    changed = {name: tensor for name, tensor in difference.items() if tensor.any()}
    assert f"{len(changed)} tensors ({len(difference) - len(changed)} without a difference left out)" in out
    save_delta(changed, theirs, RECIPE, kind, partial=True)
    one, other = load_file(ours), load_file(theirs)
    assert one.keys() == other.keys()
    assert all(one[name].dtype == kind and torch.equal(one[name], other[name]) for name in other)
    with safe_open(ours, "pt") as a, safe_open(theirs, "pt") as b:
        assert a.metadata() == b.metadata()
    assert str(ours) in out and [file.name for file in ours.parent.iterdir()] == ["ours.safetensors"]


def test_a_variant_of_the_base_is_taken(run: Run, models: Path, tmp_path: Path) -> None:
    half, difference = tmp_path / "half.safetensors", extract_delta(tiny_sdxl_unet(1), tiny_sdxl_unet(0))
    wanted = {name: tensor for name, tensor in difference.items() if tensor.any()}
    done(run, "extract", models / "student", models / "base-fp16", "--base-variant", "fp16", "-o", half)
    assert_close({name: t.float() for name, t in load_file(half).items()}, wanted, 2e-3)


def test_a_delta_without_a_recipe_is_warned_of(run: Run, models: Path, tmp_path: Path) -> None:
    for options, warned in (([], True), (OPTIONS, False), (["--steps", 4], False)):
        path = tmp_path / "delta.safetensors"
        status, _, err = run("extract", models / "student", models / "base", "-o", path, "--force", *options)
        assert status == 0 and ("Warning: " in err and "--prediction-type" in err) is warned


def test_the_bases_noise_schedule_travels_with_the_delta(run: Run, models: Path, tmp_path: Path) -> None:
    pipeline, other, out = tmp_path / "pipeline", tmp_path / "other", tmp_path / "delta.safetensors"
    tiny_sdxl_unet(0).save_pretrained(pipeline / "unet")
    EulerDiscreteScheduler(beta_end=0.013, beta_schedule="linear").save_pretrained(pipeline / "scheduler")
    EulerDiscreteScheduler(beta_end=0.014).save_pretrained(other)
    for base, options, end in (
        (pipeline, [], 0.013),
        (pipeline / "unet", [], 0.013),
        (pipeline, ["--scheduler", other], 0.014),
        (models / "base", [], None),
    ):
        done(run, "extract", models / "student", base, "-o", out, "--force", *options)
        schedule = read_recipe(out).scheduler_config
        assert (schedule and schedule["beta_end"]) == end
        assert schedule is None or "timestep_spacing" not in schedule


def test_a_scheduler_that_is_none_is_named(run: Run, models: Path, tmp_path: Path) -> None:
    out, scheduler = tmp_path / "delta.safetensors", tmp_path / "scheduler"
    scheduler.mkdir()
    arguments = ("extract", models / "student", models / "base", "-o", out, "--scheduler", scheduler)
    status, _, err = run(*arguments)
    assert status == 2 and "holds no scheduler_config.json" in err
    for text in ("{", "[1]", json.dumps({"beta_schedule": "wavy"})):
        (scheduler / "scheduler_config.json").write_text(text)
        status, _, err = run(*arguments)
        assert status == 2 and "schedule" in err
    assert not out.exists()


def test_there_and_back_again(run: Run, models: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.safetensors" for name in ("student", "other")}
    for name, path in files.items():
        done(run, "extract", models / name, models / "base", "-o", path, "--dtype", "fp32", "--steps", 4)
    one, both, back, bare = (tmp_path / name for name in ("one", "both", "back", "bare"))
    done(run, "merge", models / "base", files["student"], "-o", one)
    assert_close(load(one).state_dict(), tiny_sdxl_unet(1).state_dict(), 1e-6)
    out = done(run, "merge", one, files["other"], "-o", both, "--scale", 0.25)
    assert "merged at scale 0.25 beside student.safetensors, whose recipe goes on to count" in out
    records = merge_records(load(both))
    assert [(r.source, r.scale) for r in records] == [("student.safetensors", 1.0), ("other.safetensors", 0.25)]
    assert records[0].recipe.num_inference_steps == 4

    out = done(run, "unmerge", both, files["student"], "-o", back)
    assert "other.safetensors left in it" in out and "by a rounding" in out
    quarter = tiny_sdxl_unet(0)
    merge_delta(quarter, files["other"], 0.25)
    assert_close(load(back).state_dict(), quarter.state_dict(), 1e-6)
    assert [record.source for record in merge_records(load(back))] == ["other.safetensors"]
    assert "left in it" not in done(run, "unmerge", back, files["other"], "-o", bare)
    assert_close(load(bare).state_dict(), tiny_sdxl_unet(0).state_dict(), 1e-6)
    assert merge_records(load(bare)) == ()
    places = {json.loads((folder / "config.json").read_text())["_name_or_path"] for folder in (one, both, back, bare)}
    assert places == {str(models / "base")}  # around which its pipeline lies


def test_a_merge_keeps_the_stored_type_or_takes_another(run: Run, models: Path, delta: Path, tmp_path: Path) -> None:
    arguments = ("merge", models / "base-fp16", delta, "--variant", "fp16")
    done(run, *arguments, "-o", tmp_path / "half")
    done(run, *arguments, "-o", tmp_path / "wide", "--dtype", "fp32")
    for name, kind in (("half", torch.float16), ("wide", torch.float32)):
        tensors = load_file(tmp_path / name / "diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {kind}
        assert_close({n: t.float() for n, t in tensors.items()}, tiny_sdxl_unet(1).state_dict(), 2e-3)


def test_a_merge_finds_its_base(
    run: Run, models: Path, delta: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is the folder the model was loaded from, in whatever type it is merged; no warning says otherwise."""
    done(run, "merge", models / "base", delta, "-o", tmp_path / "merged", "--dtype", "bf16")
    done(run, "merge", tmp_path / "merged", models / "style.safetensors", "-o", tmp_path / "both")
    tiny_sdxl_unet(3).half().save_pretrained(tmp_path / "merged", variant="fp16")
    done(run, "merge", tmp_path / "merged", delta, "-o", tmp_path / "half", "--variant", "fp16")
    assert "one rounding" not in caplog.text


def test_the_unet_of_a_pipeline_is_merged_in_place(run: Run, delta: Path, tmp_path: Path) -> None:
    StableDiffusionXLPipeline(**tiny_sdxl_components()).save_pretrained(tmp_path)
    unet = tmp_path / "unet"
    before = load(unet).state_dict()
    status, _, err = run("merge", tmp_path, delta, "-o", unet)
    assert status == 2 and "--force" in err
    assert_close(load(unet).state_dict(), before, 0.0)
    status, _, err = run("merge", tmp_path, delta, "-o", tmp_path, "--force")
    assert status == 2 and "holds more than a UNet" in err and (tmp_path / "vae").is_dir()
    entries = sorted(entry.name for entry in tmp_path.iterdir())
    done(run, "merge", tmp_path, delta, "-o", unet, "--force")
    expected = tiny_sdxl_components()["unet"]
    merge_delta(expected, delta)
    assert_close(load(unet).state_dict(), expected.state_dict(), 0.0)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == entries


@pytest.mark.parametrize("layout", ["peft", "kohya", "peft --no-keep-embeddings"])
def test_a_lora_and_its_residual_give_the_delta_back(run: Run, delta: Path, tmp_path: Path, layout: str) -> None:
    lora, residual = tmp_path / "lora.safetensors", tmp_path / "residual.safetensors"
    options = ("--rank", 999, "--dtype", "fp32", "--device", "cpu", "--layout", *layout.split())
    out = done(run, "to-lora", delta, "-o", lora, "--residual", residual, *options)
    keep = "--no" not in layout
    report = delta_to_lora(delta, rank=999, dtype=torch.float32, keep_embeddings=keep).report
    assert str(report) in out and str(residual) in out
    pipe = StableDiffusionXLPipeline(**tiny_sdxl_components(), add_watermarker=False)
    pipe.unet = tiny_sdxl_unet(0)
    merge_delta(pipe.unet, residual)
    pipe.load_lora_weights(lora)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert_close(pipe.unet.state_dict(), tiny_sdxl_unet(1).state_dict(), 1e-4)


def test_a_student_that_is_not_finite_or_not_different_leaves_nothing(run: Run, models: Path, tmp_path: Path) -> None:
    state = tiny_sdxl_unet(1).state_dict()
    state["conv_in.bias"][0] = float("inf")
    save_file(state, tmp_path / "broken.safetensors")
    for student, message in ((tmp_path / "broken.safetensors", "conv_in.bias"), (models / "base", "zero in every")):
        out = tmp_path / "out.safetensors"
        status, _, err = run("extract", student, models / "base", "-o", out)
        assert status == 2 and message in err.splitlines()[-1]
        assert sorted(file.name for file in tmp_path.iterdir()) == ["broken.safetensors"]
