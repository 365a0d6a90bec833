"""Blocks that users insert into the loop: callback, window log, previews; how they get in; progress bars."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch import Tensor

from perflow_blocks import (
    LatentToRGB,
    PeRFlowDenoiseStep,
    PeRFlowSDXLAutoBlocks,
    PreviewStep,
    StepCallbackStep,
    StepInfo,
    WindowLogStep,
    insert_loop_block,
)
from perflow_blocks.blocks.denoise import PeRFlowInpaintDenoiseStep
from perflow_blocks.blocks.observers import SDXL_BIAS, SDXL_FACTORS, decode_preview
from perflow_blocks.blocks.recombine import find_loops
from perflow_blocks.testing import check_block, tiny_sdxl_components
from tests.blocks.conftest import (
    Spy,
    blocks_with,
    guard_against_reads,
    loop_inputs,
    loop_pipeline,
    predicted_clean,
    tiny_plan,
)
from tests.conftest import count_unet_calls, generator, make_pipeline, run

pytestmark = pytest.mark.behaviour


def callback_blocks(**place: str) -> PeRFlowSDXLAutoBlocks:
    return blocks_with("callback", StepCallbackStep, **(place or {"after": "solver"}))


def test_the_callback_is_told_where_the_run_is() -> None:
    seen: list[StepInfo] = []
    result = run(make_pipeline(callback_blocks()), num_inference_steps=5, step_callback=seen.append)
    plan = tiny_plan(5)
    assert [info.step for info in seen] == [0, 1, 2, 3, 4]
    for name in ("window_index", "window_start", "window_end", "alpha_start", "alpha_end"):
        assert [getattr(info, name) for info in seen] == list(getattr(plan, name))
    assert [info.timestep for info in seen] == list(plan.timesteps) == [1000, 875, 750, 500, 250]
    assert {info.num_steps for info in seen} == {5}
    assert all(type(info.timestep) is int and type(info.alpha_start) is float for info in seen)
    assert torch.equal(seen[-1].latents, result)
    assert torch.equal(result, run(make_pipeline(), num_inference_steps=5))
    with pytest.raises(dataclasses.FrozenInstanceError):
        seen[0].step = 3


@pytest.mark.parametrize(("step", "order"), [(0, 1), (3, 1), (1, 2)])
def test_a_stopped_run_ends_with_the_clean_latents_it_predicts(step: int, order: int) -> None:
    blocks = blocks_with("spy", Spy, before="solver")
    insert_loop_block(blocks, "callback", StepCallbackStep, after="solver")
    pipe = make_pipeline(blocks)
    pipe.update_components(solver_order=order)
    calls, fed = count_unet_calls(pipe), []
    state = pipe(
        prompt="a red star",
        generator=generator(),
        num_inference_steps=5,
        output_type="latent",
        spy=lambda components, block_state, i: fed.append((block_state.latents, block_state.noise_pred)),
        step_callback=lambda info: info.step == step,
    )
    assert calls == [2] * (step + 1)
    assert state.values["stop_requested"] is True
    assert pipe.guider._step is None  # or the next prompt might be encoded without its negative
    clean = predicted_clean(5, step, *fed[-1])
    torch.testing.assert_close(state.values["images"], clean, rtol=1e-4, atol=1e-4 * clean.abs().max().item())
    pipe.update_components(solver_order=1)
    assert torch.equal(run(pipe, num_inference_steps=5), run(make_pipeline(), num_inference_steps=5))


def test_to_stop_at_the_last_step_is_to_finish() -> None:
    pipe = make_pipeline(callback_blocks())
    inputs = {"prompt": "a red star", "generator": generator(), "num_inference_steps": 5, "output_type": "latent"}
    state = pipe(**inputs, step_callback=lambda info: info.step == 4)
    assert state.values["stop_requested"] is False
    assert torch.equal(state.values["images"], run(make_pipeline(), num_inference_steps=5))


def test_a_stopped_inpainting_keeps_the_known_part() -> None:
    pipe = loop_pipeline("inpainting", callback_blocks())
    state = pipe(
        prompt="a red star",
        generator=generator(),
        output_type="latent",
        step_callback=lambda info: info.step == 1,
        **loop_inputs("inpainting"),
    )
    result, known = state.values["images"], state.values["mask"].expand_as(state.values["images"]) == 0.0
    assert known.any()
    assert not known.all()
    assert torch.equal(result[known], state.values["image_latents"][known])
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("answer", [{}, "yes"])
def test_an_answer_that_is_neither_true_nor_false_is_refused(answer: Any) -> None:
    pipe = make_pipeline(callback_blocks())
    with pytest.raises(ValueError, match=f"returned a value of type {type(answer).__name__}; return True to end"):
        run(pipe, num_inference_steps=4, step_callback=lambda info: answer)


def test_the_window_log_says_where_each_window_begins(caplog: pytest.LogCaptureFixture) -> None:
    pipe = make_pipeline(blocks_with("log", WindowLogStep, before="denoiser"))
    with caplog.at_level(logging.INFO, logger="perflow_blocks.blocks.observers"):
        run(pipe, num_inference_steps=5)
    records = [record for record in caplog.records if record.name == "perflow_blocks.blocks.observers"]
    assert {record.levelno for record in records} == {logging.INFO}
    alphas = torch.cumprod(1.0 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, dim=0)
    a, b, c, d, e = (f"{alphas[index].item():.4g}" for index in (999, 749, 499, 249, 0))
    assert [record.getMessage() for record in records] == [
        f"Step 1 of 5 begins window 0: time 1 to 0.75, abar {a} to {b}.",
        f"Step 3 of 5 begins window 1: time 0.75 to 0.5, abar {b} to {c}.",
        f"Step 4 of 5 begins window 2: time 0.5 to 0.25, abar {c} to {d}.",
        f"Step 5 of 5 begins window 3: time 0.25 to 0, abar {d} to {e}.",
    ]


@pytest.mark.parametrize("workflow", ["text2image", "controlnet_inpainting"])
def test_with_all_blocks_inserted_no_loop_reads_the_device(workflow: str) -> None:
    blocks = blocks_with("preview", PreviewStep, before="solver")
    assert insert_loop_block(blocks, "callback", StepCallbackStep, after="solver") == 4
    assert insert_loop_block(blocks, "log", WindowLogStep(), before="denoiser") == 4
    pipe = loop_pipeline(workflow, blocks)
    guard_against_reads(pipe)
    seen: list[int] = []
    result = run(pipe, **loop_inputs(workflow), step_callback=lambda info: seen.append(info.step))
    assert seen == [0, 1, 2, 3, 4]
    assert torch.equal(result, run(loop_pipeline(workflow), **loop_inputs(workflow)))


def test_a_block_is_inserted_into_every_loop() -> None:
    blocks = PeRFlowSDXLAutoBlocks()
    assert insert_loop_block(blocks, "callback", StepCallbackStep, after="solver") == 4
    assert insert_loop_block(blocks, "log", WindowLogStep(), before="denoiser") == 4
    for loop in find_loops(blocks):
        known = ["keep_known"] if isinstance(loop, PeRFlowInpaintDenoiseStep) else []
        assert list(loop.sub_blocks) == ["finite_guard", "log", "denoiser", "solver", "callback", *known]
    assert "step_callback" in blocks.input_names


@pytest.mark.parametrize(
    ("name", "block", "place", "message"),
    [
        ("log", WindowLogStep, {}, "before=None and after=None"),
        ("log", WindowLogStep, {"before": "solver", "after": "solver"}, "before='solver' and after='solver'"),
        (
            "log",
            WindowLogStep,
            {"after": "keep_known"},
            "the blocks of PeRFlowControlNetDenoiseStep are finite_guard, denoiser, solver, none of them 'keep_known'",
        ),
        ("solver", WindowLogStep, {"before": "denoiser"}, "'solver' is taken"),
        ("loop", PeRFlowDenoiseStep, {"before": "denoiser"}, "cannot be put into a loop"),
    ],
)
def test_a_wrong_insertion_changes_nothing(name: str, block: Any, place: dict[str, str], message: str) -> None:
    blocks = PeRFlowSDXLAutoBlocks()
    before = [list(loop.sub_blocks.items()) for loop in find_loops(blocks)]
    with pytest.raises(ValueError, match=message) as caught:
        insert_loop_block(blocks, name, block, **place)
    assert "\n" not in str(caught.value)
    assert [list(loop.sub_blocks.items()) for loop in find_loops(blocks)] == before


def test_a_progress_bar_is_set_at_any_depth(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = PeRFlowSDXLAutoBlocks()
    core = blocks.sub_blocks["denoise"]
    core.set_progress_bar_config(desc="core")
    loops = list(find_loops(core))
    loops[-1].set_progress_bar_config(desc="loop")  # the plain one
    pipe = blocks.init_pipeline()
    pipe.update_components(**tiny_sdxl_components())
    for workflow, name in (("text2image", "loop"), ("inpainting", "core")):
        run(pipe, **loop_inputs(workflow))
        assert f"{name}:" in capsys.readouterr().err


def test_the_blocks_keep_their_contracts() -> None:
    check_block(WindowLogStep())
    check_block(StepCallbackStep())
    seen: list[StepInfo] = []
    check_block(StepCallbackStep(), inputs={"step_callback": seen.append}, i=3)
    assert check_block(StepCallbackStep(), inputs={"step_callback": lambda info: True}).stop_requested is True
    assert seen[0].window_index == 3


LATENTS = torch.randn(2, 4, 6, 5, generator=generator(3))


def tiny_autoencoder() -> AutoencoderTiny:
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return AutoencoderTiny(**widths, **blocks, upsampling_scaling_factor=2, scaling_factor=2.0).eval()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64)


@pytest.mark.parametrize(("every", "shown"), [(1, [0, 1, 2, 3, 4]), (3, [0, 3])])
def test_every_nth_step_is_shown_from_the_first_on(every: int, shown: list[int]) -> None:
    seen: list[int] = []
    pipe = make_pipeline(blocks_with("preview", PreviewStep, before="solver"))

    def show(i: int, images: list[Image.Image]) -> None:
        seen.append(i)
        assert [(image.mode, image.size) for image in images] == [("RGB", (20, 12))] * 2

    inputs = {"prompt": ["a", "b"], "num_inference_steps": 5, "height": 24, "width": 40}
    previewed = run(pipe, **inputs, preview_callback=show, preview_every=every)
    assert seen == shown
    assert torch.equal(previewed, run(make_pipeline(), **inputs))


def test_a_preview_is_the_prediction_of_the_clean_latents() -> None:
    """Five steps: the second lies inside the first window."""
    shown: list[Image.Image] = []
    seen: list[tuple[Tensor, Tensor]] = []
    blocks = blocks_with("preview", PreviewStep, before="solver")
    insert_loop_block(blocks, "spy", Spy, before="solver")
    run(
        make_pipeline(blocks),
        num_inference_steps=5,
        preview_callback=lambda i, images: shown.extend(images),
        spy=lambda components, state, i: seen.append((state.latents, state.noise_pred)),
    )
    for i, (latents, output) in enumerate(seen):
        clean = predicted_clean(5, i, latents, output)
        red, green, blue = np.einsum("chw,cr->rhw", clean[0].numpy(), np.array(SDXL_FACTORS))
        for channel, colour in enumerate((red, green, blue)):
            expected = 255 * np.clip((colour + SDXL_BIAS[channel]) / 2 + 0.5, 0, 1)
            np.testing.assert_allclose(pixels(shown[i])[..., channel], expected, atol=0.51)
    assert len(shown) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tiny_vae_in_place_of_the_map(dtype: torch.dtype) -> None:
    pipe = make_pipeline(blocks_with("preview", PreviewStep, before="solver"))
    decoder = tiny_autoencoder().to(dtype)
    pipe.register_components(preview_decoder=decoder)
    shown: list[Image.Image] = []
    run(pipe, num_inference_steps=4, preview_callback=lambda i, images: shown.extend(images))
    assert [image.size for image in shown] == [(32, 32)] * 4
    with torch.no_grad():
        sample = decoder.decode((LATENTS / 2.0).to(dtype)).sample.float()
    expected = 255 * (sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    for image, wanted in zip(decode_preview(decoder, LATENTS), expected, strict=True):
        np.testing.assert_allclose(pixels(image), wanted, atol=0.51)


def test_latent_to_rgb_is_a_linear_map_within_its_range() -> None:
    colours = LatentToRGB(factors=[[1, 0, 0], [0, 2, 0]], bias=[0.0, 0.0, -0.5])
    latents = torch.tensor([0.25, 0.125]).reshape(1, 2, 1, 1).half()
    assert colours.decode(latents).sample.flatten().tolist() == [0.25, 0.25, -0.5]
    assert colours.decode(8 * latents).sample.flatten().tolist() == [1.0, 1.0, -0.5]


def test_the_preview_keeps_its_contract() -> None:
    seen: list[int] = []
    check_block(PreviewStep())
    check_block(
        PreviewStep(),
        inputs={"preview_callback": lambda i, images: seen.append(images[0].width)},
        components={"preview_decoder": tiny_autoencoder()},
    )
    assert seen == [32, 32]  # the block is called twice
