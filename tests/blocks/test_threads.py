"""Threads share a pipeline: their calls give what serial calls give, wait for each other, or are refused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, LayerSkipConfig, PerturbedAttentionGuidance

from perflow_blocks import StepCallbackStep, insert_loop_block, merge_delta, rescale_delta
from perflow_blocks.demo import perflow_pipeline
from perflow_blocks.testing import tiny_controlnet, tiny_image
from tests.blocks.conftest import write_delta
from tests.conftest import generator, make_pipeline, run

REQUESTS: list[dict[str, Any]] = [
    {"num_inference_steps": 4 + k, "generator": k, "prompt": "a star" if k % 2 else "a red ring"} for k in range(4)
]


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_delta(tmp_path_factory.mktemp("delta") / "delta.safetensors")


def in_threads(count: int, calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of calls in threads that begin together."""
    barrier = threading.Barrier(count)

    def each(call: Callable[[], Any]) -> Any:
        if not barrier.broken:
            barrier.wait(timeout=60)
        return call()

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(each, calls))


def drawn(pipe: Any, request: dict[str, Any], **inputs: Any) -> torch.Tensor:
    return run(pipe, **{**request, "generator": generator(request["generator"])}, **inputs)


@pytest.mark.parametrize("warm", [True, False])
def test_calls_with_guidance_and_different_steps_give_the_serial_images(warm: bool) -> None:
    pipe = perflow_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=2.0))
    calls = [partial(drawn, pipe, request) for request in REQUESTS]
    if not warm:
        found = in_threads(4, calls)
    expected = [call() for call in calls]
    if warm:
        found = in_threads(4, calls)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_each_call_has_its_own_guidance_scale_images_and_tokenizer_settings() -> None:
    pipe = make_pipeline(controlnet=tiny_controlnet())
    calls: list[Callable[[], Any]] = [
        lambda: drawn(pipe, REQUESTS[0], guidance_scale=1.0),
        lambda: drawn(pipe, REQUESTS[1], guidance_scale=4.0, negative_prompt="a blue square, quite a long text"),
        lambda: drawn(pipe, REQUESTS[2], image=tiny_image(1), strength=0.5),
        lambda: drawn(pipe, REQUESTS[3], control_image=tiny_image(2)),
    ]
    expected = [call() for call in calls]
    for one, other in zip(in_threads(4, calls), expected, strict=True):
        assert torch.equal(one, other)


def test_a_guider_that_hooks_the_unet_runs_alone() -> None:
    layers = LayerSkipConfig([0], "mid_block.attentions.0.transformer_blocks", skip_attention=False)
    layers.skip_attention_scores = True
    pipe = make_pipeline()
    hooked = make_pipeline(guider=PerturbedAttentionGuidance(2.0, 1.0, 0.0, 1.0, perturbed_guidance_config=layers))
    hooked.update_components(unet=pipe.unet)
    calls = [lambda: drawn(pipe, REQUESTS[0]), lambda: drawn(hooked, REQUESTS[0]), lambda: drawn(pipe, REQUESTS[2])]
    expected = [call() for call in calls]
    for one, other in zip(in_threads(3, calls), expected, strict=True):
        assert torch.equal(one, other)


def test_a_change_of_the_delta_waits_for_the_run_that_is_going_on(delta: Path) -> None:
    pipe = make_pipeline()
    merge_delta(pipe.unet, delta)
    started, going = threading.Event(), threading.Event()
    expected = run(pipe)

    def callback(*_: Any) -> None:
        started.set()
        assert not going.wait(timeout=0.2)  # the other thread has not changed the weights

    def change() -> None:
        started.wait(timeout=60)
        rescale_delta(pipe.unet, 0.5)
        going.set()

    calls = [lambda: run(pipe, callback_on_step_end=callback), change]
    assert torch.equal(in_threads(2, calls)[0], expected)
    assert going.is_set() and not torch.equal(run(pipe), expected)


def test_weights_that_another_thread_changes_during_a_call_are_refused(delta: Path) -> None:
    pipe = make_pipeline()
    merge_delta(pipe.unet, delta)
    other = threading.Thread(target=rescale_delta, args=(pipe.unet, 0.5))

    def change(*_: Any) -> None:
        other.start()
        other.join()

    encode = pipe.text_encoder_2.register_forward_pre_hook(change)
    with pytest.raises(ValueError, match="another thread changed the deltas"):
        run(pipe)
    encode.remove()
    run(pipe)


def test_a_block_may_rescale_the_delta_of_its_own_run(delta: Path) -> None:
    blocks = make_pipeline().blocks
    insert_loop_block(blocks, "callback", StepCallbackStep, after="solver")
    pipe = make_pipeline(blocks)
    merge_delta(pipe.unet, delta)
    scales = list[float]()

    def fade(info: Any) -> None:
        scales.append(rescale_delta(pipe.unet, 1.0 - info.step / 10).scale)

    run(pipe, num_inference_steps=4, step_callback=fade)
    assert scales == [1.0, 0.9, 0.8, 0.7]


def test_threads_that_ask_for_different_scales_get_theirs_or_an_error(delta: Path) -> None:
    pipe, refused = make_pipeline(), list[str]()
    expected = {scale: run(pipe, delta=delta, delta_scale=scale) for scale in (1.0, 0.5)}

    def ask(scale: float) -> tuple[float, torch.Tensor] | None:
        try:
            return scale, run(pipe, delta=delta, delta_scale=scale)
        except ValueError as error:
            refused.append(str(error))
            return None

    answers = in_threads(4, [partial(ask, scale) for scale in (1.0, 0.5) * 4])
    for scale, drawn_then in filter(None, answers):
        torch.testing.assert_close(drawn_then, expected[scale], rtol=0, atol=1e-2)  # sums of a base that is not read
    assert all("thread" in message for message in refused)
