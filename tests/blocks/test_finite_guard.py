"""Broken latents: named with step, window and type, or computed again in float32, with everything put back."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from diffusers import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from torch import Tensor, nn

from perflow_blocks import FiniteGuardStep
from perflow_blocks.blocks import ControlNetFiniteGuardStep
from perflow_blocks.blocks.float32 import in_float32, why_not_float32
from perflow_blocks.testing import check_block
from perflow_blocks.testing.tiny import load_tiny_ip_adapter, tiny_picture
from tests.blocks.conftest import (
    EMBEDS,
    LOOP_WORKFLOWS,
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
PLACES = {  # of five steps over four windows
    1000: "step 1 of 5 (window 0, time 1 to 0.75)",
    875: "step 2 of 5 (window 0, time 1 to 0.75)",
    750: "step 3 of 5 (window 1, time 0.75 to 0.5)",
    500: "step 4 of 5 (window 2, time 0.5 to 0.25)",
    250: "step 5 of 5 (window 3, time 0.25 to 0)",
}
APG = {"guidance_scale": 3.0, "adaptive_projected_guidance_momentum": 0.9, "adaptive_projected_guidance_rescale": 0.0}


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


@pytest.mark.parametrize("timestep", PLACES)
def test_step_window_type_and_pictures_are_named(timestep: int) -> None:
    pipe = loop_pipeline("text2image")
    poison(pipe.unet, timestep, picture=1)
    guard_against_reads(pipe)
    text = complaint(pipe, prompt=["a", "b", "c"])
    assert f"after {PLACES[timestep]} are not finite in torch.float32 for images[1] of 3;" in text
    assert "check the delta, the LoRAs and the latents that were passed" in text
    assert "load the pipeline" not in text  # there is nothing wider


def test_the_first_of_several_breaks_is_named_and_all_pictures_are() -> None:
    pipe = loop_pipeline("text2image")
    poison(pipe.unet, 500, picture=0)
    poison(pipe.unet, 750, picture=2)
    text = complaint(pipe, prompt=["a", "b", "c"])
    assert PLACES[750] in text
    assert "for images[0], images[2] of 3;" in text


@pytest.mark.parametrize("workflow", LOOP_WORKFLOWS)
def test_every_loop_is_guarded(workflow: str) -> None:
    pipe = loop_pipeline(workflow)
    poison(pipe.unet, 750)
    assert PLACES[750] in complaint(pipe, **loop_inputs(workflow))


def test_latents_that_are_broken_from_the_start_are_told_apart() -> None:
    pipe = loop_pipeline("text2image")
    latents = torch.zeros(2, 4, 16, 16)
    latents[1, 3, 0, 5] = float("nan")
    for policy in ("raise", "fallback"):
        text = complaint(pipe, prompt=["a", "b"], latents=latents, on_nonfinite=policy)
        assert "the latents that the run starts with are not finite in torch.float32 for images[1] of 2" in text


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        (torch.float16, 'dtype=torch.bfloat16 or torch.float32, or pass on_nonfinite="fallback"'),
        (torch.bfloat16, 'dtype=torch.float32, or pass on_nonfinite="fallback"'),
    ],
)
def test_what_to_do_depends_on_the_type(dtype: torch.dtype, advice: str) -> None:
    pipe = loop_pipeline("text2image", dtype=dtype)
    poison(pipe.unet, 250)
    text = complaint(pipe)
    assert f"are not finite in {dtype}" in text
    assert advice in text


def test_an_unknown_policy_is_refused_before_the_first_step() -> None:
    pipe = loop_pipeline("text2image")
    calls = count_unet_calls(pipe)
    with pytest.raises(ValueError, match=r"on_nonfinite='ignore'.*raise, fallback"):
        run(pipe, on_nonfinite="ignore")
    assert calls == []


def test_an_overflowing_model_is_run_again_in_float32(caplog: pytest.LogCaptureFixture) -> None:
    pipe = loop_pipeline("text2image", dtype=torch.float16)
    make_float16_overflow(pipe.unet)
    assert PLACES[1000] in complaint(pipe)
    before, calls = weights(pipe.unet), count_unet_calls(pipe)
    guard_against_reads(pipe)
    with caplog.at_level(logging.WARNING, logger="perflow_blocks"):
        inputs = {"num_inference_steps": 5, "output_type": "latent"}
        state = pipe(prompt="a red star", generator=generator(), on_nonfinite="fallback", **inputs)
    assert calls == [2] * 10
    assert_same(pipe.unet, before)
    warnings = [entry.getMessage() for entry in caplog.records if entry.name.startswith("perflow_blocks")]
    assert len(warnings) == 1
    assert f"after {PLACES[1000]} were not finite in torch.float16; steps 1 to 5 were repeated" in warnings[0]
    assert state.values["finite_record"].rerun_from == 0

    reference = loop_pipeline("text2image", unet=copy.deepcopy(pipe.unet))
    latents = torch.randn(1, 4, 16, 16, generator=generator(), dtype=torch.float16).float()
    embeds = {name: state.values[name].float() for name in EMBEDS}
    expected = run(reference, prompt=None, latents=latents, **embeds, num_inference_steps=5)
    result = state.values["images"]
    assert result.dtype == torch.float16
    assert torch.equal(result, expected.half())
    assert all(state.values[name].dtype == torch.float16 for name in EMBEDS)


@pytest.mark.parametrize(("timestep", "repeated"), [(875, 5), (750, 3), (250, 1)])
def test_the_run_is_repeated_from_the_last_window_that_was_finite(timestep: int, repeated: int) -> None:
    pipe = loop_pipeline("text2image", dtype=torch.bfloat16)
    clean = run(pipe, num_inference_steps=5)
    poison(pipe.unet, timestep, dtypes=HALF)
    calls = count_unet_calls(pipe)
    seen: list[torch.dtype] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    result = run(pipe, num_inference_steps=5, on_nonfinite="fallback")
    assert len(calls) == 5 + repeated
    assert seen == [torch.bfloat16] * 5 + [torch.float32] * repeated
    assert result.dtype == torch.bfloat16
    assert_near(result, clean)


def assert_near(result: Tensor, clean: Tensor, share: float = 0.03) -> None:
    """Equal but for half precision."""
    assert torch.isfinite(result).all()
    assert (result.float() - clean.float()).norm() < share * clean.float().norm()


def test_the_guiders_momentum_is_that_of_the_window_start() -> None:
    def result(timestep: int | None, **changes: Any) -> Tensor:
        pipe = loop_pipeline(
            "text2image", dtype=torch.bfloat16, guider=AdaptiveProjectedGuidance(**{**APG, **changes})
        )
        if timestep is not None:
            poison(pipe.unet, timestep, dtypes=HALF)
        return run(pipe, num_inference_steps=5, on_nonfinite="fallback").float()

    clean, forgetful = result(None), result(None, adaptive_projected_guidance_momentum=0.0)
    repeated = result(500)
    assert (repeated - clean).norm() < 0.2 * (forgetful - clean).norm()


def test_blocks_that_write_into_the_latents_do_so_once() -> None:
    def halve(components: Any, block_state: Any, i: int) -> None:
        if i == 2:  # a window's first step
            block_state.latents.mul_(0.5)

    pipe = loop_pipeline("text2image", blocks_with("spy", Spy, before="denoiser"), dtype=torch.bfloat16)
    clean = run(pipe, num_inference_steps=5, spy=halve)
    poison(pipe.unet, 750, dtypes=HALF)
    assert_near(run(pipe, num_inference_steps=5, spy=halve, on_nonfinite="fallback"), clean)


@pytest.mark.parametrize("workflow", LOOP_WORKFLOWS)
def test_every_loop_can_fall_back(workflow: str) -> None:
    pipe = loop_pipeline(workflow, dtype=torch.bfloat16)
    clean = run(pipe, **loop_inputs(workflow))
    poison(pipe.unet, 500, dtypes=HALF)
    result = run(pipe, **loop_inputs(workflow), on_nonfinite="fallback")
    assert_near(result, clean)
    if workflow == "inpainting":
        assert torch.equal(result[..., :8], clean[..., :8])  # the known part, to the last bit


def test_an_overflowing_controlnet_is_made_float32_too() -> None:
    pipe = loop_pipeline("controlnet_text2image", dtype=torch.float16)
    clean = run(pipe, **loop_inputs("controlnet_text2image"))
    make_float16_overflow(pipe.controlnet)
    before = weights(pipe.controlnet)
    inputs = loop_inputs("controlnet_text2image")
    assert PLACES[1000] in complaint(pipe, **inputs)
    assert_near(run(pipe, **inputs, on_nonfinite="fallback"), clean)
    assert_same(pipe.controlnet, before)


def test_the_tensors_of_ip_adapters_are_made_float32_too() -> None:
    pipe = loop_pipeline("text2image")
    load_tiny_ip_adapter(pipe)
    for name in ("unet", "image_encoder", "text_encoder", "text_encoder_2"):
        getattr(pipe, name).to(torch.bfloat16)
    inputs = {"ip_adapter_image": tiny_picture(3), "num_inference_steps": 5}
    clean = run(pipe, **inputs)
    poison(pipe.unet, 1000, dtypes=HALF)
    assert_near(run(pipe, **inputs, on_nonfinite="fallback"), clean)


def test_where_float32_does_not_help_the_error_says_so() -> None:
    pipe = loop_pipeline("text2image", dtype=torch.float16)
    poison(pipe.unet, 500)
    before = weights(pipe.unet)
    text = complaint(pipe, on_nonfinite="fallback")
    assert (
        f"after {PLACES[500]} are not finite in torch.float16 for images[0] of 1, nor are they in torch.float32;"
        in text
    )
    assert "load the pipeline" not in text
    assert_same(pipe.unet, before)


def test_a_float32_model_is_not_run_twice() -> None:
    pipe = loop_pipeline("text2image")
    poison(pipe.unet, 500)
    calls = count_unet_calls(pipe)
    assert PLACES[500] in complaint(pipe, on_nonfinite="fallback")
    assert len(calls) == 5


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


def test_a_run_that_was_stopped_is_repeated_to_where_it_stopped() -> None:
    stops: list[int] = []

    def stop_once(components: Any, block_state: Any, i: int) -> None:
        if i == 3 and not stops:
            stops.append(i)
            block_state.stop_requested = True

    pipe = loop_pipeline("text2image", blocks_with("spy", Spy, after="solver"), dtype=torch.bfloat16)
    clean = run(pipe, num_inference_steps=5, spy=stop_once)
    stops.clear()
    poison(pipe.unet, 750, dtypes=HALF)
    calls = count_unet_calls(pipe)
    state = pipe(
        prompt="a red star",
        generator=generator(),
        output_type="latent",
        num_inference_steps=5,
        spy=stop_once,
        on_nonfinite="fallback",
    )
    assert len(calls) == 4 + 2
    assert state.values["stop_requested"]
    assert_near(state.values["images"], clean)


def test_without_the_fallback_no_latents_are_kept() -> None:
    kept: list[int] = []
    pipe = loop_pipeline("text2image", blocks_with("spy", Spy, after="solver"))

    def count(components: Any, block_state: Any, i: int) -> None:
        kept.append(len(block_state.finite_record.window_starts))

    run(pipe, num_inference_steps=5, spy=count)
    run(pipe, num_inference_steps=5, spy=count, on_nonfinite="fallback")
    assert kept == [0] * 5 + [1, 1, 2, 3, 4]


def test_in_float32_puts_back_what_did_not_change_and_casts_what_did() -> None:
    model = nn.Linear(2, 2).half()
    model.register_buffer("table", torch.ones(2))
    before = weights(model)
    mask, table = torch.ones(2, dtype=torch.float16), torch.ones(3)
    given: dict[str, Any] = {"latents": mask.clone(), "nested": {"masks": [mask, 1]}, "pair": (mask,), "table": table}
    values = dict(given)
    with pytest.raises(KeyError), in_float32([model], values):
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


def test_weights_that_cannot_be_made_float32() -> None:
    assert why_not_float32([nn.Linear(2, 2).half(), nn.Linear(2, 2)]) is None
    assert "offloaded" in str(why_not_float32([nn.Linear(2, 2), nn.Linear(2, 2, device="meta")]))
    small = nn.Linear(2, 2)
    small.weight.data = small.weight.data.to(torch.float8_e4m3fn)
    assert "float8_e4m3fn" in str(why_not_float32([small]))
    packed = nn.Linear(2, 2)
    packed.weight = nn.Parameter(packed.weight.data.to(torch.uint8), requires_grad=False)
    assert "weights of torch.uint8 cannot" in str(why_not_float32([packed]))


def test_offloaded_weights_leave_the_error() -> None:
    pipe = loop_pipeline("text2image", dtype=torch.float16)
    poison(pipe.unet, 500)
    pipe.unet.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    text = complaint(pipe, on_nonfinite="fallback")
    assert "and weights that are offloaded layer by layer cannot be made float32; load the pipeline with" in text


def test_the_guards_keep_their_contract() -> None:
    guider = ClassifierFreeGuidance(guidance_scale=2.0)
    for guard in (FiniteGuardStep(), ControlNetFiniteGuardStep()):
        check_block(guard)
        block_state = check_block(guard, inputs={"on_nonfinite": "fallback"}, components={"guider": guider}, i=2)
        assert block_state.finite_record.steps == 3
