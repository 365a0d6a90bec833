"""The compiled step: the pictures of the usual loop, and one compilation for all steps, calls, scales and schedules.

Torch's `eager` backend runs what was traced as it stands, so that a test of tracing need not wait for a compiler.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import AdaptiveProjectedGuidance, ClassifierFreeGuidance, MultiControlNetModel

from perflow_blocks import compile_loops
from perflow_blocks.blocks import (
    PeRFlowCompiledLoopStep,
    PeRFlowSDXLAutoBlocks,
    PeRFlowTiledLoopDenoiser,
    PreviewStep,
    StepCallbackStep,
    WindowLogStep,
)
from perflow_blocks.blocks.recombine import find_loops, insert_loop_block
from perflow_blocks.blocks.settled_guidance import settings_of, settle
from perflow_blocks.testing.tiny import tiny_controlnet, tiny_controlnet_union, tiny_picture
from tests.blocks.conftest import LOOP_WORKFLOWS, Spy, loop_inputs, loop_pipeline
from tests.conftest import make_pipeline, no_host_reads, run


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that counts what it is given to compile; copies of a pipeline's blocks share it."""

    def __init__(self) -> None:
        self.frame_count = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        self.frame_count += 1
        return graph.forward

    def __deepcopy__(self, memo: Any) -> Counting:
        return self


def compiled_blocks(backend: Any = "eager", **options: Any) -> PeRFlowSDXLAutoBlocks:
    blocks = PeRFlowSDXLAutoBlocks()
    assert compile_loops(blocks, backend=backend, **options) == 4
    return blocks


def compiled_and_usual(workflow: str, counter: Any = "eager", **components: Any) -> tuple[Any, Any]:
    return (
        loop_pipeline(workflow, compiled_blocks(counter), **components),
        loop_pipeline(workflow, **components),
    )


@pytest.mark.parametrize("workflow", LOOP_WORKFLOWS)
def test_pictures_are_those_of_the_usual_loop(workflow: str) -> None:
    compiled, usual = compiled_and_usual(workflow)
    inputs = loop_inputs(workflow)
    assert torch.equal(run(compiled, **inputs), run(usual, **inputs))


@pytest.mark.parametrize("workflow", ["text2image", "controlnet_text2image"])
def test_one_compilation_serves_steps_calls_scales_and_schedules(workflow: str) -> None:
    counter = Counting()
    compiled, usual = compiled_and_usual(workflow, counter)
    for steps, scale in ((4, 2.0), (4, 2.0), (8, 2.0), (6, 3.5), (5, 1.25)):
        for pipe in (compiled, usual):
            pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=scale))
        inputs = {**loop_inputs(workflow, steps)}
        assert torch.equal(run(compiled, **inputs), run(usual, **inputs)), (steps, scale)
    assert counter.frame_count == 1


def test_a_scale_changed_during_the_run_counts_from_that_step_on() -> None:
    counter = Counting()
    pipes = compiled_and_usual("text2image", counter)

    def change(components: Any, block_state: Any, i: int) -> None:
        components.guider.guidance_scale = 2.0 if i < 2 else 4.0

    results = []
    for pipe in pipes:
        blocks = copy.deepcopy(pipe.blocks)
        insert_loop_block(blocks, "spy", Spy, after="finite_guard")
        results.append(run(make_pipeline(blocks), spy=change, num_inference_steps=4))
    assert torch.equal(*results)
    assert counter.frame_count == 1
    assert not torch.equal(results[0], run(pipes[0], num_inference_steps=4))


def test_guidance_that_stops_early_is_two_functions() -> None:
    counter = Counting()
    compiled, usual = compiled_and_usual("text2image", counter)
    for pipe in (compiled, usual):
        pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=2.0, stop=0.5))
    for _ in range(2):
        assert torch.equal(run(compiled, num_inference_steps=6), run(usual, num_inference_steps=6))
    assert counter.frame_count == 2


def test_no_guidance_is_one_row_and_no_formula() -> None:
    compiled, usual = compiled_and_usual("text2image")
    for pipe in (compiled, usual):
        pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=1.0))
    assert torch.equal(run(compiled), run(usual))


@pytest.mark.parametrize("settings", [{"guidance_rescale": 0.7}, {"use_original_formulation": True}])
def test_the_formula_is_the_guiders_own(settings: dict[str, Any]) -> None:
    compiled, usual = compiled_and_usual("text2image")
    for pipe in (compiled, usual):
        pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=3.0, **settings))
    assert torch.equal(run(compiled), run(usual))
    usual.update_components(guider=ClassifierFreeGuidance(guidance_scale=3.0))
    assert not torch.equal(run(compiled), run(usual))


def test_shares_of_the_steps_of_several_controlnets_do_not_recompile() -> None:
    counter = Counting()
    nets: Any = MultiControlNetModel([tiny_controlnet(seed) for seed in range(2)])
    compiled, usual = compiled_and_usual("controlnet_text2image", counter, controlnet=nets)
    inputs = {
        "control_image": [tiny_picture(1), tiny_picture(2)],
        "controlnet_conditioning_scale": [0.5, 1.5],
        "control_guidance_start": [0.0, 0.25],
        "control_guidance_end": [0.5, 1.0],
        "num_inference_steps": 4,
    }
    assert torch.equal(run(compiled, **inputs), run(usual, **inputs))
    assert counter.frame_count == 1


def test_a_controlnet_union_is_compiled_too() -> None:
    counter = Counting()
    compiled, usual = compiled_and_usual("controlnet_text2image", counter, controlnet=tiny_controlnet_union())
    inputs = {"control_image": tiny_picture(1), "control_mode": 1, "guess_mode": True}
    for scale in (0.7, 1.0):
        inputs["controlnet_conditioning_scale"] = scale
        assert torch.equal(run(compiled, **inputs), run(usual, **inputs))
    assert counter.frame_count == 1


def test_a_controlnet_out_of_force_is_another_function() -> None:
    counter = Counting()
    compiled, usual = compiled_and_usual("controlnet_text2image", counter)
    inputs = {"control_image": tiny_picture(1), "control_guidance_end": 0.5, "num_inference_steps": 4}
    assert torch.equal(run(compiled, **inputs), run(usual, **inputs))
    assert counter.frame_count == 2


def test_nothing_is_read_back_around_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """That nothing is read inside is what `fullgraph` makes sure of."""
    blocks, reached = compiled_blocks(), list[int]()
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    loop = blocks.sub_blocks["denoise"].sub_blocks["denoise"].sub_blocks["denoise"]
    inner = type(loop).loop_step

    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        reached.append(1)
        with no_host_reads(methods=False):
            return inner(self, *args, **kwargs)

    monkeypatch.setattr(type(loop), "loop_step", guarded)
    run(make_pipeline(blocks), num_inference_steps=4)
    assert len(reached) == 4


def test_blocks_around_the_step_see_what_they_see_in_the_usual_loop() -> None:
    seen: dict[str, list[Any]] = {"compiled": [], "usual": []}
    for name, blocks, place in (("compiled", compiled_blocks(), "step"), ("usual", PeRFlowSDXLAutoBlocks(), "solver")):
        insert_loop_block(blocks, "spy", Spy, after=place)
        insert_loop_block(blocks, "callback", StepCallbackStep, after="spy")
        insert_loop_block(blocks, "log", WindowLogStep, after="callback")
        pipe = make_pipeline(blocks)
        notes = seen[name]
        run(
            pipe,
            num_inference_steps=4,
            spy=lambda components, state, i, notes=notes: notes.append((state.noise_pred, state.latents)),
            step_callback=lambda info: info.step == 2,
        )
    assert len(seen["compiled"]) == len(seen["usual"]) == 3
    for one, other in zip(seen["compiled"], seen["usual"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_another_guider_is_refused_before_a_network_runs() -> None:
    pipe = make_pipeline(compiled_blocks(), guider=AdaptiveProjectedGuidance(guidance_scale=2.0))
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("the UNet ran"))
    with pytest.raises(ValueError, match=r"AdaptiveProjectedGuidance cannot be part of .*; use ClassifierFree"):
        run(pipe)


@pytest.mark.parametrize("by", ["hooks", "groups"])
def test_an_offloaded_model_is_refused(by: str) -> None:
    pipe = make_pipeline(compiled_blocks())
    if by == "hooks":
        add_hook_to_module(pipe.unet, ModelHook())
    else:
        pipe.unet.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match=r"UNet2DConditionModel is offloaded.*keep it on the device"):
        run(pipe)


def test_loops_that_cannot_be_one_function_are_left_as_they_are() -> None:
    blocks = PeRFlowSDXLAutoBlocks()
    insert_loop_block(blocks, "preview", PreviewStep, before="solver")
    before = [list(loop.sub_blocks) for loop in find_loops(blocks)]
    with pytest.raises(ValueError, match="preview would stand within the compiled step"):
        compile_loops(blocks)
    assert [list(loop.sub_blocks) for loop in find_loops(blocks)] == before

    tiled = PeRFlowSDXLAutoBlocks().get_workflow("text2image")
    tiled.sub_blocks["denoise.denoise"].sub_blocks["denoiser"] = PeRFlowTiledLoopDenoiser()
    with pytest.raises(ValueError, match=r"PeRFlowTiledLoopDenoiser and PeRFlowLoopSolverStep .* the UNet alone"):
        compile_loops(tiled)
    with pytest.raises(ValueError, match="holds no denoising loop"):
        compile_loops(PeRFlowSDXLAutoBlocks().sub_blocks["decode"])
    with pytest.raises(ValueError, match="only a loop with `denoiser` and `solver`"):
        compile_loops(compiled_blocks())


def test_an_option_that_torch_does_not_have_is_refused_at_once() -> None:
    for options, named in (({"fullgraph": True}, "fullgraph=True"), ({"modus": "fast"}, "modus='fast'")):
        with pytest.raises(ValueError, match=f"{named} is no option of a compiled step.* pass some of backend"):
            compile_loops(PeRFlowSDXLAutoBlocks(), **options)


@torch._dynamo.config.patch(recompile_limit=1)
def test_the_limit_of_compilations_is_for_each_loop_and_has_a_remedy() -> None:
    for _ in range(2):  # each pipeline compiles once
        pipe = make_pipeline(compiled_blocks())
        run(pipe, num_inference_steps=4)
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=1.0))
    with pytest.raises(ValueError, match=r"as torch allows; raise torch._dynamo.config.recompile_limit"):
        run(pipe, num_inference_steps=4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_half_precision_does_not_round_the_scale(dtype: torch.dtype, rescale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    predictions = [torch.randn(2, 4, 8, 8, generator=generator).to(dtype) for _ in range(2)]
    guider = ClassifierFreeGuidance(guidance_scale=1.7, guidance_rescale=rescale)
    exact = guider.forward(*(prediction.double() for prediction in predictions)).pred
    settled = settle(settings_of(guider), torch.device("cpu")).forward(*predictions).pred
    usual = guider.forward(*predictions).pred
    assert (settled - exact).norm() <= (usual - exact).norm()
    assert usual.dtype == dtype and settled.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_agrees_with_the_usual_loop_to_its_rounding(dtype: torch.dtype) -> None:
    compiled = loop_pipeline("text2image", compiled_blocks(), dtype)
    usual, exact = loop_pipeline("text2image", dtype=dtype), loop_pipeline("text2image")
    for pipe in (compiled, usual, exact):
        pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=1.7))
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours, theirs, truth = (run(pipe, latents=noise.to(pipe.unet.dtype)).float() for pipe in (compiled, usual, exact))
    assert run(compiled, latents=noise).dtype == dtype
    assert (ours - truth).norm() <= 1.2 * (theirs - truth).norm()


def test_options_reach_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    blocks = compiled_blocks("eager", dynamic=False)

    def compile_nothing(function: Any, **options: Any) -> Any:
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    pipe = make_pipeline(blocks)
    run(pipe)
    run(pipe)
    assert asked == [{"fullgraph": True, "backend": "eager", "dynamic": False}]


@pytest.mark.parametrize(
    "options", [{"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}, {"backend": "cudagraphs"}]
)
def test_with_graphs_nothing_kept_is_overwritten(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for captured graphs: like theirs, its results lie at the same addresses at every run."""
    results: list[tuple[torch.Tensor, torch.Tensor]] = []
    marks: list[int] = []

    def capture(function: Any, **options: Any) -> Any:
        def replay(*args: Any) -> Any:
            made = function(*args)
            if not results:
                results.append(made)
            for kept, new in zip(results[0], made, strict=True):
                kept.copy_(new)
            return results[0]

        return replay

    usual, blocks = run(make_pipeline()), PeRFlowSDXLAutoBlocks()
    compile_loops(blocks, **options)
    monkeypatch.setattr(torch, "compile", capture)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    pipe = make_pipeline(blocks)
    first = run(pipe)
    before = first.clone()
    run(pipe, prompt="a blue ring")
    assert torch.equal(first, before) and torch.equal(first, usual)
    assert len(marks) == 12


def test_the_block_by_itself_keeps_its_contract() -> None:
    from perflow_blocks.testing import check_block

    result = check_block(PeRFlowCompiledLoopStep(backend="eager"))
    assert result.latents.shape == result.noise_pred.shape
