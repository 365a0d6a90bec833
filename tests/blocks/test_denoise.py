"""The loop: one UNet call a step, the guider's own formula, nothing read back, blocks that users insert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam

from perflow_blocks.blocks import PeRFlowDenoiseStep, PeRFlowLoopDenoiser, PeRFlowSDXLAutoBlocks
from perflow_blocks.blocks.recombine import find_loops, insert_loop_block
from perflow_blocks.schedulers import PeRFlowScheduler
from perflow_blocks.testing import check_block
from tests.conftest import count_unet_calls, generator, make_pipeline, no_host_reads, run

pytestmark = pytest.mark.behaviour


def test_guidance_over_part_of_the_steps_repeats_from_run_to_run() -> None:
    pipe = make_pipeline(guider=ClassifierFreeGuidance(guidance_scale=2.0, stop=0.5))
    batches = count_unet_calls(pipe)
    first = run(pipe, num_inference_steps=4)
    again = run(pipe, num_inference_steps=4)
    assert batches == [2, 2, 1, 1] * 2
    assert torch.equal(first, again)


def test_loop_equals_two_calls_and_manual_guidance() -> None:
    pipe = make_pipeline(guider=ClassifierFreeGuidance(guidance_scale=3.0))
    start = torch.randn(2, 4, 16, 16, generator=generator(5))
    state = pipe(
        prompt=["a star", "a ring"],
        negative_prompt="a square",
        negative_original_size=(8, 8),
        negative_target_size=(8, 8),
        latents=start.clone(),
        num_inference_steps=5,
        output_type="latent",
    )

    scheduler = PeRFlowScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(5)

    def predict(latents: torch.Tensor, t: torch.Tensor, prefix: str) -> torch.Tensor:
        extra = {
            "text_embeds": state.values[f"{prefix}pooled_prompt_embeds"],
            "time_ids": state.values[f"{prefix}add_time_ids"],
        }
        embeds = state.values[f"{prefix}prompt_embeds"]
        return pipe.unet(latents, t, encoder_hidden_states=embeds, added_cond_kwargs=extra).sample

    latents = start
    with torch.no_grad():
        for t in scheduler.timesteps:
            conditional, unconditional = predict(latents, t, ""), predict(latents, t, "negative_")
            guided = unconditional + 3.0 * (conditional - unconditional)
            latents = scheduler.step(guided, t, latents).prev_sample
    assert (conditional - unconditional).abs().max() > 1e-3  # or else a wrong split would go unseen
    torch.testing.assert_close(state.values["latents"], latents, rtol=1e-5, atol=1e-5 * latents.abs().max().item())


def conditioned_state(pipe: Any, **inputs: Any) -> Any:
    """The loop's block state before its first step."""
    state = pipe(prompt=["a star", "a ring"], negative_prompt="a square", output_type="latent", **inputs)
    block_state = PeRFlowDenoiseStep().get_block_state(state)
    block_state.latents = torch.randn(2, 4, 16, 16, generator=generator(7))
    return block_state


class GuardedDenoiseStep(PeRFlowDenoiseStep):
    """The loop without what comes before its first step and after its last."""

    def _run(self, *args: Any) -> int:
        with no_host_reads():
            return super()._run(*args)


class ReadingStep(ModularPipelineBlocks):
    """What an inserted block should not do."""

    def __call__(self, components: Any, block_state: Any, i: int, t: torch.Tensor) -> Any:
        block_state.norm = block_state.latents.norm().item()
        return components, block_state


def guarded_blocks() -> PeRFlowSDXLAutoBlocks:
    blocks = PeRFlowSDXLAutoBlocks()
    blocks.sub_blocks["denoise"].sub_blocks["denoise"] = GuardedDenoiseStep()
    return blocks


@pytest.mark.parametrize("scale", [2.0, 1.0])
def test_nothing_is_read_back_in_the_loop(scale: float) -> None:
    pipe = make_pipeline(guarded_blocks(), guider=ClassifierFreeGuidance(guidance_scale=scale))
    assert torch.isfinite(run(pipe, num_inference_steps=5)).all()


def test_the_guard_sees_a_read() -> None:
    blocks = guarded_blocks()
    blocks.sub_blocks["denoise"].sub_blocks["denoise"].sub_blocks.insert("reading", ReadingStep(), 1)
    with pytest.raises(AssertionError, match="reads from the device"):
        run(make_pipeline(blocks), num_inference_steps=4)


class NoteStep(ModularPipelineBlocks):
    """A block of a user's own: notes what it is given and halves the prediction."""

    notes: list[tuple[int, int, int]]

    def __init__(self) -> None:
        super().__init__()
        self.notes = []

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("gain", type_hint=float, default=0.5, description="Factor of the prediction.")]

    def __call__(self, components: Any, block_state: Any, i: int, t: torch.Tensor) -> Any:
        self.notes.append((i, int(t), block_state.window_index))
        block_state.noise_pred = block_state.noise_pred * block_state.gain
        return components, block_state


def test_a_block_inserted_into_the_loop_runs_with_its_own_input() -> None:
    blocks = PeRFlowSDXLAutoBlocks()
    insert_loop_block(blocks, "note", NoteStep(), after="denoiser")
    pipe = make_pipeline(blocks)
    plain = run(make_pipeline(), num_inference_steps=5)
    halved = run(pipe, num_inference_steps=5)
    unchanged = run(pipe, num_inference_steps=5, gain=1.0)
    notes = next(find_loops(pipe._blocks)).sub_blocks["note"].notes
    assert notes[:5] == [(0, 1000, 0), (1, 875, 0), (2, 750, 1), (3, 500, 2), (4, 250, 3)]
    assert torch.equal(unchanged, plain)
    assert not torch.allclose(halved, plain)
    assert "gain" in pipe.blocks.input_names


@pytest.mark.parametrize("name", ["window_index", "stop_requested", "noise_pred"])
def test_a_block_may_require_what_the_loop_provides(name: str) -> None:
    seen: list[Any] = []

    class Reading(ModularPipelineBlocks):
        model_name = "stable-diffusion-xl"
        description = "Reads what the loop provides."
        inputs = [InputParam(name, type_hint=Any, required=True, description="From the loop.")]  # noqa: RUF012

        def __call__(self, components: Any, block_state: Any, i: int, t: torch.Tensor) -> Any:
            seen.append(block_state[name])
            return components, block_state

    check_block(Reading())
    seen.clear()
    blocks = PeRFlowSDXLAutoBlocks()
    insert_loop_block(blocks, "reading", Reading, before="denoiser")
    for loop in find_loops(blocks):
        assert name not in loop.input_names and name not in loop.required_inputs
    run(make_pipeline(blocks), num_inference_steps=5)
    if name == "noise_pred":
        assert seen[0] is None and len(seen) == 5 and all(entry is not None for entry in seen[1:])
    else:
        assert seen == {"window_index": [0, 0, 1, 2, 3], "stop_requested": [False] * 5}[name]


def test_the_progress_bar_counts_steps_and_can_be_turned_off(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = make_pipeline()
    run(pipe, num_inference_steps=5)
    assert "5/5" not in capsys.readouterr().err
    pipe.set_progress_bar_config(desc="drawing")
    run(pipe, num_inference_steps=5)
    shown = capsys.readouterr().err
    assert "drawing" in shown
    assert "5/5" in shown


def test_half_given_conditions_are_a_clear_error() -> None:
    pipe = make_pipeline(guider=ClassifierFreeGuidance(guidance_scale=2.0))
    block_state = conditioned_state(pipe)
    block_state.negative_pooled_prompt_embeds = None
    with pytest.raises(ValueError, match="both pooled_prompt_embeds and negative_pooled_prompt_embeds"):
        PeRFlowLoopDenoiser()(pipe, block_state, i=0, t=block_state.timesteps[0])
