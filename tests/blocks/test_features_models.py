"""Switches on the models, from outside: FreeU, VAE tiling and slicing, fused projections. Each can be undone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from perflow_blocks.delta.merge import merge_record
from perflow_blocks.testing.tiny import IMAGE_SIZE
from tests.blocks.conftest import workflow_inputs, write_delta
from tests.conftest import make_pipeline, run

pytestmark = pytest.mark.behaviour

FREEU = {"s1": 0.9, "s2": 0.2, "b1": 1.3, "b2": 1.4}


@pytest.fixture(scope="module")
def pipe() -> Any:
    """One pipeline for all: a switch that stays on makes another test fail."""
    return make_pipeline()


def decoded_rows(pipe: Any) -> list[int]:
    """The batch sizes of the VAE's decoder, appended to as it runs."""
    rows: list[int] = []
    pipe.vae.decoder.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    return rows


def test_freeu_changes_the_picture_and_can_be_turned_off(pipe: Any) -> None:
    plain = run(pipe, **workflow_inputs("text2image"))
    pipe.enable_freeu(**FREEU)
    changed = run(pipe, **workflow_inputs("text2image"))
    again = run(pipe, **workflow_inputs("text2image"))
    pipe.enable_freeu(**{name: 1.0 for name in FREEU})
    neutral = run(pipe, **workflow_inputs("text2image"))
    pipe.disable_freeu()
    assert (changed - plain).abs().max() > 0.1
    assert torch.equal(changed, again)
    torch.testing.assert_close(neutral, plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(run(pipe, **workflow_inputs("text2image")), plain)


def test_sliced_decoding_gives_the_same_pictures() -> None:
    pipe = make_pipeline()
    rows = decoded_rows(pipe)
    inputs = workflow_inputs("text2image") | {"num_images_per_prompt": 3, "output_type": "pt"}
    whole = run(pipe, **inputs)
    pipe.vae.enable_slicing()
    sliced = run(pipe, **inputs)
    pipe.vae.disable_slicing()
    assert rows == [3, 1, 1, 1]
    torch.testing.assert_close(sliced, whole, rtol=0, atol=1e-5)
    assert not torch.allclose(whole[0], whole[1], atol=1e-2)
    assert torch.equal(run(pipe, **inputs), whole)


def test_a_larger_picture_is_decoded_in_tiles_close_to_the_whole() -> None:
    pipe = make_pipeline()
    rows = decoded_rows(pipe)
    size = {"height": 2 * IMAGE_SIZE, "width": 3 * IMAGE_SIZE // 2}
    latents = torch.randn(1, 4, IMAGE_SIZE, 3 * IMAGE_SIZE // 4, generator=torch.Generator().manual_seed(0))
    inputs = workflow_inputs("text2image") | size | {"latents": latents, "output_type": "pt"}
    whole = run(pipe, **inputs)
    assert len(rows) == 1
    pipe.vae.enable_tiling()
    tiled = run(pipe, **inputs)
    assert len(rows) == 1 + 3 * 2  # tiles of 16 latents, 12 apart: at 0, 12, 24 down and 0, 12 across
    assert tiled.shape == whole.shape == (1, 3, size["height"], size["width"])
    # Attention and normalization see a tile where they saw the picture, so the two differ, but little.
    assert (tiled - whole).abs().mean() < 0.2 * whole.std()
    assert torch.corrcoef(torch.stack([tiled.flatten(), whole.flatten()]))[0, 1] > 0.97


def test_fused_projections_agree_and_can_be_taken_apart() -> None:
    pipe = make_pipeline()
    inputs = workflow_inputs("text2image") | {"output_type": "pt"}
    plain, processors = run(pipe, **inputs), dict(pipe.unet.attn_processors)
    pipe.fuse_qkv_projections()
    assert {type(processor).__name__ for processor in pipe.unet.attn_processors.values()} == {"FusedAttnProcessor2_0"}
    torch.testing.assert_close(run(pipe, **inputs), plain, rtol=0, atol=1e-5)
    pipe.unfuse_qkv_projections()
    assert pipe.unet.attn_processors == processors
    assert torch.equal(run(pipe, **inputs), plain)


def test_fused_projections_refuse_a_delta(tmp_path: Path) -> None:
    """They are copies of the weights, which a merge would leave as they were."""
    pipe, delta = make_pipeline(), write_delta(tmp_path / "delta.safetensors")
    pipe.unet.fuse_qkv_projections()
    fused = run(pipe)
    with pytest.raises(ValueError, match="fused projections"):
        run(pipe, delta=delta)
    assert merge_record(pipe.unet) is None
    assert torch.equal(run(pipe), fused)
    pipe.unet.unfuse_qkv_projections()  # what the error told to do
    merged = run(pipe, delta=delta)
    assert torch.equal(merged, run(make_pipeline(), delta=delta))
    pipe.unet.fuse_qkv_projections()
    torch.testing.assert_close(run(pipe), merged, rtol=1e-4, atol=1e-4)
