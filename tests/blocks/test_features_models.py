"""Switches on the models, from outside: FreeU, VAE tiling and slicing, fused projections. Each can be undone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from perflow_blocks.delta.merge import merge_record
from perflow_blocks.testing.tiny import IMAGE_SIZE, load_tiny_ip_adapter, tiny_picture
from tests.blocks.conftest import workflow_inputs, write_delta
from tests.conftest import make_pipeline, run

pytestmark = pytest.mark.behaviour

FREEU = {"s1": 0.9, "s2": 0.2, "b1": 1.3, "b2": 1.4}

workflows = pytest.mark.parametrize("workflow", ["inpainting"])


@pytest.fixture(scope="module")
def pipe() -> Any:
    """One pipeline for all: a switch that stays on makes another test fail."""
    return make_pipeline()


def decoded_rows(pipe: Any) -> list[int]:
    """The batch sizes of the VAE's decoder, appended to as it runs."""
    rows: list[int] = []
    pipe.vae.decoder.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    return rows


@workflows
def test_freeu_changes_the_picture_and_can_be_turned_off(pipe: Any, workflow: str) -> None:
    plain = run(pipe, **workflow_inputs(workflow))
    pipe.enable_freeu(**FREEU)
    changed = run(pipe, **workflow_inputs(workflow))
    again = run(pipe, **workflow_inputs(workflow))
    pipe.enable_freeu(**{name: 1.0 for name in FREEU})
    neutral = run(pipe, **workflow_inputs(workflow))
    pipe.disable_freeu()
    assert (changed - plain).abs().max() > 0.1
    assert torch.equal(changed, again)
    torch.testing.assert_close(neutral, plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(run(pipe, **workflow_inputs(workflow)), plain)


@workflows
def test_a_larger_picture_is_decoded_in_tiles_close_to_the_whole(workflow: str) -> None:
    pipe = make_pipeline()
    rows = decoded_rows(pipe)
    size = {"height": 2 * IMAGE_SIZE, "width": 3 * IMAGE_SIZE // 2}
    latents = torch.randn(1, 4, IMAGE_SIZE, 3 * IMAGE_SIZE // 4, generator=torch.Generator().manual_seed(0))
    inputs = workflow_inputs(workflow) | size | {"latents": latents, "output_type": "pt"}
    whole = run(pipe, **inputs)
    assert len(rows) == 1
    pipe.vae.enable_tiling()
    tiled = run(pipe, **inputs)
    assert len(rows) == 1 + 3 * 2  # tiles of 16 latents, 12 apart: at 0, 12, 24 down and 0, 12 across
    assert tiled.shape == whole.shape == (1, 3, size["height"], size["width"])
    # Attention and normalization see a tile where they saw the picture, so the two differ, but little.
    assert (tiled - whole).abs().mean() < 0.2 * whole.std()
    assert torch.corrcoef(torch.stack([tiled.flatten(), whole.flatten()]))[0, 1] > 0.97


@workflows
def test_fused_projections_agree_and_can_be_taken_apart(workflow: str) -> None:
    pipe = make_pipeline()
    inputs = workflow_inputs(workflow) | {"output_type": "pt"}
    plain, processors = run(pipe, **inputs), dict(pipe.unet.attn_processors)
    pipe.fuse_qkv_projections()
    assert {type(processor).__name__ for processor in pipe.unet.attn_processors.values()} == {"FusedAttnProcessor2_0"}
    torch.testing.assert_close(run(pipe, **inputs), plain, rtol=0, atol=1e-5)
    pipe.unfuse_qkv_projections()
    assert pipe.unet.attn_processors == processors
    assert torch.equal(run(pipe, **inputs), plain)


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """dW between two tiny UNets, whole and (under True) of the attention alone."""
    folder = tmp_path_factory.mktemp("delta")
    return {bool(part): write_delta(folder / f"delta{part}.safetensors", part=part) for part in ("", ".attn")}


@pytest.mark.parametrize("partial", [True])
def test_fused_projections_refuse_a_delta(delta: dict[bool, Path], partial: bool) -> None:
    """They are copies of the weights, which a merge would leave as they were."""
    pipe = make_pipeline()
    pipe.unet.fuse_qkv_projections()
    fused = run(pipe)
    with pytest.raises(ValueError, match="fused projections"):
        run(pipe, delta=delta[partial])
    assert merge_record(pipe.unet) is None
    assert torch.equal(run(pipe), fused)
    pipe.unet.unfuse_qkv_projections()  # what the error told to do
    merged = run(pipe, delta=delta[partial])
    assert torch.equal(merged, run(make_pipeline(), delta=delta[partial]))
    pipe.unet.fuse_qkv_projections()
    torch.testing.assert_close(run(pipe), merged, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("partial", [True])
def test_an_ip_adapter_does_not_stand_in_the_way_of_a_delta(delta: dict[bool, Path], partial: bool) -> None:
    """Its weights stand beside the model's own, so the order makes no difference."""
    inputs = {"ip_adapter_image": tiny_picture(), "num_inference_steps": 4}
    before, after = make_pipeline(), make_pipeline()
    load_tiny_ip_adapter(before)
    merged = run(before, **inputs, delta=delta[partial])
    plain = run(after, num_inference_steps=4, delta=delta[partial])
    load_tiny_ip_adapter(after)
    assert torch.equal(run(after, **inputs, delta=delta[partial]), merged)
    assert not torch.allclose(merged, plain, atol=0.1)
    before.unload_ip_adapter()
    assert torch.equal(run(before, num_inference_steps=4), plain)
