"""Teachers and data of other kinds, end to end: a single file, buckets of several shapes, workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline

from perflow_blocks.delta.files import read_recipe
from perflow_blocks.testing.tiny import BETAS, tiny_picture
from perflow_blocks.training.config import ModelConfig
from perflow_blocks.training.loop import Observer, train
from perflow_blocks.training.session import Session
from perflow_blocks.training.teacher_source import open_teacher
from tests.builder.conftest import checkpoint_components, save_checkpoint
from tests.training.conftest import save_teacher, tiny_config

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


class Stops(Exception):
    pass


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [loss for line in lines for loss in json.loads(line)["losses"]]


def test_a_teacher_in_a_single_file_is_that_in_folders(tmp_path: Path) -> None:
    components = checkpoint_components()
    components["scheduler"] = DDIMScheduler(**BETAS, steps_offset=1, clip_sample=False, set_alpha_to_one=False)
    folder = tmp_path / "folders"
    StableDiffusionXLPipeline(**components, add_watermarker=False).save_pretrained(folder)
    file = save_checkpoint(tmp_path / "single.safetensors", components)
    one = open_teacher(ModelConfig(teacher=str(folder)))
    other = open_teacher(ModelConfig(teacher=str(file), config=str(folder)))
    assert other.label == "single" and other.family is one.family
    states = [source.load_unet().state_dict() for source in (one, other)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    pairs = [(source.load_vae(torch.float32), source.load_text_pipeline(torch.float32)) for source in (one, other)]
    assert torch.equal(pairs[0][0].encoder.conv_in.weight, pairs[1][0].encoder.conv_in.weight)
    encoded = [pipe.encode_prompt("a cat", do_classifier_free_guidance=False)[0] for _, pipe in pairs]
    torch.testing.assert_close(encoded[0], encoded[1])
    runs = []
    for name, teacher, extra in (("a", folder, {}), ("b", file, {"model__config": folder})):
        runs.append(train(tiny_config(tmp_path, teacher, name, optimizer__max_steps=2, **extra)))
    assert losses(runs[0].directory) == pytest.approx(losses(runs[1].directory), rel=1e-5)
    assert read_recipe(runs[1].delta).base_model == "single"


def test_pictures_of_several_shapes_with_workers_go_on_exactly(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher", "sdxl")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(12):
        size = [(40, 40), (64, 32), (30, 62)][number % 3]
        tiny_picture(number, size).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"picture {number}")
    (pictures / "broken.png").write_bytes(b"no picture")
    (pictures / "broken.txt").write_text("broken")

    shapes: set[tuple[int, ...]] = set()

    class Looks(Observer):
        def __init__(self, last: int | None = None) -> None:
            self.last = last

        def started(self, session: Session, step: int) -> None:
            pairs: Any = session.pairs
            original = pairs.next

            def following(*arguments: Any) -> Any:
                got = original(*arguments)
                shapes.add(tuple(got.z_start.shape[2:]))
                return got

            object.__setattr__(session.pairs, "next", following)

        def updated(self, session: Session, step: int) -> None:
            if step == self.last:
                raise Stops

    settings: dict[str, Any] = {
        "data__kind": "folder",
        "data__path": pictures,
        "data__max_samples": "null",
        "data__num_workers": 1,
        "data__random_flip": "true",
        "optimizer__max_steps": 8,
    }
    whole = train(tiny_config(tmp_path, teacher, "whole", **settings), [Looks()])
    assert len(shapes) == 3
    with pytest.raises(Stops):
        train(tiny_config(tmp_path, teacher, "broken", **settings), [Looks(5)])
    resumed = train(tiny_config(tmp_path, teacher, "broken", **settings, output__resume="latest"))
    assert losses(resumed.directory) == losses(whole.directory) and len(losses(whole.directory)) == 8
