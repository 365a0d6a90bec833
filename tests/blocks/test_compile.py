"""`compile_loops`: what it compiles, and the same images. Torch's `eager` backend traces and compiles nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from perflow_blocks import AttentionConfig, PeRFlowSDXLAutoBlocks, compile_loops
from perflow_blocks.testing import tiny_controlnet_union, tiny_picture
from tests.blocks.conftest import loop_inputs, loop_pipeline
from tests.conftest import run


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


@pytest.mark.behaviour
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
    inputs = {"control_image": tiny_picture(1), "control_mode": 1, "num_inference_steps": 4}
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
