"""The loop: one UNet call a step, the guider's own formula, nothing read back, a handful of kernels, compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perflow_blocks import (
    AttentionConfig,
    PeRFlowDenoiseStep,
    PeRFlowLoopDenoiser,
    PeRFlowSDXLAutoBlocks,
    compile_loops,
)
from perflow_blocks.blocks.loop_block import LOOP_PROVIDES
from perflow_blocks.blocks.recombine import find_loops, insert_loop_block
from perflow_blocks.schedulers import PeRFlowScheduler
from perflow_blocks.testing import tiny_controlnet_union, tiny_image
from tests.blocks.conftest import Spy, blocks_with, loop_inputs, loop_pipeline
from tests.conftest import count_unet_calls, generator, make_pipeline, no_host_reads, run

pytestmark = pytest.mark.behaviour


def test_guidance_over_part_of_the_steps_repeats_from_run_to_run() -> None:
    pipe = make_pipeline(guider=ClassifierFreeGuidance(guidance_scale=2.0, stop=0.5))
    batches = count_unet_calls(pipe)
    first = run(pipe, num_inference_steps=4)
    again = run(pipe, num_inference_steps=4)
    assert batches == [2, 2, 1, 1] * 2
    assert torch.equal(first, again)


@pytest.mark.parametrize("order", [1, 2])
def test_loop_equals_two_calls_and_manual_guidance(order: int) -> None:
    pipe = make_pipeline(guider=ClassifierFreeGuidance(guidance_scale=3.0))
    pipe.update_components(solver_order=order)
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

    scheduler = PeRFlowScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", solver_order=order)
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
        provided = [InputParam(name, Any, required=True, description="From the loop.") for name in LOOP_PROVIDES]
        return [InputParam("gain", type_hint=float, default=0.5, description="Factor of the prediction."), *provided]

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
    assert "gain" in pipe.blocks.input_names and LOOP_PROVIDES.isdisjoint(pipe.blocks.input_names)


def test_latents_that_a_block_changed_take_an_euler_step() -> None:
    """Of two images one is changed after the first step; only the other goes on in second order."""

    def change(components: Any, block_state: Any, i: int) -> None:
        if i == 0:
            block_state.latents = block_state.latents + torch.tensor([0.0, 0.1]).reshape(2, 1, 1, 1)

    latents = []
    for order in (1, 2):
        pipe = make_pipeline(blocks_with("spy", Spy, after="solver"))
        pipe.update_components(solver_order=order, num_time_windows=1)
        latents.append(run(pipe, prompt=["a", "b"], spy=change, num_inference_steps=2))
    torch.testing.assert_close(latents[0][1], latents[1][1], rtol=0, atol=0)
    assert not torch.allclose(latents[0][0], latents[1][0], rtol=1e-3, atol=1e-3)


def test_half_given_conditions_are_a_clear_error() -> None:
    pipe = make_pipeline(guider=ClassifierFreeGuidance(guidance_scale=2.0))
    block_state = conditioned_state(pipe)
    block_state.negative_pooled_prompt_embeds = None
    with pytest.raises(ValueError, match="both pooled_prompt_embeds and negative_pooled_prompt_embeds"):
        PeRFlowLoopDenoiser()(pipe, block_state, i=0, t=block_state.timesteps[0])


GUIDANCE = ["aten.sub.Tensor", "aten.mul.Tensor", "aten.add.Tensor"]
"""Classifier-free guidance as diffusers writes it."""
UPDATE = ["aten.mul.Tensor", "aten.addcmul_.default"]
"""The solver's `A latents + B noise_pred`, in place from its second kernel on."""
BEFORE = ["aten.repeat.default"]
"""The latents for the guider's two batches."""


class Ledger(TorchDispatchMode):
    """Kernels outside the networks, step by step: the operators that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[str]] = []
        self.inside = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.steps and not self.inside:
            given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            if func._schema.is_mutable or any(_storage(leaf) not in given for leaf in made):
                self.steps[-1].append(str(func))
        return result

    def begin(self, *_: Any) -> None:
        self.steps.append([])

    @contextmanager
    def watching(self, *networks: nn.Module) -> Iterator[None]:
        hooks = []
        for network in networks:
            hooks.append(network.register_forward_pre_hook(self._enter))
            hooks.append(network.register_forward_hook(self._leave))
        with self:
            yield
        for hook in hooks:
            hook.remove()

    def _enter(self, *_: Any) -> None:
        self.inside += 1

    def _leave(self, *_: Any) -> None:
        self.inside -= 1


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def ledger_of(pipe: Any, networks: list[str], **inputs: Any) -> Ledger:
    ledger = Ledger()
    with ledger.watching(*(getattr(pipe, name) for name in networks)):
        run(pipe, spy=ledger.begin, **inputs)
    ledger.steps[-1] = ledger.steps[-1][: len(ledger.steps[-2])]  # what follows is the loop's end and the decoder's
    return ledger


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("workflow", ["text2image", "controlnet_text2image"])
def test_a_step_is_its_networks_and_a_handful_of_kernels(workflow: str, guidance_scale: float) -> None:
    guider = ClassifierFreeGuidance(guidance_scale=guidance_scale)
    pipe = loop_pipeline(workflow, blocks_with("spy", Spy, before="finite_guard"), guider=guider)
    networks = ["unet", "controlnet"] if "controlnet" in workflow else ["unet"]
    ledger = ledger_of(pipe, networks, **loop_inputs(workflow))
    guided = guidance_scale != 1.0
    expected = [*BEFORE, *GUIDANCE, *UPDATE] if guided else UPDATE
    assert ledger.steps[1:] == [expected] * 4


def test_conditions_are_joined_once() -> None:
    pipe = loop_pipeline("controlnet_inpainting", blocks_with("spy", Spy, before="finite_guard"))
    first, *later = ledger_of(pipe, ["unet", "controlnet"], **loop_inputs("controlnet_inpainting")).steps
    assert "aten.cat.default" in first
    assert not [name for step in later for name in step if "cat" in name]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_prompt_that_a_block_changes_counts_from_that_step_on(in_place: bool) -> None:
    seen: list[Tensor] = []

    def change(components: Any, block_state: Any, i: int) -> None:
        if i == 2 and in_place:
            block_state.prompt_embeds.zero_()
        elif i == 2:
            block_state.prompt_embeds = torch.zeros_like(block_state.prompt_embeds)

    pipe = make_pipeline(blocks_with("spy", Spy, before="denoiser"))
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    run(pipe, spy=change, negative_prompt="a blue ring", num_inference_steps=4)
    assert [bool(embeds[:1].any()) for embeds in seen] == [True, True, False, False]
    assert all(embeds[1:].any() for embeds in seen)
    assert seen[0] is seen[1] and seen[2] is seen[3]


def test_inference_mode_gives_the_same_image() -> None:
    pipe = make_pipeline()
    usual = run(pipe, num_inference_steps=4)
    with torch.inference_mode():
        assert torch.equal(run(pipe, num_inference_steps=4), usual)


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that counts the graphs that it is given and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize(("workflow", "full"), [("text2image", True), ("controlnet_inpainting", False)])
def test_images_are_those_of_the_pipeline_before_it_was_compiled(workflow: str, full: bool) -> None:
    pipe, backend = loop_pipeline(workflow), Counting()
    inputs = {**loop_inputs(workflow), "output_type": "pt"}
    usual, weights = run(pipe, **inputs), list(pipe.unet.state_dict())
    controlled = ["controlnet"] if "controlnet" in workflow else []
    assert compile_loops(pipe, full=full, backend=backend) == ["unet", *controlled, "vae.decoder"]
    for _ in range(2):
        torch.testing.assert_close(run(pipe, **inputs), usual, rtol=1e-4, atol=1e-4)
    graphs = backend.graphs
    assert graphs > 0
    run(pipe, **{**inputs, "num_inference_steps": 4})
    assert backend.graphs == graphs
    assert list(pipe.unet.state_dict()) == weights


def test_a_controlnet_union_is_compiled_too() -> None:
    inputs = {"control_image": tiny_image(1), "control_mode": 1, "num_inference_steps": 4}
    pipe = loop_pipeline("controlnet_text2image", controlnet=tiny_controlnet_union())
    usual = run(pipe, **inputs)
    assert compile_loops(pipe, vae=False, backend="eager") == ["unet", "controlnet"]
    torch.testing.assert_close(run(pipe, **inputs), usual, rtol=1e-4, atol=1e-4)


def test_attention_strategies_still_take_effect() -> None:
    pipe = loop_pipeline("text2image")
    usual = run(pipe)
    compile_loops(pipe, backend="eager")
    pipe.update_components(attention=AttentionConfig("native_math"))
    torch.testing.assert_close(run(pipe), usual, rtol=1e-3, atol=1e-3)
    assert "native_math" in str(pipe.attention.report())


def test_a_pipeline_without_a_unet_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unet=None .*load_components"):
        compile_loops(PeRFlowSDXLAutoBlocks().init_pipeline())
