"""The scripts behind the tables of docs/: editing, the delta on a fine-tune, the delta as a LoRA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import demo_deltas, demo_finetune, editing
from benchmarks.demo_finetune import FRAME_WIDTH, render_framed
from perflow_blocks.demo import perflow_pipeline, teacher_pipeline
from perflow_blocks.demo.images import COLORS, Prompt, Scene, render, render_images
from perflow_blocks.demo.judge import load_classifier, make_demo_set


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipeline = perflow_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_every_table_of_editing_finds_its_edits_and_nothing_outside_a_hole_changes(pipe: Any) -> None:
    data = editing.make_editing_set(2)
    planned = editing.planned_edits()
    assert len(planned) == len(set(planned)) and len(editing.noising_pairs()) == 15
    (kept,) = editing.evaluate_edits(pipe, data, [editing.Edit(wording="both", hole="tight", strength=1.0)]).values()
    assert kept.known is not None and kept.steps == 4 and float(kept.difference.min()) > 1.0
    assert int(kept.known[0].sum()) == int(kept.known[2].sum()) == 0
    plain = editing.measure_floors(pipe.vae, data)["decoded"]
    outcomes = {edit: replace(kept, latent_distance=plain.psnr, noise_to_signal=0.5) for edit in planned}
    assert len(editing.noising_table(outcomes).splitlines()) == 2 + 15
    assert len(editing.hole_table(outcomes, data).splitlines()) == 2 + 9
    assert len(editing.strength_table(outcomes, {"decoded": plain}).splitlines()) == 2 + 5
    assert len(editing.known_table(outcomes, data).splitlines()) == 2 + 3


def test_inside_a_window_the_chord_recovers_more(pipe: Any) -> None:
    chord = editing.Edit(strength=0.6)
    marginal = replace(chord, noising="marginal")
    found = editing.evaluate_edits(pipe, editing.make_editing_set(16), [chord, marginal])
    gain = found[chord].psnr - found[marginal].psnr
    assert float((gain > 0).float().mean()) > 0.7


def test_a_framed_image_is_that_of_the_base_inside_its_frame() -> None:
    scene = Scene(shape="star", color="green", background="white", size="big", position="on the left")
    framed, plain = (np.asarray(draw(scene, np.random.default_rng(1)), dtype=int) for draw in (render_framed, render))
    inside = np.s_[FRAME_WIDTH:-FRAME_WIDTH, FRAME_WIDTH:-FRAME_WIDTH]
    assert (framed[inside] == plain[inside]).all()
    frame = np.ones(framed.shape[:2], bool)
    frame[inside] = False
    assert np.abs(framed[frame] - COLORS["green"]).max() <= 10


def test_a_frame_must_be_there_in_the_shape_s_colour() -> None:
    framed, plain = (render_images(48, seed=8, workers=1, **more) for more in ({"renderer": render_framed}, {}))
    prompts = [Prompt(scene.shape) for scene in framed.scenes]
    pixels = framed.pixels / 255.0
    accurate, strict = demo_deltas.judge_framed(pixels, prompts, load_classifier())
    assert sum(accurate) >= 46 and sum(strict) >= 46
    assert not any(demo_deltas.judge_framed(plain.pixels / 255.0, prompts, load_classifier())[0])
    blue = (torch.tensor(COLORS["blue"]) / 255.0)[:, None, None].expand_as(pixels).clone()
    inside = (..., slice(FRAME_WIDTH, -FRAME_WIDTH), slice(FRAME_WIDTH, -FRAME_WIDTH))
    blue[inside] = pixels[inside]
    accurate, _ = demo_deltas.judge_framed(blue, prompts, load_classifier())
    assert accurate == [scene.color == "blue" for scene in framed.scenes]


def test_finetuning_trains_the_unet_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    framed = render_images(4, seed=8, renderer=render_framed, workers=1)
    demo_finetune.finetune(framed, tmp_path, 2.0, batch_size=2)
    base = teacher_pipeline().unet.state_dict()
    tuned = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert base.keys() == tuned.keys() and not torch.equal(tuned["conv_out.weight"], base["conv_out.weight"])
    monkeypatch.setattr(demo_finetune, "render_images", None)  # not called: it is finished
    demo_finetune.main(tmp_path, 3)


def test_the_fine_tune_is_drawn_with_and_without_the_delta(tmp_path: Path) -> None:
    unet = teacher_pipeline().unet
    with torch.no_grad():
        unet.conv_out.weight.mul_(1.05)
    unet.save_pretrained(tmp_path / "unet")
    samplers = demo_deltas.finetune_samplers(tmp_path)
    assert [(one.model, one.nfe) for one in samplers] == [
        ("base", 100),
        ("base + delta", 4),
        ("fine-tune", 100),
        *(("fine-tune", nfe) for nfe in (8, 8, 4, 4, 4, 4)),
        *(("fine-tune + delta", steps) for steps in (4, 6, 8)),
    ]
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    drawn = [samplers[number].draw(["a star"], latents) for number in (1, 7, 9)]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (drawn[first] - drawn[second]).abs().max() > 1e-3


def test_a_lora_of_full_rank_is_the_delta(tmp_path: Path) -> None:
    text = demo_deltas.lora_report([128], make_demo_set(2, references=32))
    rows = [line.split(" | ") for line in text.split("\n\n")[0].splitlines()[2:]]
    effects = [float(row[-1].rstrip(" |")) for row in rows]
    assert len(effects) == 5 and effects[0] == 0.0 and effects[-1] == 1.0
    assert effects[1] < 5e-3 < effects[2] < effects[3]
