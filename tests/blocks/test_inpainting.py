"""Inpainting: the known part stays what it was, in latents and in pixels, and the hole is painted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from perflow_blocks.schedulers import PeRFlowScheduler
from perflow_blocks.testing.tiny import BETAS, tiny_image, tiny_inpainting_unet
from tests.conftest import generator, make_pipeline, run

pytestmark = pytest.mark.behaviour

PICTURE = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(11))
NOISE = torch.randn(1, 4, 16, 16, generator=generator())
HOLE = torch.zeros(1, 1, 16, 16)
HOLE[..., 4:12, 8:] = 1.0
KNOWN = (HOLE == 0.0).expand_as(PICTURE)


def hole_picture() -> Image.Image:
    """The same hole in pixels: white is painted."""
    pixels = torch.nn.functional.interpolate(HOLE, scale_factor=2)[0, 0]
    return Image.fromarray((pixels.numpy() * 255).astype(np.uint8))


@pytest.mark.parametrize(("strength", "steps"), [(1.0, 4), (0.8, 7), (0.3, 4)])
def test_the_known_part_follows_the_path_and_ends_untouched(strength: float, steps: int) -> None:
    pipe, recorded = make_pipeline(), list[Tensor]()
    state = pipe(
        prompt="a star",
        image_latents=PICTURE,
        mask=HOLE,
        strength=strength,
        num_inference_steps=steps,
        generator=generator(),
        output_type="latent",
        callback_on_step_end=lambda pipe, i, t, kwargs: recorded.append(kwargs["latents"]),
    )
    scheduler = PeRFlowScheduler(**BETAS)
    ends = [round(t * 1000) for t in state.get("step_plan").next_times[:-1]]
    assert len(recorded) == len(ends) + 1
    for timestep, latents in zip(ends, recorded, strict=False):
        expected = scheduler.add_noise_chord(PICTURE, NOISE, torch.tensor(timestep))
        torch.testing.assert_close(latents[KNOWN], expected[KNOWN], rtol=1e-5, atol=1e-5)
        assert (latents - expected)[~KNOWN].abs().max() > 1e-2
    assert torch.equal(state.get("latents")[KNOWN], PICTURE[KNOWN])
    assert (state.get("latents") - PICTURE)[~KNOWN].abs().max() > 1e-2


def test_at_full_strength_the_hole_starts_as_pure_noise() -> None:
    pipe = make_pipeline()
    seen: list[Tensor] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0][:1].clone()))
    run(pipe, image_latents=PICTURE, mask=HOLE, num_inference_steps=4)
    assert torch.equal(seen[0][~KNOWN], NOISE[~KNOWN])
    known = PeRFlowScheduler(**BETAS).add_noise_chord(PICTURE, NOISE, torch.tensor(1000))
    torch.testing.assert_close(seen[0][KNOWN], known[KNOWN])


def as_array(images: Any) -> np.ndarray:
    """The first picture as (height, width, 3) in [0, 1], of any output type."""
    if isinstance(images, Tensor):
        return images[0].permute(1, 2, 0).numpy()
    return np.asarray(images[0]) / 255.0 if isinstance(images, list) else images[0]


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_known_pixels_are_put_back_exactly(kind: str) -> None:
    pipe, picture = make_pipeline(), tiny_image(3)
    given, known = np.asarray(picture) / 255.0, np.asarray(hole_picture()) == 0
    inputs = {"image": picture, "mask_image": hole_picture(), "output_type": kind}
    difference = np.abs(as_array(run(pipe, **inputs)) - given)
    assert difference[known].max() < (1e-9 if kind == "pil" else 1e-6)
    assert difference[~known].max() > 0.05
    decoded = np.abs(as_array(run(pipe, **inputs, keep_known_pixels=False)) - given)
    assert decoded[known].max() > 0.05


def feathered() -> Image.Image:
    """The hole with a grey rim on its left."""
    mask = hole_picture()
    mask.paste(64, (8, 8, 12, 24))
    mask.paste(191, (12, 8, 16, 24))
    return mask


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_a_soft_mask_blends_the_pixels(kind: str) -> None:
    pipe, picture, share = make_pipeline(), tiny_image(3), np.asarray(feathered())[..., None] / 255.0
    inputs = {"image": picture, "mask_image": feathered(), "soft_mask": True, "output_type": kind}
    given, decoded = np.asarray(picture) / 255.0, as_array(run(pipe, **inputs, keep_known_pixels=False))
    result = as_array(run(pipe, **inputs))
    np.testing.assert_allclose(result, given + share * (decoded - given), rtol=0.0, atol=0.51 / 255)
    known = share[..., 0] == 0.0
    assert np.abs(result - given)[known].max() < (1e-9 if kind == "pil" else 1e-6)


def test_a_soft_mask_blends_the_latents() -> None:
    pipe = make_pipeline()
    inputs = {"prompt": "a star", "image": tiny_image(3), "mask_image": feathered(), "output_type": "latent"}
    state = pipe(**inputs, soft_mask=True, generator=generator(), num_inference_steps=1)
    mask, known = state.get("mask"), state.get("image_latents")
    assert mask.unique().tolist() == pytest.approx([0.0, 64 / 255, 191 / 255, 1.0])
    assert torch.equal(state.get("latents")[..., :4], known[..., :4])
    change = (state.get("latents") - known)[..., 4:12, :].abs().mean(dim=(1, 2))[0]
    assert 0.0 < change[4:6].mean() < change[6:8].mean()


def test_grey_is_split_at_one_half_by_default() -> None:
    pipe, split = make_pipeline(), feathered().point(lambda value: 255 * (value >= 128))
    inputs = {"image": tiny_image(3), "output_type": "np"}
    run(pipe, **inputs, mask_image=feathered(), soft_mask=True)  # leaves the pipeline's own mask processor alone
    np.testing.assert_array_equal(
        run(pipe, **inputs, mask_image=feathered()), run(pipe, **inputs, mask_image=split, soft_mask=True)
    )


def test_a_cropped_region_is_painted_at_full_size_and_laid_over_the_picture() -> None:
    picture, mask = tiny_image(4, (64, 48)), Image.new("L", (64, 48))
    mask.paste(255, (40, 20, 56, 36))
    image = run(
        make_pipeline(), image=picture, mask_image=mask, padding_mask_crop=4, output_type="pil", height=32, width=32
    )[0]
    assert image.size == (64, 48)
    known = np.asarray(mask) == 0
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(picture).astype(int))
    assert difference[known].max() <= 1
    assert difference[~known].max() > 10


def test_a_picture_keeps_its_size() -> None:
    picture, mask = tiny_image(4, (48, 24)), Image.new("L", (48, 24), 255)
    images = run(make_pipeline(), image=[picture], mask_image=mask, output_type="pil")
    assert images[0].size == (48, 24)
    arrays = {"image": np.asarray(picture)[None] / 255.0, "mask_image": np.ones((1, 24, 48, 1))}
    assert run(make_pipeline(), **arrays, output_type="np").shape == (1, 24, 48, 3)
    assert run(make_pipeline(), image=picture, mask_image=mask, height=32, width=32).shape == (1, 4, 16, 16)


def test_a_nine_channel_unet_sees_mask_and_masked_picture() -> None:
    pipe, recorded = make_pipeline(unet=tiny_inpainting_unet()), list[Tensor]()
    seen: list[Tensor] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    state = pipe(
        prompt="a star",
        image=tiny_image(3),
        mask_image=hole_picture(),
        generator=generator(),
        output_type="latent",
        callback_on_step_end=lambda pipe, i, t, kwargs: recorded.append(kwargs["latents"]),
    )
    assert {tuple(sample.shape) for sample in seen} == {(2, 9, 16, 16)}
    assert torch.equal(seen[0][:, 4:5], HOLE.expand(2, -1, -1, -1))
    assert torch.equal(seen[0][:1, 5:], state.get("masked_image_latents"))
    assert torch.equal(state.get("latents")[KNOWN], state.get("image_latents")[KNOWN])
    # Until the last step such a UNet paints the whole picture by itself.
    known = PeRFlowScheduler(**BETAS).add_noise_chord(
        state.get("image_latents"), state.get("noise"), torch.tensor(750)
    )
    assert (recorded[1] - known)[KNOWN].abs().max() > 1e-2


def test_a_four_channel_unet_is_spared_the_masked_picture() -> None:
    pipe = make_pipeline()
    encoded: list[int] = []
    pipe.vae.encoder.register_forward_pre_hook(lambda module, args: encoded.append(args[0].shape[0]))
    run(pipe, image=tiny_image(3), mask_image=hole_picture())
    assert encoded == [1]


TWO_PICTURES = [tiny_image(1), tiny_image(2)]
TWO_HOLES = [hole_picture(), hole_picture().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
HOLE_ARRAYS = np.stack([np.asarray(hole) / 255.0 for hole in TWO_HOLES])


def in_place(pictures: list[Image.Image]) -> list[Image.Image]:
    """Each of two repeated in place."""
    return [pictures[0], pictures[0], pictures[1], pictures[1]]


@pytest.mark.parametrize("unet", [{}, {"unet": tiny_inpainting_unet()}], ids=["4-channel", "9-channel"])
@pytest.mark.parametrize(
    ("pictures", "masks"),
    [
        (in_place(TWO_PICTURES), TWO_HOLES),
        (TWO_PICTURES, HOLE_ARRAYS[..., None]),
        (in_place(TWO_PICTURES), torch.from_numpy(HOLE_ARRAYS)[:, None]),
    ],
    ids=["4-2", "n-h-w-1-array", "4-2-tensor"],
)
def test_pictures_and_masks_of_other_numbers_are_matched(unet: dict[str, Any], pictures: Any, masks: Any) -> None:
    pipe = make_pipeline(**unet)
    # The spread of the latents (log variance, the last four channels) is nothing: draws differ with the count.
    pipe.vae.quant_conv.register_forward_hook(
        lambda module, args, moments: moments.index_fill(1, torch.arange(4, 8), -30.0)
    )
    noise = torch.randn(4, 4, 16, 16, generator=generator(5))
    inputs = {"prompt": ["a star", "a ring"], "num_images_per_prompt": 2, "latents": noise}
    results = [
        run(pipe, **inputs, image=image, mask_image=mask, generator=[generator(seed) for seed in range(4)])
        for image, mask in ((pictures, masks), (in_place(TWO_PICTURES), in_place(TWO_HOLES)))
    ]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_known_pixels_are_those_of_the_prompts_own_picture() -> None:
    images = run(
        make_pipeline(),
        prompt=["a star", "a ring"],
        num_images_per_prompt=2,
        image=TWO_PICTURES,
        mask_image=TWO_HOLES,
        output_type="np",
    )
    for row in range(4):
        given, known = np.asarray(TWO_PICTURES[row // 2]) / 255.0, np.asarray(TWO_HOLES[row // 2]) == 0
        difference = np.abs(as_array(images[row : row + 1]) - given)
        assert difference[known].max() < 1e-6
        assert difference[~known].max() > 0.05


def test_a_vae_with_latent_statistics_encodes() -> None:
    pipe = make_pipeline()
    pipe.vae.register_to_config(latents_mean=[0.1] * 4, latents_std=[1.1] * 4)
    assert torch.isfinite(run(pipe, image=tiny_image(3), mask_image=hole_picture())).all()
