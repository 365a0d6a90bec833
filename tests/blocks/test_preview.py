"""Previews: the clean latents that a step predicts, in colour, for a callback; nothing without one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, AutoModel
from PIL import Image
from torch import Tensor

from perflow_blocks import LatentToRGB, PreviewStep, insert_loop_block
from perflow_blocks.blocks.observers import SDXL_BIAS, SDXL_FACTORS, decode_preview
from perflow_blocks.testing import check_block
from perflow_blocks.testing.tiny import tiny_vae
from tests.blocks.conftest import Spy, blocks_with, predicted_clean
from tests.conftest import generator, make_pipeline, run

pytestmark = pytest.mark.behaviour

LATENTS = torch.randn(2, 4, 6, 5, generator=generator(3))


def tiny_autoencoder() -> AutoencoderTiny:
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return AutoencoderTiny(**widths, **blocks, upsampling_scaling_factor=2, scaling_factor=2.0).eval()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64)


@pytest.mark.parametrize(("every", "shown"), [(1, [0, 1, 2, 3, 4]), (3, [0, 3])])
def test_every_nth_step_is_shown_from_the_first_on(every: int, shown: list[int]) -> None:
    seen: list[int] = []
    pipe = make_pipeline(blocks_with("preview", PreviewStep, before="solver"))

    def show(i: int, images: list[Image.Image]) -> None:
        seen.append(i)
        assert [(image.mode, image.size) for image in images] == [("RGB", (20, 12))] * 2

    inputs = {"prompt": ["a", "b"], "num_inference_steps": 5, "height": 24, "width": 40}
    previewed = run(pipe, **inputs, preview_callback=show, preview_every=every)
    assert seen == shown
    assert torch.equal(previewed, run(make_pipeline(), **inputs))


def test_a_preview_is_the_prediction_of_the_clean_latents() -> None:
    """Five steps: the second lies inside the first window."""
    shown: list[Image.Image] = []
    seen: list[tuple[Tensor, Tensor]] = []
    blocks = blocks_with("preview", PreviewStep, before="solver")
    insert_loop_block(blocks, "spy", Spy, before="solver")
    run(
        make_pipeline(blocks),
        num_inference_steps=5,
        preview_callback=lambda i, images: shown.extend(images),
        spy=lambda components, state, i: seen.append((state.latents, state.noise_pred)),
    )
    for i, (latents, output) in enumerate(seen):
        clean = predicted_clean(5, i, latents, output)
        red, green, blue = np.einsum("chw,cr->rhw", clean[0].numpy(), np.array(SDXL_FACTORS))
        for channel, colour in enumerate((red, green, blue)):
            expected = 255 * np.clip((colour + SDXL_BIAS[channel]) / 2 + 0.5, 0, 1)
            np.testing.assert_allclose(pixels(shown[i])[..., channel], expected, atol=0.51)
    assert len(shown) == 5


def test_a_decoder_that_overflows_is_refused_before_the_first_step() -> None:
    pipe = make_pipeline(blocks_with("preview", PreviewStep, before="solver"))
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("the UNet ran"))
    vae = tiny_vae().half()
    assert vae.config.force_upcast
    pipe.register_components(preview_decoder=vae)
    with pytest.raises(ValueError, match=r"preview_decoder overflows in torch\.float16"):
        run(pipe, preview_callback=print)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tiny_vae_in_place_of_the_map(dtype: torch.dtype) -> None:
    pipe = make_pipeline(blocks_with("preview", PreviewStep, before="solver"))
    decoder = tiny_autoencoder().to(dtype)
    pipe.register_components(preview_decoder=decoder)
    shown: list[Image.Image] = []
    run(pipe, num_inference_steps=4, preview_callback=lambda i, images: shown.extend(images))
    assert [image.size for image in shown] == [(32, 32)] * 4
    with torch.no_grad():
        sample = decoder.decode((LATENTS / 2.0).to(dtype)).sample.float()
    expected = 255 * (sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    for image, wanted in zip(decode_preview(decoder, LATENTS), expected, strict=True):
        np.testing.assert_allclose(pixels(image), wanted, atol=0.51)


def test_latent_statistics_of_a_vae_are_undone() -> None:
    mean, deviation = [0.1, -0.2, 0.3, 0.0], [1.5, 2.0, 0.5, 1.0]
    plain, shifted = tiny_vae(), tiny_vae()
    shifted.register_to_config(latents_mean=mean, latents_std=deviation)
    factor = plain.config.scaling_factor
    scaled = LATENTS * torch.tensor(deviation)[:, None, None] + factor * torch.tensor(mean)[:, None, None]
    with torch.no_grad():
        for got, expected in zip(decode_preview(shifted, LATENTS), decode_preview(plain, scaled), strict=True):
            np.testing.assert_allclose(pixels(got), pixels(expected), atol=1.0)


def test_a_decoder_from_the_hub_is_saved_and_loaded_with_the_pipeline(tmp_path: Path) -> None:
    tiny_autoencoder().save_pretrained(tmp_path / "tiny")
    pipe = PreviewStep().init_pipeline()
    pipe.update_components(preview_decoder=AutoModel.from_pretrained(str(tmp_path / "tiny")))
    pipe.save_pretrained(str(tmp_path / "saved"), overwrite_modular_index=True)
    again = PreviewStep().init_pipeline(str(tmp_path / "saved"))
    assert again.preview_decoder is None
    again.load_components()
    assert type(again.preview_decoder) is AutoencoderTiny
    for image, same in zip(
        decode_preview(pipe.preview_decoder, LATENTS), decode_preview(again.preview_decoder, LATENTS), strict=True
    ):
        assert np.array_equal(pixels(image), pixels(same))


def test_latent_to_rgb_is_a_linear_map_within_its_range() -> None:
    colours = LatentToRGB(factors=[[1, 0, 0], [0, 2, 0]], bias=[0.0, 0.0, -0.5])
    latents = torch.tensor([0.25, 0.125]).reshape(1, 2, 1, 1).half()
    assert colours.decode(latents).sample.flatten().tolist() == [0.25, 0.25, -0.5]
    assert colours.decode(8 * latents).sample.flatten().tolist() == [1.0, 1.0, -0.5]


def test_the_preview_keeps_its_contract() -> None:
    seen: list[int] = []
    check_block(PreviewStep())
    check_block(
        PreviewStep(),
        inputs={"preview_callback": lambda i, images: seen.append(images[0].width)},
        components={"preview_decoder": tiny_autoencoder()},
    )
    assert seen == [32, 32]  # the block is called twice
