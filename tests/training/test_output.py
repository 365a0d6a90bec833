"""What a distillation leaves for its users: LoRA forms that are the student, a workflow that draws as it does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from perflow_blocks import PeRFlowScheduler, merge_delta
from perflow_blocks.hub.publishable import require_publishable
from perflow_blocks.training import output
from perflow_blocks.training.config import DistillConfig
from perflow_blocks.training.loop import train
from perflow_blocks.training.output import Outputs, write_outputs
from perflow_blocks.training.result import TrainingResult
from perflow_blocks.training.teacher_source import TeacherSource, open_teacher
from tests.hub.conftest import index_of, loaded, use_own_modules
from tests.training.conftest import tiny_config

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

Trained = tuple[DistillConfig, TrainingResult, Outputs]
FLOAT32: dict[str, Any] = {
    "output__delta_dtype": "float32",
    "optimizer__learning_rate": 0.01,
    "optimizer__max_steps": 3,
}


@pytest.fixture(scope="module")
def full(teachers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A student with all weights, its LoRA of full rank."""
    folder = tmp_path_factory.mktemp("full")
    config = tiny_config(folder, teachers["sdxl"], model__lora_rank=1000, teacher__cfg_mode="fixed", **FLOAT32)
    result = train(config)
    return config, result, write_outputs(config, result)


@pytest.fixture(scope="module")
def lora(teachers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("lora")
    settings: dict[str, Any] = {"model__student": "lora", "model__lora_rank": 3, **FLOAT32}
    config = tiny_config(folder, teachers["sd"], **settings)
    result = train(config)
    return config, result, write_outputs(config, result)


def teacher_unet(teachers: dict[str, Path], family: str) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(teachers[family], subfolder="unet")


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max((one[name] - tensor).abs().max().item() for name, tensor in other.items())


@pytest.mark.parametrize("form", ["lora", "lora_kohya"])
def test_lora_and_residual_are_the_student(form: str, full: Trained, teachers: dict[str, Path]) -> None:
    _, result, outputs = full
    assert outputs.lora_residual is not None and result.student is not None
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(teachers["sdxl"], add_watermarker=False)
    base = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    merge_delta(pipe.unet, outputs.lora_residual)
    pipe.load_lora_weights(str(getattr(outputs, form)))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    wanted = load_file(result.student / "diffusion_pytorch_model.safetensors")
    assert difference(pipe.unet.state_dict(), wanted) < 1e-4 < 1e-3 < difference(base, wanted)


def test_the_rank_is_that_of_the_configuration(teachers: dict[str, Path], full: Trained, tmp_path: Path) -> None:
    config, result, _ = full
    low = config.changed({"model.lora_rank": 2, "output.workflow": False})
    outputs = write_outputs(low, replace(result, directory=tmp_path))
    ranks = {len(tensor) for name, tensor in load_file(outputs.lora).items() if ".lora_A." in name}
    assert max(ranks) == 2 and "rank 2 to 2" in outputs.lora_summary
    with safe_open(outputs.lora_kohya, "pt") as opened:
        assert opened.metadata()["perflow.guidance_scale"] == "1.0"


def test_a_lora_student_gets_the_other_form(lora: Trained, teachers: dict[str, Path]) -> None:
    _, result, outputs = lora
    assert outputs.lora == result.lora and outputs.lora_residual is None and outputs.workflow is None
    by_delta, by_kohya = teacher_unet(teachers, "sd"), teacher_unet(teachers, "sd")
    base = {name: tensor.clone() for name, tensor in by_delta.state_dict().items()}
    record = merge_delta(by_delta, result.delta)
    for file in (outputs.lora, outputs.lora_kohya):
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["perflow_delta"] == record.digest
    names = load_file(outputs.lora_kohya)
    assert all(name.startswith("lora_unet_") for name in names)
    pipe: Any = StableDiffusionPipeline.from_pretrained(teachers["sd"], unet=by_kohya)
    pipe.load_lora_weights(str(outputs.lora_kohya))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert difference(pipe.unet.state_dict(), by_delta.state_dict()) < 1e-4 < difference(base, by_delta.state_dict())


def test_the_workflow_draws_as_the_student_does(
    full: Trained, teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_own_modules(tmp_path / "modules", monkeypatch)
    _, result, outputs = full
    assert outputs.workflow is not None and result.student is not None
    manifest = require_publishable(outputs.workflow)
    assert manifest.mode == "thin" and "delta/perflow_delta.safetensors" in manifest.files
    pipe = loaded(outputs.workflow)
    plain: Any = StableDiffusionXLPipeline.from_pretrained(
        teachers["sdxl"], unet=UNet2DConditionModel.from_pretrained(result.student), add_watermarker=False
    )
    plain.scheduler = PeRFlowScheduler.from_pretrained(result.scheduler)
    plain.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    arguments = {"prompt": "a red star", "height": 32, "width": 32, "output_type": "pt"}
    drawn = pipe(**arguments, latents=noise, output="images")  # steps and guidance are the recipe's
    wanted = plain(**arguments, latents=noise, num_inference_steps=4, guidance_scale=1.0).images
    torch.testing.assert_close(drawn, wanted, rtol=0, atol=1e-3)
    card = (outputs.workflow / "README.md").read_text()
    assert "3 updates of all weights, 4 windows with 2 teacher steps each, the teacher's guidance of 7.5" in card


def test_a_teacher_of_the_hub_is_referred_to(
    full: Trained, teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, result, _ = full
    source = open_teacher(config.model)

    def on_hub(model: object) -> TeacherSource:
        return replace(source, label="owner/model", location="owner/model", revision="abc", variant="fp16")

    monkeypatch.setattr(output, "open_teacher", on_hub)
    monkeypatch.setattr(TeacherSource, "pipeline_settings", lambda self: {"force_zeros_for_empty_prompt": False})
    monkeypatch.chdir(tmp_path)
    outputs = write_outputs(config, replace(result, directory=tmp_path / "hub"))
    assert outputs.workflow is not None
    manifest = require_publishable(outputs.workflow)
    weights = [name for name in manifest.files if name.endswith(".safetensors")]
    assert weights == ["delta/perflow_delta.safetensors"]
    index = index_of(outputs.workflow)
    for name, variant in [("unet", "fp16"), ("vae", "fp16"), ("text_encoder_2", "fp16"), ("tokenizer", None)]:
        details = index[name][2]
        assert details["pretrained_model_name_or_path"] == "owner/model" and details["subfolder"] == name
        assert details["revision"] == "abc" and details["variant"] == variant
    assert index["scheduler"][1] == "DDIMScheduler"
    assert index["force_zeros_for_empty_prompt"] is False and index["delta"] == "delta/perflow_delta.safetensors"


def test_writing_again_replaces_what_was_there(full: Trained) -> None:
    config, result, outputs = full
    assert outputs.workflow is not None and outputs.lora_residual is not None
    before = json.loads((outputs.workflow / "perflow_manifest.json").read_text())
    again = write_outputs(config, result)
    assert again == outputs
    assert json.loads((outputs.workflow / "perflow_manifest.json").read_text())["files"] == before["files"]
    assert not list(result.directory.glob(".*"))
