"""Blocks that users insert into the loop: callback, window log; how they get in; progress bars."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance

from perflow_blocks import (
    PeRFlowSDXLAutoBlocks,
    PreviewStep,
    StepCallbackStep,
    StepInfo,
    WindowLogStep,
    insert_loop_block,
)
from perflow_blocks.blocks import (
    PeRFlowDenoiseStep,
    PeRFlowInpaintDenoiseStep,
)
from perflow_blocks.blocks.recombine import find_loops
from perflow_blocks.testing import check_block, tiny_sdxl_components
from tests.blocks.conftest import (
    LOOP_WORKFLOWS,
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


@pytest.mark.parametrize("step", [0, 3])
def test_a_stopped_run_ends_with_the_clean_latents_it_predicts(step: int) -> None:
    blocks = blocks_with("spy", Spy, before="solver")
    insert_loop_block(blocks, "callback", StepCallbackStep, after="solver")
    pipe = make_pipeline(blocks)
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
    assert torch.equal(run(pipe, num_inference_steps=5), run(make_pipeline(), num_inference_steps=5))


def test_to_stop_at_the_last_step_is_to_finish() -> None:
    pipe = make_pipeline(callback_blocks())
    inputs = {"prompt": "a red star", "generator": generator(), "num_inference_steps": 5, "output_type": "latent"}
    state = pipe(**inputs, step_callback=lambda info: info.step == 4)
    assert state.values["stop_requested"] is False
    assert torch.equal(state.values["images"], run(make_pipeline(), num_inference_steps=5))


def test_a_run_that_is_stopped_under_partial_guidance_leaves_the_next_one_whole() -> None:
    pipe = make_pipeline(callback_blocks(), guider=ClassifierFreeGuidance(guidance_scale=2.0, stop=0.5))
    calls = count_unet_calls(pipe)
    run(pipe, num_inference_steps=4, step_callback=lambda info: info.step == 2)
    run(pipe, num_inference_steps=4)
    assert calls == [2, 2, 1, 2, 2, 1, 1]


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


@pytest.mark.parametrize("workflow", LOOP_WORKFLOWS)
def test_with_all_blocks_inserted_no_loop_reads_the_device(workflow: str) -> None:
    blocks = blocks_with("preview", PreviewStep, before="solver")
    assert insert_loop_block(blocks, "callback", StepCallbackStep, after="solver") == 4
    assert insert_loop_block(blocks, "log", WindowLogStep(), before="denoiser") == 4
    pipe = loop_pipeline(workflow, blocks)
    guard_against_reads(pipe)
    seen: list[int] = []
    result = run(
        pipe, **loop_inputs(workflow), step_callback=lambda info: seen.append(info.step), on_nonfinite="fallback"
    )
    assert seen == [0, 1, 2, 3, 4]
    assert torch.equal(result, run(loop_pipeline(workflow), **loop_inputs(workflow)))


def test_a_preview_is_a_read() -> None:
    """What the test above would find, were there one."""
    pipe = make_pipeline(blocks_with("preview", PreviewStep, before="solver"))
    guard_against_reads(pipe)
    with pytest.raises(AssertionError, match="reads from the device"):
        run(pipe, num_inference_steps=4, preview_callback=lambda i, images: None)


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
