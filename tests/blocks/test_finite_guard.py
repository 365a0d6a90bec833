"""Latents that are not finite: an error that names the images, or all steps again in float32, weights put back."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance
from torch import Tensor, nn

from perflow_blocks import FiniteGuardStep
from perflow_blocks.blocks import ControlNetFiniteGuardStep
from perflow_blocks.blocks.finite_guard import can_be_float32, in_float32
from perflow_blocks.testing import check_block
from tests.blocks.conftest import (
    EMBEDS,
    Spy,
    blocks_with,
    guard_against_reads,
    loop_inputs,
    loop_pipeline,
    make_float16_overflow,
    poison,
)
from tests.conftest import count_unet_calls, generator, run

HALF = (torch.float16, torch.bfloat16)


def complaint(pipe: Any, **inputs: Any) -> str:
    with pytest.raises(ValueError, match="not finite") as caught:
        run(pipe, **{"num_inference_steps": 5, **inputs})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]), name


@pytest.mark.behaviour
def test_type_and_images_are_named_after_one_run_without_a_read_in_the_loop() -> None:
    pipe = loop_pipeline("text2image")
    poison(pipe.unet, 500, image=0)
    poison(pipe.unet, 750, image=2)
    calls = count_unet_calls(pipe)
    guard_against_reads(pipe)
    text = complaint(pipe, prompt=["a", "b", "c"])
    assert "not finite in torch.float32 for images[0], images[2] of 3;" in text
    assert "check the delta, the LoRAs and the latents that you passed" in text
    assert "load the pipeline" not in text  # there is nothing wider
    assert calls == [6] * 5


@pytest.mark.behaviour
def test_latents_that_are_broken_from_the_start_are_told_apart() -> None:
    pipe = loop_pipeline("text2image")
    latents = torch.zeros(2, 4, 16, 16)
    latents[1, 3, 0, 5] = float("nan")
    for policy in ("raise", "fallback"):
        text = complaint(pipe, prompt=["a", "b"], latents=latents, on_nonfinite=policy)
        assert "not finite in torch.float32 for images[1] of 2, as is what they were computed from" in text


@pytest.mark.behaviour
def test_an_overflowing_model_is_run_again_in_float32(caplog: pytest.LogCaptureFixture) -> None:
    pipe = loop_pipeline("text2image", dtype=torch.float16)
    make_float16_overflow(pipe.unet)
    assert 'dtype=torch.bfloat16 or torch.float32, or pass on_nonfinite="fallback"' in complaint(pipe)
    before, calls = weights(pipe.unet), count_unet_calls(pipe)
    guard_against_reads(pipe)
    with caplog.at_level(logging.WARNING, logger="perflow_blocks"):
        inputs = {"num_inference_steps": 5, "output_type": "latent"}
        state = pipe(prompt="a red star", generator=generator(), on_nonfinite="fallback", **inputs)
    assert calls == [2] * 10
    assert_same(pipe.unet, before)
    warnings = [entry.getMessage() for entry in caplog.records if entry.name.endswith("finite_guard")]
    assert len(warnings) == 1
    assert "not finite in torch.float16 for images[0] of 1; all steps were run again in float32" in warnings[0]

    reference = loop_pipeline("text2image", unet=copy.deepcopy(pipe.unet))
    latents = torch.randn(1, 4, 16, 16, generator=generator(), dtype=torch.float16).float()
    embeds = {name: state.values[name].float() for name in EMBEDS}
    expected = run(reference, prompt=None, latents=latents, **embeds, num_inference_steps=5)
    result = state.values["images"]
    assert result.dtype == torch.float16
    assert torch.equal(result, expected.half())
    assert all(state.values[name].dtype == torch.float16 for name in EMBEDS)


def assert_near(result: Tensor, clean: Tensor, share: float = 0.03) -> None:
    """Equal but for half precision."""
    assert torch.isfinite(result).all()
    assert (result.float() - clean.float()).norm() < share * clean.float().norm()


@pytest.mark.behaviour
def test_a_theta_at_fault_is_left_out_of_the_second_run(caplog: pytest.LogCaptureFixture) -> None:
    huge = [[0.0, 0.0], [1e39, 0.0], [0.0, 0.0], [0.0, 0.0]]
    pipe, plain = loop_pipeline("text2image"), loop_pipeline("text2image")
    pipe.update_components(theta=huge)
    calls = count_unet_calls(pipe)
    assert "not finite" in complaint(pipe)
    result = run(pipe, num_inference_steps=5, on_nonfinite="fallback")
    assert calls == [2] * 15 and torch.equal(result, run(plain, num_inference_steps=5))
    assert "without the scheduler's theta" in caplog.text


@pytest.mark.behaviour
def test_blocks_that_write_into_the_latents_do_so_once() -> None:
    def halve(components: Any, block_state: Any, i: int) -> None:
        if i in (0, 2):  # step 0 writes into the latents that the run starts with
            block_state.latents.mul_(0.5)

    pipe = loop_pipeline("text2image", blocks_with("spy", Spy, before="denoiser"), dtype=torch.bfloat16)
    clean = run(pipe, num_inference_steps=5, spy=halve)
    poison(pipe.unet, 750, dtypes=HALF)
    assert_near(run(pipe, num_inference_steps=5, spy=halve, on_nonfinite="fallback"), clean)


@pytest.mark.behaviour
@pytest.mark.parametrize("workflow", ["text2image", "controlnet_inpainting"])
def test_every_loop_can_fall_back(workflow: str) -> None:
    pipe = loop_pipeline(workflow, dtype=torch.bfloat16)
    clean = run(pipe, **loop_inputs(workflow))
    poison(pipe.unet, 500, dtypes=HALF)
    result = run(pipe, **loop_inputs(workflow), on_nonfinite="fallback")
    assert_near(result, clean)
    if workflow == "controlnet_inpainting":
        assert torch.equal(result[..., :8], clean[..., :8])  # the known part, to the last bit


@pytest.mark.behaviour
def test_an_overflowing_controlnet_is_made_float32_too() -> None:
    pipe = loop_pipeline("controlnet_text2image", dtype=torch.float16)
    clean = run(pipe, **loop_inputs("controlnet_text2image"))
    make_float16_overflow(pipe.controlnet)
    before = weights(pipe.controlnet)
    inputs = loop_inputs("controlnet_text2image")
    assert "not finite in torch.float16" in complaint(pipe, **inputs)
    assert_near(run(pipe, **inputs, on_nonfinite="fallback"), clean)
    assert_same(pipe.controlnet, before)


@pytest.mark.behaviour
def test_where_float32_does_not_help_the_error_says_so() -> None:
    pipe = loop_pipeline("text2image", dtype=torch.float16)
    poison(pipe.unet, 500)
    before = weights(pipe.unet)
    text = complaint(pipe, on_nonfinite="fallback")
    assert "not finite in torch.float16 for images[0] of 1, nor are they in torch.float32;" in text
    assert_same(pipe.unet, before)
    pipe.unet.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    text = complaint(pipe, on_nonfinite="fallback")
    assert "offloaded" in text and "cannot be made float32; load the pipeline with" in text


@pytest.mark.behaviour
def test_autocast_counts_as_half_precision_and_is_left_for_the_fallback() -> None:
    pipe = loop_pipeline("text2image")
    make_float16_overflow(pipe.unet)
    start = {"latents": torch.randn(1, 4, 16, 16, generator=generator()), "num_inference_steps": 5}
    with torch.autocast("cpu", dtype=torch.float16):
        text = complaint(pipe, **start)
        result = run(pipe, **start, on_nonfinite="fallback")
    assert "not finite in torch.float16" in text
    assert "run the pipeline outside torch.autocast" in text
    assert_near(result, run(pipe, **start), share=1e-3)


def test_in_float32_puts_back_what_did_not_change_and_casts_what_did() -> None:
    model = nn.Linear(2, 2).half()
    model.register_buffer("table", torch.ones(2))
    before = weights(model)
    mask, table = torch.ones(2, dtype=torch.float16), torch.ones(3)
    given: dict[str, Any] = {"latents": mask.clone(), "nested": {"masks": [mask, 1]}, "pair": (mask,), "table": table}
    values = dict(given)
    with pytest.raises(KeyError), in_float32([model], values, mask.device):
        assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
        assert values["nested"]["masks"][0].dtype == values["pair"][0].dtype == torch.float32
        assert values["table"] is table
        values["latents"] = values["latents"] * 2
        raise KeyError
    assert_same(model, before)
    assert values["nested"] is given["nested"]
    assert values["pair"] is given["pair"]
    assert values["latents"].dtype == torch.float16
    assert values["latents"].tolist() == [2.0, 2.0]
    assert mask.dtype == torch.float16


def test_offloaded_and_quantized_weights_cannot_be_made_float32() -> None:
    assert can_be_float32([nn.Linear(2, 2).half(), nn.Linear(2, 2)])
    assert not can_be_float32([nn.Linear(2, 2), nn.Linear(2, 2, device="meta")])
    for dtype in (torch.float8_e4m3fn, torch.uint8):
        packed = nn.Linear(2, 2)
        packed.weight = nn.Parameter(packed.weight.data.to(dtype), requires_grad=False)
        assert not can_be_float32([packed])


def test_the_guards_keep_their_contract() -> None:
    guider = ClassifierFreeGuidance(guidance_scale=2.0)
    for guard in (FiniteGuardStep(), ControlNetFiniteGuardStep()):
        check_block(guard, inputs={"on_nonfinite": "fallback"}, components={"guider": guider}, i=2)
