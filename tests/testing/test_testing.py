"""`check_block` lets pass what keeps to its contract, and finds each way to break it."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ClassifierFreeGuidance, UNet2DConditionModel
from diffusers.modular_pipelines.modular_pipeline import (
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
    PipelineState,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, ConfigSpec, InputParam, OutputParam
from diffusers.modular_pipelines.stable_diffusion_xl.decoders import StableDiffusionXLDecodeStep

from perflow_blocks.blocks import PeRFlowDenoiseStep
from perflow_blocks.blocks.loop_block import LoopBlock
from perflow_blocks.testing import BlockContractError, check_block, contract, tiny_inputs, tiny_sdxl_unet

LATENTS = InputParam("latents", required=True, type_hint=torch.Tensor, description="Latents.")
LATENTS_OUT = OutputParam("latents", torch.Tensor, "Latents.")
TENSORS = InputParam("tensors", list, [torch.ones(1)], description="A list of one.")
UNET = ComponentSpec("unet", UNet2DConditionModel, description="The UNet.")


def test_the_example_in_the_documentation_runs() -> None:
    result = doctest.testmod(contract)
    assert result.attempted > 3
    assert result.failed == 0


# ---- blocks that keep to what they say, or do not


def make_block(
    call: Callable[..., Any],
    *,
    inputs: list[InputParam] | None = None,
    outputs: list[OutputParam] | None = None,
    components: list[ComponentSpec] | None = None,
    configs: list[ConfigSpec] | None = None,
    description: str = "A block.",
) -> ModularPipelineBlocks:
    members = {
        "description": property(lambda self: description),
        "inputs": property(lambda self: inputs if inputs is not None else [LATENTS]),
        "intermediate_outputs": property(lambda self: outputs or []),
        "expected_components": property(lambda self: components or []),
        "expected_configs": property(lambda self: configs or []),
        "__call__": call,
    }
    return type("FaultyStep", (ModularPipelineBlocks,), members)()


def leaf(body: Callable[[Any, PipelineState, Any], Any], **declared: Any) -> ModularPipelineBlocks:
    """A block of a pipeline that does `body(components, state, block_state)` between the usual lines."""

    def call(self: Any, components: Any, state: PipelineState) -> Any:
        block_state = self.get_block_state(state)
        body(components, state, block_state)
        self.set_block_state(state, block_state)
        return components, state

    return make_block(call, **declared)


def loop(body: Callable[[Any, Any, int, Any], Any], **declared: Any) -> ModularPipelineBlocks:
    """A block of a loop that does `body(components, block_state, i, t)`."""

    def call(self: Any, components: Any, block_state: Any, i: int, t: torch.Tensor) -> Any:
        body(components, block_state, i, t)
        return components, block_state

    return make_block(call, **declared)


def double(block_state: Any) -> None:
    block_state.latents = 2.0 * block_state.latents


def test_a_leaf_block_returns_the_state_it_leaves() -> None:
    block = leaf(lambda components, state, block_state: double(block_state), outputs=[LATENTS_OUT])
    state = check_block(block)
    assert torch.equal(state.get("latents"), 2.0 * tiny_inputs()["latents"])
    assert torch.equal(check_block(block, inputs={"latents": torch.ones(1)}).latents, torch.tensor([2.0]))


def test_a_loop_block_is_called_with_its_step() -> None:
    def body(components: Any, block_state: Any, i: int, t: torch.Tensor) -> None:
        block_state.noise_pred = [i, int(t), block_state.window_index, block_state.stop_requested]

    block = loop(body, outputs=[OutputParam("noise_pred", list, "What was seen.")])
    assert check_block(block).noise_pred == [0, 1000, 0, False]
    assert check_block(block, i=2).noise_pred == [2, 500, 2, False]
    with pytest.raises(ValueError, match="i=4 is none of the 4 steps; pass 0 to 3"):
        check_block(block, i=4)


def test_a_block_with_a_start_and_a_finish_is_given_both() -> None:
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
    assert calls == ["start", "step 1", "step 0", "step 1", "finish"]


def test_the_block_itself_stays_as_it_is() -> None:
    block = leaf(lambda components, state, block_state: double(block_state), outputs=[LATENTS_OUT])
    before = dict(vars(block))
    check_block(block)
    assert vars(block) == before


def test_scratch_attributes_of_a_leaf_block_are_its_own() -> None:
    def body(components: Any, state: Any, block_state: Any) -> None:
        block_state.scratch = 1
        assert block_state.scratch == 1

    check_block(leaf(body))


def test_inputs_by_kind_are_given_and_may_be_read() -> None:
    fields = InputParam(kwargs_type="denoiser_input_fields", type_hint=torch.Tensor, description="Conditioning.")
    seen: dict[str, Any] = {}

    def body(components: Any, state: Any, block_state: Any) -> None:
        seen.update(state.get_by_kwargs("denoiser_input_fields"))
        assert block_state.mine is seen["mine"] is block_state.denoiser_input_fields["mine"]

    check_block(leaf(body, inputs=[fields]), inputs={"mine": torch.zeros(1)})
    assert {"prompt_embeds", "negative_prompt_embeds", "add_time_ids", "mine"} <= set(seen)


def test_components_and_configuration_can_be_given() -> None:
    unet, seen = tiny_sdxl_unet(3), []

    def body(components: Any, state: Any, block_state: Any) -> None:
        seen.extend([components.unet, components.config.shift, components.num_channels_unet])

    block = leaf(body, components=[UNET], configs=[ConfigSpec("shift", 1.0, "A number.")])
    check_block(block)
    check_block(block, components={"unet": unet, "shift": 3.0, "vae": None})
    assert seen[1:3] == [1.0, 4]
    assert seen[3] is unet
    assert seen[4] == 3.0


def read_attribute(components: Any, state: Any, block_state: Any) -> None:
    _ = block_state.mask


def write_state(components: Any, state: Any, block_state: Any) -> None:
    state.set("mask", 1)


FAULTS: dict[str, tuple[ModularPipelineBlocks, str]] = {
    "attribute": (leaf(read_attribute), r"FaultyStep reads 'mask' without declaring it; add InputParam\(\"mask\""),
    "attribute of the state": (leaf(lambda c, s, b: s.mask), "reads 'mask'"),
    "getattr with a default": (leaf(lambda c, s, b: getattr(b, "mask", None)), "reads 'mask'"),
    "hasattr": (leaf(lambda c, s, b: hasattr(b, "mask")), "reads 'mask'"),
    "item of the block state": (leaf(lambda c, s, b: b["mask"]), "reads 'mask'"),
    "state.get": (leaf(lambda c, s, b: s.get("mask")), "reads 'mask'"),
    "state.get of several": (leaf(lambda c, s, b: s.get(["latents", "mask", "noise"])), "reads 'mask' and 'noise'"),
    "state.values": (leaf(lambda c, s, b: s.values["mask"]), "reads 'mask'"),
    "state.values.get": (leaf(lambda c, s, b: s.values.get("mask")), "reads 'mask'"),
    "name in state.values": (leaf(lambda c, s, b: "mask" in s.values), "reads 'mask'"),
    "state.values.pop": (leaf(lambda c, s, b: s.values.pop("mask", None)), "reads 'mask'"),
    "a kind": (leaf(lambda c, s, b: s.get_by_kwargs("denoiser_input_fields")), "reads 'denoiser_input_fields'"),
    "an output before it is there": (
        leaf(lambda c, s, b: setattr(b, "mask", getattr(b, "mask", 0)), outputs=[OutputParam("mask", int, "One.")]),
        "reads 'mask' without declaring it",
    ),
    "in a loop": (loop(lambda c, b, i, t: getattr(b, "noise_pred", None)), "reads 'noise_pred'"),
    "in a loop, by attribute": (loop(lambda c, b, i, t: b.noise_pred), "reads 'noise_pred'"),
    "write": (leaf(write_state), r"writes 'mask' without declaring it; add OutputParam\(\"mask\""),
    "write around the state": (leaf(lambda c, s, b: s.values.setdefault("mask", 1)), "writes 'mask'"),
    "change of an input": (leaf(lambda c, s, b: double(b)), "writes 'latents' without declaring it"),
    "in-place change": (leaf(lambda c, s, b: b.latents.mul_(2.0)), "changes 'latents' in place"),
    "in-place change in a list": (
        leaf(
            lambda c, s, b: b.tensors[1].mul_(2.0),
            inputs=[InputParam("tensors", list, [torch.ones(1)] * 2, description="Two.")],
        ),
        "changes 'tensors' in place",
    ),
    "write in a loop": (loop(lambda c, b, i, t: double(b)), "writes 'latents' without declaring it"),
    "scratch in a loop": (loop(lambda c, b, i, t: setattr(b, "scratch", 1)), "writes 'scratch'"),
    "in-place change in a loop": (loop(lambda c, b, i, t: b.latents.add_(1.0)), "changes 'latents' in place"),
    "stop without saying so": (loop(lambda c, b, i, t: setattr(b, "stop_requested", True)), "writes 'stop_requested'"),
    "missing output": (
        leaf(lambda c, s, b: None, outputs=[OutputParam("mask", int, "One.")]),
        "does not write 'mask', declared in `intermediate_outputs`",
    ),
    "missing output in a loop": (
        loop(lambda c, b, i, t: None, outputs=[OutputParam("noise_pred", int, "One.")]),
        "does not write 'noise_pred'",
    ),
    "component": (
        leaf(lambda c, s, b: c.unet),
        r"touches the component 'unet' without declaring it.*add ComponentSpec\(\"unet\"",
    ),
    "component, if there": (leaf(lambda c, s, b: getattr(c, "unet", None)), "touches the component 'unet'"),
    "component through a property": (leaf(lambda c, s, b: c.vae_scale_factor), "touches the component 'vae'"),
    "components through a property of properties": (
        leaf(lambda c, s, b: c.default_height, components=[UNET]),
        "touches the component 'vae'",
    ),
    "component through a method": (leaf(lambda c, s, b: c.enable_freeu(1, 1, 1, 1)), "touches the component 'unet'"),
    "component replaced": (
        leaf(lambda c, s, b: c.update_components(guider=ClassifierFreeGuidance())),
        "touches the component 'guider'",
    ),
    "component set": (leaf(lambda c, s, b: setattr(c, "guider", 1)), "touches the component 'guider'"),
    "component in a loop": (loop(lambda c, b, i, t: c.num_channels_latents), "touches the component 'vae'"),
    "configuration": (
        leaf(lambda c, s, b: c.config.shift),
        r"reads the configuration 'shift' without declaring it; add ConfigSpec\(\"shift\"",
    ),
    "configuration, if there": (leaf(lambda c, s, b: c.config.get("shift", 1.0)), "reads the configuration 'shift'"),
    "no description": (leaf(lambda c, s, b: None, description=""), "has no description"),
    "input without type": (
        leaf(lambda c, s, b: None, inputs=[InputParam("latents", description="Latents.")]),
        "declares 'latents' in `inputs` without a type; pass type_hint= to InputParam",
    ),
    "input without description": (
        leaf(lambda c, s, b: None, inputs=[LATENTS, InputParam("mask", type_hint=int)]),
        "declares 'mask' in `inputs` without a description",
    ),
    "output without type": (
        leaf(lambda c, s, b: double(b), outputs=[OutputParam("latents", description="Latents.")]),
        "declares 'latents' in `intermediate_outputs` without a type; pass type_hint= to OutputParam",
    ),
    "component without description": (
        leaf(lambda c, s, b: None, components=[ComponentSpec("unet", UNet2DConditionModel)]),
        "declares 'unet' in `expected_components` without a description",
    ),
    "configuration without description": (
        leaf(lambda c, s, b: None, configs=[ConfigSpec("shift", 1.0)]),
        "declares 'shift' in `expected_configs` without a description",
    ),
    "one name twice": (
        leaf(lambda c, s, b: None, inputs=[LATENTS, LATENTS]),
        "declares 'latents' more than once in `inputs`",
    ),
    "two guiders": (
        leaf(lambda c, s, b: None, components=[UNET, ComponentSpec("unet", AutoencoderKL, "The VAE.")]),
        "declares 'unet' more than once in `expected_components`",
    ),
    "nothing returned": (make_block(lambda self, components, state: None), "returns NoneType; end with `return comp"),
    "state alone returned": (make_block(lambda self, components, state: state), "end with `return components, state`"),
    "another state returned": (
        make_block(lambda self, components, state: (components, self.get_block_state(state))),
        "returns other objects than it was given; end with `return components, state`",
    ),
    "nothing returned in a loop": (
        make_block(lambda self, components, block_state, i, t: None),
        "returns NoneType; end with `return components, block_state`",
    ),
}


@pytest.mark.parametrize(("block", "message"), FAULTS.values(), ids=FAULTS)
def test_a_breach_is_found_and_named(block: ModularPipelineBlocks, message: str) -> None:
    with pytest.raises(BlockContractError, match=message) as caught:
        check_block(block)
    assert "\n" not in str(caught.value)


def test_all_breaches_of_a_run_are_named_at_once() -> None:
    def body(components: Any, state: Any, block_state: Any) -> None:
        state.get("mask")
        state.set("noise", components.vae_scale_factor)

    with pytest.raises(BlockContractError) as caught:
        check_block(leaf(body))
    assert [line.split(";")[0].split(" without")[0] for line in str(caught.value).splitlines()] == [
        "FaultyStep reads 'mask'",
        "FaultyStep touches the component 'vae'",
        "FaultyStep writes 'noise'",
    ]


def test_an_output_that_is_computed_and_not_handed_over_is_missing() -> None:
    def call(self: Any, components: Any, state: PipelineState) -> Any:
        double(self.get_block_state(state))
        return components, state

    with pytest.raises(BlockContractError, match=r"does not write 'latents'.*self.set_block_state\(state"):
        check_block(make_block(call, outputs=[LATENTS_OUT]))


def test_an_output_that_is_also_an_input_may_stay_as_it_is() -> None:
    check_block(leaf(lambda c, s, b: None, outputs=[LATENTS_OUT]))
    check_block(loop(lambda c, b, i, t: None, outputs=[LATENTS_OUT]))


def test_a_block_that_cannot_run_is_told_why() -> None:
    class NotInitialised(ModularPipelineBlocks):
        description = "Forgets its parent."

        def __init__(self) -> None:
            self.size = 1

    class NotCallable(ModularPipelineBlocks):
        description = "Does nothing."

    with pytest.raises(BlockContractError, match=r"was not initialised; call super\(\).__init__\(\)"):
        check_block(NotInitialised())
    with pytest.raises(BlockContractError, match=r"cannot be called; define __call__"):
        check_block(NotCallable())
    with pytest.raises(ValueError, match=r"is no block; pass an instance of a block class, such as MyStep\(\)"):
        check_block(NotCallable)


def test_a_blocks_own_error_is_handed_on() -> None:
    def body(components: Any, state: Any, block_state: Any) -> None:
        raise KeyError("its own")

    with pytest.raises(KeyError, match="its own"):
        check_block(leaf(body))


def test_an_error_that_follows_from_a_breach_is_its_cause() -> None:
    with pytest.raises(BlockContractError) as caught:
        check_block(leaf(read_attribute))
    assert isinstance(caught.value.__cause__, AttributeError)


def test_what_is_neither_known_nor_given_is_asked_for() -> None:
    unknown = InputParam("sketch", required=True, type_hint=int, description="A sketch.")
    block = leaf(lambda c, s, b: None, inputs=[unknown])
    with pytest.raises(ValueError, match=r'requires the input \'sketch\'.*pass inputs=\{"sketch": ...\}'):
        check_block(block)
    assert check_block(block, inputs={"sketch": 3}).get("sketch") == 3
    with pytest.raises(ValueError, match="declares no input 'mask'; leave it out"):
        check_block(block, inputs={"sketch": 3, "mask": 1})
    with pytest.raises(ValueError, match=r"needs the component 'net', .* pass components="):
        check_block(leaf(lambda c, s, b: None, components=[ComponentSpec("net", torch.nn.Linear, "A layer.")]))


# ---- loops and assembled blocks


class UndeclaredRead(ModularPipelineBlocks):
    description = "Reads in the loop what nobody declares."

    def __call__(self, components: Any, block_state: Any, i: int, t: Any) -> Any:
        getattr(block_state, "mask", None)
        return components, block_state


def test_a_block_inside_a_loop_is_watched() -> None:
    block = PeRFlowDenoiseStep()
    block.sub_blocks.insert("read", UndeclaredRead(), 1)
    with pytest.raises(BlockContractError, match="PeRFlowDenoiseStep reads 'mask'"):
        check_block(block)


def test_a_faulty_declaration_inside_is_named_with_its_block() -> None:
    class Silent(UndeclaredRead):
        description = ""

    block = PeRFlowDenoiseStep()
    block.sub_blocks.insert("read", Silent(), 1)
    with pytest.raises(BlockContractError, match="PeRFlowDenoiseStep holds Silent, which has no description"):
        check_block(block)


def test_a_loop_declares_what_it_takes_itself() -> None:
    class Loop(LoopSequentialPipelineBlocks):
        description = "Runs nothing."
        block_classes = [UndeclaredRead]  # noqa: RUF012
        block_names = ["read"]  # noqa: RUF012
        loop_inputs = [InputParam("latents", type_hint=torch.Tensor)]  # noqa: RUF012

    with pytest.raises(BlockContractError, match="declares 'latents' in `inputs` without a description"):
        check_block(Loop())


def test_an_assembly_is_not_blamed_for_diffusers_blocks_but_for_its_own() -> None:
    class Reads(ModularPipelineBlocks):
        description = "Reads what nobody declares."

        def __call__(self, components: Any, state: PipelineState) -> Any:
            state.get("mask")
            return components, state

    class Preset(SequentialPipelineBlocks):
        description = "Decodes."
        block_classes = [StableDiffusionXLDecodeStep]  # noqa: RUF012
        block_names = ["decode"]  # noqa: RUF012

    state = check_block(Preset())
    assert state.get("images")[0].size == (32, 32)
    preset = Preset()
    preset.sub_blocks.insert("read", Reads(), 0)
    with pytest.raises(BlockContractError, match="Preset reads 'mask'"):
        check_block(preset)
