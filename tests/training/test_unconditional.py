"""Teachers of pixels, without prompts and VAE: data without captions or none, and a student that the preset draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file

from perflow_blocks import PeRFlowModularPipeline
from perflow_blocks.testing import tiny_unconditional_unet
from perflow_blocks.training.checkpoints import sheet_path
from perflow_blocks.training.config import ConfigError, DataConfig
from perflow_blocks.training.data import open_dataset
from perflow_blocks.training.distillation import distill
from tests.conftest import generator
from tests.training.conftest import losses, make_shards, picture, take, tiny_config

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

NO_DATA: dict[str, Any] = {"data__kind": "prompts", "data__captions": "false", "data__resolution": 16}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "ddpm"
    DDPMPipeline(tiny_unconditional_unet(), DDPMScheduler()).save_pretrained(folder)
    return folder


def images(folder: Path) -> Path:
    folder.mkdir()
    for number in range(6):
        picture(number * 40, (20, 24)).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("starts", ["noised", "trajectory"])
def test_a_student_is_drawn_by_the_preset(starts: str, teacher: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**NO_DATA, "teacher__starts": starts, "teacher__on_policy_share": 0.5}
    if starts == "noised":
        settings |= {"teacher__on_policy_share": 0, "data__kind": "folder", "data__path": images(tmp_path / "images")}
    settings |= {"output__validation_every": 3, "output__validation_prompts": '["", ""]', "optimizer__max_steps": 3}
    run = distill(tiny_config(tmp_path, teacher, output__delta_dtype="float32", **settings))
    assert len(losses(run)) == 3 and sheet_path(run, 3).is_file() and (run / "report.md").is_file()
    assert not any((run / name).exists() for name in ("lora.safetensors", "workflow"))
    student = load_file(run / "student" / "diffusion_pytorch_model.safetensors")
    assert not torch.equal(student["conv_in.weight"], tiny_unconditional_unet().conv_in.weight)
    pipe: Any = PeRFlowModularPipeline.from_pretrained(teacher)
    pipe.load_components()
    call = {"batch_size": 2, "output_type": "pt", "output": "images"}
    drawn = pipe(**call, delta=run / "delta.safetensors", generator=generator())
    assert pipe.scheduler.config.num_time_windows == 4 and pipe.scheduler.config.beta_schedule == "linear"
    pipe.update_components(unet=UNet2DModel.from_pretrained(run / "student"))
    torch.testing.assert_close(pipe(**call, num_inference_steps=4, generator=generator()), drawn, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher__cfg_mode": "fixed"}, "has no guidance; pass sync"),
        ({"model__student": "lora"}, "pass full"),
    ],
)
def test_what_such_models_do_not_have_is_refused(
    settings: dict[str, Any], message: str, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        distill(tiny_config(tmp_path, teacher, **NO_DATA, teacher__starts="trajectory", **settings))


@pytest.mark.parametrize("kind", ["folder", "datasets", "webdataset"])
def test_images_need_no_captions(kind: str, tmp_path: Path) -> None:
    path = make_shards(tmp_path / "shards") if kind == "webdataset" else images(tmp_path / "images")
    config = DataConfig(kind=kind, path=str(path), captions=False, resolution=16, bucketing=False)  # type: ignore[arg-type]
    [batch] = take(open_dataset(config, batch_size=2, seed=0), 1)
    assert batch.pixels is not None and batch.pixels.shape == (2, 3, 16, 16) and batch.prompts == ["", ""]
