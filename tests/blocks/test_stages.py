"""Pipelines made of parts of the preset hand their states on, whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from perflow_blocks.blocks import PeRFlowSDXLAutoBlocks
from perflow_blocks.testing.tiny import tiny_mask, tiny_picture, tiny_sdxl_components
from tests.conftest import generator, make_pipeline

pytestmark = pytest.mark.behaviour

TASKS: dict[str, dict[str, Any]] = {
    "text2image": {},
    "inpainting": {"image": tiny_picture(1), "mask_image": tiny_mask()},
}


def stage(block: Any) -> Any:
    """A pipeline of one block, with those of the tiny components that it declares."""
    pipe = block.init_pipeline()
    pipe.update_components(**{n: c for n, c in tiny_sdxl_components().items() if n in block.component_names})
    return pipe


@pytest.mark.parametrize("task", TASKS)
def test_a_state_is_handed_from_pipeline_to_pipeline(task: str) -> None:
    inputs = {"prompt": "a star", "negative_prompt": "a ring", "num_inference_steps": 4, **TASKS[task]}
    whole = make_pipeline()(**inputs, generator=generator(), output_type="pt")
    blocks = PeRFlowSDXLAutoBlocks()
    text, encode, decode = (stage(blocks.sub_blocks.pop(name)) for name in ("text_encoder", "vae_encoder", "decode"))
    denoise = make_pipeline(blocks, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None)
    state = text(**{name: inputs[name] for name in ("prompt", "negative_prompt")})
    if "image" in inputs:
        pictures = {name: inputs[name] for name in ("image", "mask_image") if name in inputs}
        state = encode(state=state, **pictures, generator=(noise := generator()))
    else:
        noise = generator()
    settings = {name: inputs[name] for name in ("num_inference_steps", "strength") if name in inputs}
    state = denoise(state=state, **settings, generator=noise)
    assert torch.equal(state.get("latents"), whole.get("latents"))
    state = decode(state=state, output_type="pt")
    torch.testing.assert_close(state.get("images"), whole.get("images"))
