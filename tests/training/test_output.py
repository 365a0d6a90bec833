"""What a distillation leaves: LoRA forms that are the student, a workflow that draws as it does, and a report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.modular_pipelines import ModularPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from perflow_blocks import PeRFlowScheduler, load_workflow, merge_delta, push_workflow
from perflow_blocks.training import distillation, output
from perflow_blocks.training.checkpoints import sheet_path
from perflow_blocks.training.config import DistillConfig
from perflow_blocks.training.distillation import distill, write_report
from perflow_blocks.training.loop import train
from perflow_blocks.training.output import write_outputs
from perflow_blocks.training.teacher import TeacherSource, open_teacher
from tests.conftest import index_of, load
from tests.training.conftest import tiny_config

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

FLOAT32: dict[str, Any] = {
    "output__delta_dtype": "float32",
    "optimizer__learning_rate": 0.01,
    "optimizer__max_steps": 3,
}


@pytest.fixture(scope="module")
def full(teachers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> DistillConfig:
    """A student with all weights, its LoRA of full rank."""
    folder = tmp_path_factory.mktemp("full")
    config = tiny_config(folder, teachers["sdxl"], model__lora_rank=1000, teacher__cfg_mode="fixed", **FLOAT32)
    train(config)
    write_outputs(config)
    return config


def folder_of(config: DistillConfig) -> Path:
    return Path(config.output.directory)


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max((one[name] - tensor).abs().max().item() for name, tensor in other.items())


@pytest.mark.parametrize("form", ["lora", "lora_kohya"])
def test_lora_and_residual_are_the_student(form: str, full: DistillConfig, teachers: dict[str, Path]) -> None:
    folder = folder_of(full)
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(teachers["sdxl"], add_watermarker=False)
    base = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    merge_delta(pipe.unet, folder / "lora_residual.safetensors")
    pipe.load_lora_weights(str(folder / f"{form}.safetensors"))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    wanted = load_file(folder / "student" / "diffusion_pytorch_model.safetensors")
    assert difference(pipe.unet.state_dict(), wanted) < 1e-4 < 1e-3 < difference(base, wanted)


def test_a_lora_student_gets_the_other_form(teachers: dict[str, Path], tmp_path: Path, own_modules: None) -> None:
    config = tiny_config(tmp_path, teachers["sd"], model__student="lora", model__lora_rank=3, **FLOAT32)
    train(config)
    assert write_outputs(config) == "The student is this LoRA."
    folder = folder_of(config)
    assert not (folder / "lora_residual.safetensors").exists()
    workflow = load_workflow(folder / "workflow", trust_remote_code=True)
    assert type(workflow.blocks).__name__ == "PeRFlowSDAutoBlocks"
    assert workflow("a star", output_type="latent").images.isfinite().all()
    by_delta, by_kohya = (UNet2DConditionModel.from_pretrained(teachers["sd"], subfolder="unet") for _ in range(2))
    base = {name: tensor.clone() for name, tensor in by_delta.state_dict().items()}
    record = merge_delta(by_delta, folder / "delta.safetensors")
    for name in ("lora", "lora_kohya"):
        with safe_open(folder / f"{name}.safetensors", "pt") as opened:
            assert opened.metadata()["perflow_delta"] == record.digest
    pipe: Any = StableDiffusionPipeline.from_pretrained(teachers["sd"], unet=by_kohya)
    pipe.load_lora_weights(str(folder / "lora_kohya.safetensors"))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert difference(pipe.unet.state_dict(), by_delta.state_dict()) < 1e-4 < difference(base, by_delta.state_dict())


def test_the_workflow_draws_as_the_student_does(
    full: DistillConfig, teachers: dict[str, Path], own_modules: None
) -> None:
    folder = folder_of(full)
    assert "delta/delta.safetensors" in push_workflow(folder / "workflow", "me/flow", dry_run=True).files
    pipe = load(folder / "workflow")
    plain: Any = StableDiffusionXLPipeline.from_pretrained(
        teachers["sdxl"], unet=UNet2DConditionModel.from_pretrained(folder / "student"), add_watermarker=False
    )
    plain.scheduler = PeRFlowScheduler.from_pretrained(folder / "scheduler")
    plain.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    arguments = {"prompt": "a red star", "height": 32, "width": 32, "output_type": "pt"}
    drawn = pipe(**arguments, latents=noise, output="images")  # steps and guidance are the recipe's
    wanted = plain(**arguments, latents=noise, num_inference_steps=4, guidance_scale=1.0).images
    torch.testing.assert_close(drawn, wanted, rtol=0, atol=1e-3)
    card = (folder / "workflow" / "README.md").read_text()
    assert "3 updates of all weights, 4 windows with 2 teacher steps each, the teacher's guidance of 7.5" in card


def test_a_teacher_of_the_hub_is_referred_to(full: DistillConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model = full.model.model_copy(update={"revision": "abc", "variant": "fp16"})
    source = replace(open_teacher(full.model), label="x", location="owner/model", model=model)
    model_index = json.loads((Path(full.model.teacher) / "model_index.json").read_text())
    index_on_hub = {**model_index, "force_zeros_for_empty_prompt": False}
    monkeypatch.setattr(ModularPipeline, "_load_pipeline_config", lambda *a, **k: (None, index_on_hub))
    monkeypatch.setattr(TeacherSource, "on_hub", True)
    output._export(full, folder_of(full), source)
    workflow = folder_of(full) / "workflow"
    files = push_workflow(workflow, "me/flow", dry_run=True).files
    weights = [name for name in files if name.endswith(".safetensors")]
    assert weights == ["delta/delta.safetensors"]
    index = index_of(workflow)
    for name, variant in [("unet", "fp16"), ("vae", "fp16"), ("text_encoder_2", "fp16"), ("tokenizer", None)]:
        details = index[name][2]
        assert details["pretrained_model_name_or_path"] == "owner/model" and details["subfolder"] == name
        assert details["revision"] == "abc" and details["variant"] == variant
    assert index["force_zeros_for_empty_prompt"] is False and index["delta"] == "delta/delta.safetensors"


def metrics(step: int, loss: float, windows: list[float | None]) -> dict[str, Any]:
    return {"step": step, "losses": [loss, loss], "window_losses": windows}


@pytest.fixture
def finished(tmp_path: Path) -> DistillConfig:
    """A training of three readings and six sheets, as it would have written them."""
    config = tiny_config(tmp_path, "demo")
    folder = folder_of(config)
    folder.mkdir()
    lines = [metrics(2, 0.8, [1.0, None]), metrics(4, 0.4, [0.5, 0.25]), metrics(6, 0.2, [0.3, 0.125])]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"half')
    seen = [{"step": step, "endpoint_error": [1.0 / step, 0.5]} for step in (1, 6)]
    (folder / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in seen))
    (folder / "delta.safetensors").touch()
    for step in range(6):
        path = sheet_path(folder, step)
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    return config


def test_the_report_holds_what_was_written_down(finished: DistillConfig) -> None:
    path = write_report(finished, "What the LoRA keeps.")
    text = path.read_text()
    assert path.name == "report.md" and text.startswith("# Distillation of demo\n")
    assert "| window 1 | 1 | 0.3 |" in text and "| window 2 | 0.25 | 0.125 |" in text  # a reading may lack one
    assert "| window 1 | 1 | 0.1667 |" in text and "| window 2 | 0.5 | 0.5 |" in text
    assert "What the LoRA keeps." in text
    assert "`delta.safetensors`" in text and "`student`" not in text and '"max_steps": 6' in text
    shown = [line for line in text.splitlines() if "](validation/" in line]
    assert len(shown) == 6 and "step_00000000" in shown[0] and "step_00000005" in shown[-1]
    links = {part.split(")")[0] for part in text.split("](")[1:]}
    assert all((path.parent / link).is_file() for link in links)
    plots = {Path(link).stem for link in links if link.startswith("plots/")}
    assert plots == {"loss", "endpoint_error"}


def test_the_report_does_without_plots_and_validation(
    finished: DistillConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder_of(finished) / "validation.jsonl").unlink()
    monkeypatch.setattr(distillation, "find_spec", lambda name: None)
    text = write_report(finished).read_text()
    assert "plots/" not in text and "## Endpoint error" not in text and "| window 1 | 1 | 0.3 |" in text


def test_damaged_readings_are_named(finished: DistillConfig) -> None:
    (folder_of(finished) / "metrics.jsonl").write_text('{"step": 6}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl or validation.jsonl in .* is damaged"):
        write_report(finished)


def test_a_report_is_written_even_where_an_output_fails(
    finished: DistillConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise ValueError("the disk is full")

    monkeypatch.setattr(distillation, "require_possible", lambda *arguments: None)
    monkeypatch.setattr(distillation, "train", lambda *arguments: None)
    monkeypatch.setattr(distillation, "write_outputs", fail)
    with pytest.raises(ValueError, match="the disk is full"):
        distill(finished)
    assert "| window 1 | 1 | 0.3 |" in (folder_of(finished) / "report.md").read_text()
