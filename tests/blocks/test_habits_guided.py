"""Guidance and a callback as arguments of a call, as the classic pipelines take them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ClassifierFreeGuidance

from tests.conftest import count_unet_calls, make_pipeline, run


def test_guidance_of_one_call_is_that_of_a_guider_and_ends_with_it() -> None:
    pipe, other = make_pipeline(), make_pipeline()
    other.update_components(guider=ClassifierFreeGuidance(guidance_scale=5.0))
    before, scale = run(pipe), pipe.guider.guidance_scale
    assert torch.equal(run(pipe, guidance_scale=5.0), run(other))
    assert pipe.guider.guidance_scale == scale and torch.equal(run(pipe), before)


def test_guidance_of_one_is_one_batch() -> None:
    pipe = make_pipeline()
    batches = count_unet_calls(pipe)
    run(pipe, num_inference_steps=2, guidance_scale=1.0)
    run(pipe, num_inference_steps=2, guidance_scale=3.0)
    assert batches == [1, 1, 2, 2]


def test_a_callback_sees_each_step_and_may_return_other_latents() -> None:
    pipe = make_pipeline()
    seen: list[tuple[int, float, torch.Tensor]] = []

    def note(owner: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        assert owner is pipe
        seen.append((step, float(timestep), values["latents"].clone()))
        return {"latents": values["latents"] + 1.0} if step == 3 else {}

    expected = run(pipe, num_inference_steps=4)
    images = run(pipe, num_inference_steps=4, callback_on_step_end=note)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    assert [time for _, time, _ in seen] == sorted((time for _, time, _ in seen), reverse=True)
    assert torch.equal(seen[-1][2], expected) and torch.equal(images, expected + 1.0)
