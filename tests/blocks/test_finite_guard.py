"""Latents that are not finite: an error that names the images, or all steps again, without theta or in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from perflow_blocks import FiniteGuardStep
from perflow_blocks.testing import check_block
from tests.blocks.conftest import guard_against_reads, loop_inputs, loop_pipeline, make_float16_overflow, poison
from tests.conftest import count_unet_calls, run


def complaint(pipe: Any, **inputs: Any) -> str:
    with pytest.raises(ValueError, match="not finite") as caught:
        run(pipe, **{"num_inference_steps": 5, **inputs})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.behaviour
def test_type_and_images_are_named_after_one_run_without_a_read_in_the_loop() -> None:
    pipe = loop_pipeline("text2image")
    poison(pipe.unet, 500, image=0)
    poison(pipe.unet, 750, image=2)
    calls = count_unet_calls(pipe)
    guard_against_reads(pipe)
    text = complaint(pipe, prompt=["a", "b", "c"])
    assert "not finite in torch.float32 for images[0], images[2] of 3; check the delta, the LoRAs and the" in text
    assert calls == [6] * 5


@pytest.mark.behaviour
@pytest.mark.parametrize("workflow", ["text2image", "controlnet_inpainting"])
def test_an_overflow_in_half_precision_names_a_wider_type(workflow: str) -> None:
    pipe = loop_pipeline(workflow, dtype=torch.float16)
    make_float16_overflow(pipe.controlnet if "controlnet" in workflow else pipe.unet)
    text = complaint(pipe, **loop_inputs(workflow))
    assert "not finite in torch.float16 for images[0] of 1; load the pipeline with dtype=torch.bfloat16 or" in text


@pytest.mark.behaviour
def test_autocast_counts_as_half_precision() -> None:
    pipe = loop_pipeline("text2image")
    make_float16_overflow(pipe.unet)
    with torch.autocast("cpu", dtype=torch.float16):
        assert "not finite in torch.float16" in complaint(pipe)


@pytest.mark.behaviour
@pytest.mark.parametrize("workflow", ["text2image", "inpainting", "controlnet_text2image"])
def test_an_overflow_is_run_again_in_float32_and_the_weights_put_back(workflow: str, caplog: Any) -> None:
    pipe, wide = (loop_pipeline(workflow, dtype=dtype) for dtype in (torch.float16, torch.float32))
    for one in (pipe, wide):
        make_float16_overflow(one.controlnet if "controlnet" in workflow else one.unet)
    models = [pipe.unet, *([pipe.controlnet] if "controlnet" in workflow else [])]
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    result = run(pipe, **loop_inputs(workflow), on_nonfinite="fallback").float()
    expected = run(wide, **loop_inputs(workflow))
    assert float((result - expected).norm() / expected.norm()) < 0.05
    assert "all steps were run again in float32" in caplog.text
    for model, weights in zip(models, before, strict=True):
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.behaviour
def test_a_run_that_float32_does_not_save_says_so() -> None:
    pipe = loop_pipeline("text2image", dtype=torch.float16)
    poison(pipe.unet, 500, image=0)
    assert "nor are they in torch.float32; check the delta" in complaint(pipe, on_nonfinite="fallback")
    assert pipe.unet.dtype == torch.float16


@pytest.mark.behaviour
def test_a_theta_at_fault_is_left_out_of_the_second_run(caplog: pytest.LogCaptureFixture) -> None:
    pipe, plain = loop_pipeline("text2image"), loop_pipeline("text2image")
    pipe.update_components(theta=[[0.0, 0.0], [1e39, 0.0], [0.0, 0.0], [0.0, 0.0]])
    calls = count_unet_calls(pipe)
    assert 'pass on_nonfinite="fallback"' in complaint(pipe)
    result = run(pipe, num_inference_steps=5, on_nonfinite="fallback")
    assert calls == [2] * 15 and torch.equal(result, run(plain, num_inference_steps=5))
    assert "without the scheduler's theta" in caplog.text


def test_the_guard_keeps_its_contract() -> None:
    check_block(FiniteGuardStep(), i=2)
