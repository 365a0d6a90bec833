"""`check_block` finds each way to break a contract, and the tiny components show what they are conditioned on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import MultiControlNetModel, StableDiffusionXLAutoBlocks, UNet2DConditionModel
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks, PipelineState, SequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, ConfigSpec, InputParam, OutputParam
from diffusers.modular_pipelines.stable_diffusion_xl.decoders import StableDiffusionXLDecodeStep

from perflow_blocks import PeRFlowDenoiseStep
from perflow_blocks.blocks.loop_block import LoopBlock
from perflow_blocks.testing import (
    BlockContractError,
    check_block,
    load_tiny_ip_adapter,
    tiny_controlnet,
    tiny_controlnet_union,
    tiny_image,
    tiny_image_encoder,
    tiny_inpainting_unet,
    tiny_inputs,
    tiny_mask,
    tiny_sdxl_unet,
)
from tests.conftest import make_pipeline, run

LATENTS = InputParam("latents", required=True, type_hint=torch.Tensor, description="Latents.")
LATENTS_OUT = OutputParam("latents", torch.Tensor, "Latents.")
MASK_OUT = OutputParam("mask", int, "One.")
TENSORS = InputParam("tensors", type_hint=list, default=[torch.ones(1)], description="A list of one.")
UNET = ComponentSpec("unet", UNet2DConditionModel, description="The UNet.")


def make_block(call: Callable[..., Any], **declared: Any) -> ModularPipelineBlocks:
    """A block of this `__call__`, which declares latents as its input and what is given here."""
    members = {"description": "A block.", "inputs": [LATENTS], **declared, "__call__": call}
    return type("FaultyStep", (ModularPipelineBlocks,), members)()


def leaf(body: Callable[[Any, PipelineState, Any], Any], **declared: Any) -> ModularPipelineBlocks:
    """A block of a pipeline that does `body(components, state, block_state)` between the usual lines."""

    def call(self: Any, components: Any, state: PipelineState) -> Any:
        block_state = self.get_block_state(state)
        body(components, state, block_state)
        self.set_block_state(state, block_state)
        return components, state

    return make_block(call, **declared)


def loop(body: Callable[[Any, Any, int], Any], **declared: Any) -> ModularPipelineBlocks:
    """A block of a loop that does `body(components, block_state, i)`."""

    def call(self: Any, components: Any, block_state: Any, i: int, t: torch.Tensor) -> Any:
        body(components, block_state, i)
        return components, block_state

    return make_block(call, **declared)


def outputs(*params: OutputParam) -> dict[str, Any]:
    return {"intermediate_outputs": list(params)}


def double(block_state: Any) -> None:
    block_state.latents = 2.0 * block_state.latents


def hold(held: list[float]) -> Callable[..., None]:
    """Writes latents that depend on how often it was called."""

    def body(components: Any, state: Any, block_state: Any) -> None:
        held.append(1.0)
        block_state.latents = block_state.latents + sum(held)

    return body


def test_a_block_gives_the_state_that_it_leaves_and_stays_as_it_is() -> None:
    block = leaf(lambda components, state, block_state: double(block_state), **outputs(LATENTS_OUT))
    before = dict(vars(block))
    assert torch.equal(check_block(block).get("latents"), 2.0 * tiny_inputs()["latents"])
    assert torch.equal(check_block(block, inputs={"latents": torch.ones(1)}).latents, torch.tensor([2.0]))
    assert vars(block) == before


def test_a_loop_block_is_called_with_its_step_and_given_its_start_and_finish() -> None:
    def body(components: Any, block_state: Any, i: int) -> None:
        block_state.noise_pred = [i, block_state.window_index, block_state.stop_requested]

    seen = loop(body, **outputs(OutputParam("noise_pred", list, "What was seen.")))
    assert [check_block(seen, i=i).noise_pred for i in (0, 2)] == [[0, 0, False], [2, 2, False]]
    calls: list[str] = []

    class Observer(LoopBlock):
        description = "Notes its calls."

        def start(self, components: Any, block_state: Any) -> None:
            calls.append("start")

        def __call__(self, components: Any, block_state: Any, i: int, t: Any) -> Any:
            calls.append(f"step {i}")
            return components, block_state

        def finish(self, components: Any, block_state: Any, repeat: Any) -> None:
            repeat(0)
            calls.append("finish")

    check_block(Observer(), i=1)
    assert calls == ["start", "step 1", "step 0", "step 1", "finish"] * 2


def test_inputs_by_kind_components_and_configuration_are_given() -> None:
    fields = InputParam(kwargs_type="denoiser_input_fields", type_hint=torch.Tensor, description="Conditioning.")
    unet, seen = tiny_sdxl_unet(3), list[Any]()

    def body(components: Any, state: Any, block_state: Any) -> None:
        assert {"prompt_embeds", "add_time_ids", "mine"} <= block_state.denoiser_input_fields.keys()
        assert block_state.mine is state.get_by_kwargs("denoiser_input_fields")["mine"]
        seen.extend([components.unet, components.config.shift, components.num_channels_unet])

    configs = [ConfigSpec("shift", 1.0, "A number.")]
    block = leaf(body, inputs=[fields], expected_components=[UNET], expected_configs=configs)
    check_block(block, inputs={"mine": torch.zeros(1)})
    assert seen[1:3] == [1.0, 4]
    check_block(block, inputs={"mine": torch.zeros(1)}, components={"unet": unet, "shift": 3.0, "vae": None})
    assert seen[-3] is unet and seen[-2] == 3.0


FAULTS: dict[str, tuple[ModularPipelineBlocks, str]] = {
    "attribute": (leaf(lambda c, s, b: b.mask), r"FaultyStep reads 'mask' without .*; add InputParam\(\"mask"),
    "attribute of the state": (leaf(lambda c, s, b: s.mask), "reads 'mask'"),
    "state.get": (leaf(lambda c, s, b: s.get("mask")), "reads 'mask'"),
    "state.get of several": (leaf(lambda c, s, b: s.get(["latents", "mask", "noise"])), "reads 'mask' and 'noise'"),
    "in a loop": (loop(lambda c, b, i: getattr(b, "noise_pred", None)), "reads 'noise_pred'"),
    "in a loop, by item": (loop(lambda c, b, i: b["noise_pred"]), "reads 'noise_pred'"),
    "write": (leaf(lambda c, s, b: s.set("mask", 1)), r"writes 'mask' without declaring it; add OutputParam\(\"mask"),
    "change of an input": (leaf(lambda c, s, b: double(b)), "writes 'latents' without declaring it"),
    "in-place change": (leaf(lambda c, s, b: b.latents.mul_(2.0)), "changes 'latents' in place"),
    "in-place change in a list": (leaf(lambda c, s, b: b.tensors[0].mul_(2.0), inputs=[TENSORS]), "changes 'tensors'"),
    "write in a loop": (loop(lambda c, b, i: setattr(b, "scratch", 1)), "writes 'scratch'"),
    "in-place change in a loop": (loop(lambda c, b, i: b.latents.add_(1.0)), "changes 'latents' in place"),
    "stop without saying so": (loop(lambda c, b, i: setattr(b, "stop_requested", True)), "writes 'stop_requested'"),
    "missing output": (make_block(lambda self, c, s: (c, s), **outputs(MASK_OUT)), "does not write 'mask', declared"),
    "missing output in a loop": (loop(lambda c, b, i: None, **outputs(MASK_OUT)), "does not write 'mask'"),
    "output's type": (leaf(lambda c, s, b: setattr(b, "mask", "1"), **outputs(MASK_OUT)), "not of the declared type_"),
    "list for a tensor": (
        leaf(lambda c, s, b: setattr(b, "latents", [b.latents]), **outputs(LATENTS_OUT)),
        "writes 'latents', which is not of the declared type_hint",
    ),
    "component": (leaf(lambda c, s, b: c.unet), r"touches the component 'unet'.*add ComponentSpec\(\"unet\""),
    "component, if there": (leaf(lambda c, s, b: getattr(c, "unet", None)), "touches the component 'unet'"),
    "component through a property": (leaf(lambda c, s, b: c.vae_scale_factor), "touches the component 'vae'"),
    "component through a method": (leaf(lambda c, s, b: c.enable_freeu(1, 1, 1, 1)), "touches the component 'unet'"),
    "component in a loop": (loop(lambda c, b, i: c.num_channels_latents), "touches the component 'vae'"),
    "other values at the second call": (leaf(hold([]), **outputs(LATENTS_OUT)), "leaves another 'latents' at the sec"),
    "no description": (make_block(lambda self, c, s: (c, s), description=""), "has no description"),
    "input without type": (
        leaf(lambda c, s, b: None, inputs=[InputParam("latents", description="Latents.")]),
        "declares 'latents' in `inputs` without a type; pass type_hint= to InputParam",
    ),
    "component without description": (
        leaf(lambda c, s, b: None, expected_components=[ComponentSpec("unet", UNet2DConditionModel)]),
        "declares 'unet' in `expected_components` without a description; pass description= to ComponentSpec",
    ),
    "one name twice": (leaf(lambda c, s, b: None, inputs=[LATENTS] * 2), "'latents' in `inputs` more than once"),
    "nothing returned": (make_block(lambda self, c, s: None), "end with `return components, state`"),
    "nothing returned in a loop": (make_block(lambda self, c, b, i, t: None), "end with `return components, block_st"),
}


@pytest.mark.parametrize(("block", "message"), FAULTS.values(), ids=FAULTS)
def test_a_breach_is_found_and_named(block: ModularPipelineBlocks, message: str) -> None:
    with pytest.raises(BlockContractError, match=message) as caught:
        check_block(block)
    assert "\n" not in str(caught.value)


def test_all_breaches_of_a_run_are_named_at_once() -> None:
    block = leaf(lambda components, state, block_state: state.set("noise", (state.get("mask"), components.vae)))
    with pytest.raises(BlockContractError, match=r"reads 'mask'.*\n.* touches the component 'vae'"):
        check_block(block)
    with pytest.raises(ZeroDivisionError):  # a block's own error is handed on
        check_block(leaf(lambda components, state, block_state: 1 / 0))


def test_what_the_loop_provides_may_be_given() -> None:
    class Step(ModularPipelineBlocks):
        model_name, description, inputs = "stable-diffusion-xl", "Notes the window.", [LATENTS]
        intermediate_outputs = [OutputParam("seen", type_hint=int, description="The window.")]  # noqa: RUF012

        def __call__(self, components: Any, block_state: Any, i: int, t: Any) -> Any:
            block_state.seen = block_state.window_index
            return components, block_state

    assert check_block(Step()).seen == 0 and check_block(Step(), i=3).seen == 3
    assert check_block(Step(), inputs={"window_index": 2}).seen == 2


def test_what_is_neither_known_nor_given_is_asked_for() -> None:
    unknown = InputParam("sketch", required=True, type_hint=int, description="A sketch.")
    block = leaf(lambda c, s, b: None, inputs=[unknown])
    with pytest.raises(ValueError, match=r'requires the input \'sketch\'.*pass inputs=\{"sketch": ...\}'):
        check_block(block)
    assert check_block(block, inputs={"sketch": 3}).get("sketch") == 3
    with pytest.raises(ValueError, match="declares no input 'mask'; leave it out"):
        check_block(block, inputs={"sketch": 3, "mask": 1})
    with pytest.raises(ValueError, match=r"needs the component 'net', .* pass components="):
        check_block(leaf(lambda c, s, b: None, expected_components=[ComponentSpec("net", torch.nn.Linear, "One.")]))
    with pytest.raises(ValueError, match=r"is not a block; pass an instance of a block class, such as MyStep\(\)"):
        check_block(ModularPipelineBlocks)


def test_blocks_inside_a_loop_and_an_assembly_are_checked_too() -> None:
    block = PeRFlowDenoiseStep()
    block.sub_blocks.insert("undescribed", loop(lambda c, b, i: None, description=""), 1)
    with pytest.raises(BlockContractError, match="PeRFlowDenoiseStep holds FaultyStep, which has no description"):
        check_block(block)
    decode = SequentialPipelineBlocks.from_blocks_dict({"decode": StableDiffusionXLDecodeStep()})
    assert check_block(decode).get("images")[0].size == (32, 32)


# The tiny components


def run_stock(components: dict[str, Any], adapters: int = 0, **inputs: Any) -> torch.Tensor:
    """Final latents of diffusers' own blocks."""
    pipe: Any = make_pipeline(StableDiffusionXLAutoBlocks(), **components)
    if adapters:
        load_tiny_ip_adapter(pipe, adapters)
    return run(pipe, height=32, width=32, num_inference_steps=2, **inputs)


CASES: dict[str, tuple[dict[str, Any], int, Callable[[Any], dict[str, Any]]]] = {
    "ControlNets": (
        {"controlnet": MultiControlNetModel([tiny_controlnet(1), tiny_controlnet(2)])},
        0,
        lambda image: {"control_image": [tiny_image(0), image]},
    ),
    "union": (
        {"controlnet": tiny_controlnet_union(1)},
        0,
        lambda image: {"control_image": [image], "control_mode": [1]},
    ),
    "IP-Adapters": ({}, 2, lambda image: {"ip_adapter_image": [tiny_image(0), image]}),
}


@pytest.mark.parametrize(("components", "adapters", "inputs"), CASES.values(), ids=CASES)
def test_images_show_in_the_result(components: Any, adapters: int, inputs: Any) -> None:
    first, second = (run_stock(components, adapters, **inputs(tiny_image(seed))) for seed in (1, 2))
    assert (first - second).std() > 0.005 * first.std()


@pytest.mark.parametrize("make", [tiny_controlnet, tiny_controlnet_union, tiny_image_encoder, tiny_inpainting_unet])
def test_models_are_made_of_their_seed_alone(make: Callable[[int], torch.nn.Module]) -> None:
    before = torch.get_rng_state()
    first, again, other = (make(seed).state_dict() for seed in (0, 0, 1))
    tiny_inputs()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


def test_images_and_masks_have_the_size_that_is_asked_for() -> None:
    assert tiny_image(size=(24, 40)).size == tiny_mask((24, 40)).size == (24, 40)
    mask = tiny_mask((8, 4))
    assert [mask.getpixel(at) for at in ((7, 3), (4, 1), (3, 3), (7, 0))] == [255, 255, 0, 0]
