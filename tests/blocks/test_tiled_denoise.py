"""Large images tile by tile: the loop's denoiser."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AdaptiveProjectedGuidance, ClassifierFreeGuidance, MultiControlNetModel
from diffusers.guiders import BaseGuidance
from PIL import Image

from perflow_blocks import (
    PeRFlowLoopDenoiser,
    PeRFlowSDXLAutoBlocks,
    PeRFlowTiledControlNetLoopDenoiser,
    PeRFlowTiledLoopDenoiser,
)
from perflow_blocks.blocks.controlnet import PeRFlowControlNetLoopDenoiser
from perflow_blocks.testing import (
    tiny_controlnet,
    tiny_image,
    tiny_inpainting_unet,
    tiny_mask,
)
from perflow_blocks.testing.contract import check_block
from tests.conftest import count_unet_calls, generator, make_pipeline, no_host_reads, run

pytestmark = pytest.mark.behaviour


class Pointwise(PeRFlowLoopDenoiser):
    """In place of the UNet: each point for itself, so that tiles cannot but agree. Notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[Any] = []
        self.time_ids: list[torch.Tensor] = []

    def _predict(self, components: Any, block_state: Any, batches: list[Any], i: int, t: torch.Tensor) -> torch.Tensor:
        self.states.append(block_state)
        self.time_ids.append(torch.cat([batch.time_ids for batch in batches]))
        z = block_state.latents
        return torch.cat([z * z * (0.1 * number + 0.3) + 0.2 * number for number in range(len(batches))])


class TiledPointwise(PeRFlowTiledLoopDenoiser, Pointwise):
    """As the docstring of the tiled denoiser has it."""


def with_denoiser(workflow: str, denoiser: Any) -> Any:
    blocks = PeRFlowSDXLAutoBlocks().get_workflow(workflow)
    blocks.sub_blocks["denoise.denoise"].sub_blocks["denoiser"] = denoiser
    return blocks


def denoiser_of(pipe: Any) -> Any:
    """A pipeline runs copies of the blocks that it is made of."""
    return pipe._blocks.sub_blocks["denoise.denoise"].sub_blocks["denoiser"]


TILES = {"tile_size": 16, "tile_overlap": 4}
"""In pixels; latents are half of that."""


@pytest.mark.parametrize("kind", [PeRFlowTiledLoopDenoiser, PeRFlowTiledControlNetLoopDenoiser])
@pytest.mark.parametrize("settings", [{}, TILES])
def test_the_block_keeps_its_contract(kind: type[PeRFlowTiledLoopDenoiser], settings: dict[str, int]) -> None:
    state = check_block(kind(), inputs=settings)
    assert (state.tiling is None) == (not settings)
    assert state.noise_pred.shape == state.latents.shape


def test_an_image_of_one_tile_is_drawn_as_without_tiles() -> None:
    workflow, plain, tiled = (
        "controlnet_image2image",
        PeRFlowControlNetLoopDenoiser,
        PeRFlowTiledControlNetLoopDenoiser,
    )
    inputs = {"image": tiny_image(1), "control_image": tiny_image(2), "strength": 0.6}
    results = []
    for kind, settings in ((plain, {}), (tiled, {}), (tiled, {"tile_size": 64, "tile_overlap": 0}), (tiled, TILES)):
        pipe = make_pipeline(with_denoiser(workflow, kind()), controlnet=tiny_controlnet())
        results.append(run(pipe, num_inference_steps=4, **inputs, **settings))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not torch.allclose(results[0], results[3], atol=1e-2)


@pytest.mark.parametrize(
    "guider",
    [
        ClassifierFreeGuidance(2.0),
        ClassifierFreeGuidance(2.0, guidance_rescale=0.7),
        AdaptiveProjectedGuidance(3.0, adaptive_projected_guidance_momentum=-0.5, eta=0.3),
    ],
    ids=["cfg", "rescaled", "momentum"],
)
def test_tiles_that_agree_give_exactly_the_untiled_run_under_any_guider(guider: BaseGuidance) -> None:
    inputs = {"height": 46, "width": 74, "num_inference_steps": 5}
    plain = run(make_pipeline(with_denoiser("text2image", Pointwise()), guider=guider), **inputs)
    pipe = make_pipeline(with_denoiser("text2image", TiledPointwise()), guider=guider)
    tiled = run(pipe, **inputs, **TILES)
    assert len(denoiser_of(pipe).states) == 5 * 4 * 6
    assert torch.equal(plain, tiled)
    assert plain.std() > 0.1


@pytest.mark.parametrize(("height", "width", "tiles"), [(16, 64, 5), (30, 26, 6)])
def test_each_step_calls_the_unet_once_for_each_tile(height: int, width: int, tiles: int) -> None:
    pipe = make_pipeline(with_denoiser("text2image", PeRFlowTiledLoopDenoiser()))
    sizes: list[tuple[int, ...]] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape)))
    latents = run(pipe, height=height, width=width, num_inference_steps=4, **TILES)
    assert latents.shape == (1, 4, height // 2, width // 2)
    assert sizes == [(2, 4, 8, 8)] * (4 * tiles)


def test_without_sizes_a_tile_is_what_the_unet_was_made_for_and_an_eighth_is_shared() -> None:
    state = check_block(PeRFlowTiledLoopDenoiser(), inputs={"latents": torch.randn(1, 4, 16, 30)})
    assert state.tiling.columns.size == 16
    assert state.tiling.columns.starts == (0, 14)


def coherent_jumps(plane: torch.Tensor) -> torch.Tensor:
    """How much columns of (1, channels, rows, columns) jump along their whole height, which makes a seam visible."""
    return plane.diff(dim=-1).mean(dim=2).abs().amax(dim=(0, 1))


def test_blending_closes_the_seams_that_hard_cuts_show() -> None:
    contrast = torch.linspace(0.1, 3.1, 80)  # so that tiles normalise what they share differently
    inputs = {"latents": contrast * torch.randn(1, 4, 32, 80, generator=generator()), "tile_size": 64}
    seams = [27, 51]  # tiles begin at columns 0, 24 and 48 and are 32 wide
    elsewhere = [k for k in range(79) if all(abs(k - seam) > 4 for seam in seams)]
    hard, blended = (
        coherent_jumps(check_block(PeRFlowTiledLoopDenoiser(), inputs={**inputs, "tile_overlap": overlap}).noise_pred)
        for overlap in (0, 16)
    )
    assert hard[seams].max() > 2.0 * hard[elsewhere].max()
    assert blended[seams].max() < blended[elsewhere].max()


def noted_calls(model: Any) -> list[dict[str, torch.Tensor]]:
    """Sample and keyword arguments of the model's calls, appended to as they happen."""
    calls: list[dict[str, torch.Tensor]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        call = {**dict(zip(["sample"], args, strict=False)), **kwargs}
        calls.append({**call, "sample": call["sample"].clone()})  # a copy: the loop writes the next one over it

    model.register_forward_pre_hook(note, with_kwargs=True)
    return calls


WIDE = (40, 24)
"""Width and height in pixels of an image whose latents, (12, 20), make six tiles of (8, 8)."""
PLACES = [(top, left) for top in (0, 4) for left in (0, 6, 12)]
"""Where these begin."""


def wide_image(seed: int) -> Image.Image:
    """No two tiles of it are alike, and it is not smooth, so that a shift by one pixel shows."""
    width, height = WIDE
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255.0


@pytest.mark.parametrize("number", [1, 2])
def test_a_controlnet_sees_its_image_where_the_tile_is(number: int) -> None:
    nets = [tiny_controlnet(seed) for seed in range(number)]
    images = [wide_image(seed) for seed in range(number)]
    pipe = make_pipeline(
        with_denoiser("controlnet_text2image", PeRFlowTiledControlNetLoopDenoiser()),
        controlnet=nets[0] if number == 1 else MultiControlNetModel(nets),
    )
    calls = [noted_calls(net) for net in nets]
    latents = torch.randn(1, 4, 12, 20, generator=generator(1))
    run(pipe, latents=latents, control_image=images if number > 1 else images[0], num_inference_steps=4, **TILES)
    for image, noted in zip(images, calls, strict=True):
        assert len(noted) == 4 * 6
        for call, (top, left) in zip(noted, PLACES, strict=False):  # the first step
            assert torch.equal(call["sample"], latents[..., top : top + 8, left : left + 8].repeat(2, 1, 1, 1))
            box = (2 * left, 2 * top, 2 * left + 16, 2 * top + 16)
            torch.testing.assert_close(call["controlnet_cond"][:1], as_tensor(image.crop(box)))


def test_a_nine_channel_unet_sees_mask_and_image_where_the_tile_is() -> None:
    pipe = make_pipeline(with_denoiser("inpainting", PeRFlowTiledLoopDenoiser()), unet=tiny_inpainting_unet())
    calls = noted_calls(pipe.unet)
    state = pipe(
        prompt="a star",
        image=wide_image(0),
        mask_image=tiny_mask(WIDE),
        num_inference_steps=4,
        generator=generator(),
        output_type="latent",
        **TILES,
    )
    conditioning = state.values["inpaint_conditioning"]
    assert conditioning.shape == (1, 5, 12, 20)
    assert len(calls) == 4 * 6
    for call, (top, left) in zip(calls, PLACES * 4, strict=True):
        assert torch.equal(call["sample"][:1, 4:], conditioning[..., top : top + 8, left : left + 8])


def told_sizes(**inputs: Any) -> list[list[float]]:
    """The time ids, with the prompt and without, that tiles of an image of 40x24 pixels are told."""
    pipe = make_pipeline(with_denoiser("text2image", TiledPointwise()))
    run(pipe, height=24, width=40, **{**TILES, **inputs})
    first, *others = denoiser_of(pipe).time_ids
    assert others and all(torch.equal(ids, first) for ids in others)
    return first.tolist()


def test_a_tile_is_told_to_be_an_image_of_its_own() -> None:
    own = [16, 16, 0, 0, 16, 16]
    assert told_sizes() == [own, own]
    assert told_sizes(tile_size=32) == [[24, 32, 0, 0, 24, 32]] * 2  # an axis shorter than a tile
    assert told_sizes(tile_size=64) == [[24, 40, 0, 0, 24, 40]] * 2  # not cut


def test_sizes_that_the_caller_chose_are_told_to_each_tile() -> None:
    chosen = {"original_size": (512, 40), "crops_coords_top_left": (24, 40)}
    assert told_sizes(**chosen) == [[512, 40, 24, 40, 16, 16]] * 2
    negative = {"negative_original_size": (8, 8), "negative_target_size": (24, 40)}
    assert told_sizes(**negative) == [[16, 16, 0, 0, 16, 16], [8, 8, 0, 0, 16, 16]]


def test_the_score_of_a_refiner_is_no_size() -> None:
    ids = torch.tensor([[32.0, 32.0, 0.0, 0.0, 32.0]])
    denoiser = TiledPointwise()
    check_block(denoiser, inputs={"add_time_ids": ids, "negative_add_time_ids": ids, **TILES})
    assert denoiser.time_ids[0][0].tolist() == [16, 16, 0, 0, 32]


class Guarded(PeRFlowTiledControlNetLoopDenoiser):
    """Reads nothing from the device at any step."""

    def __call__(self, components: Any, block_state: Any, i: int, t: torch.Tensor) -> tuple[Any, Any]:
        with no_host_reads():
            return super().__call__(components, block_state, i, t)


def test_nothing_is_read_from_the_device_in_the_loop() -> None:
    pipe = make_pipeline(with_denoiser("controlnet_text2image", Guarded()), controlnet=tiny_controlnet())
    run(pipe, height=24, width=40, control_image=wide_image(0), num_inference_steps=4, **TILES)


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"tile_size": 0}, "tile_size=0 "),
    ({"tile_size": 18}, "tile_size=18 must be a multiple of 4,"),
    ({"tile_size": 16, "tile_overlap": 10}, "tile_overlap=10 must be a multiple of 2 from 0 to 8, .*tile_size=16"),
    ({"tile_overlap": -2}, "tile_overlap=-2 must be .* from 0 to 16"),
    ({"controlnet_cond": torch.zeros(1, 3, 32, 30), **TILES}, "controlnet_cond is 30x32, .* 16x16.* 32x32"),
    (
        {"cross_attention_kwargs": {"ip_adapter_masks": [torch.zeros(1, 1, 8, 8)]}, **TILES},
        "cross_attention_kwargs is 8x8,",
    ),
]


@pytest.mark.parametrize(("inputs", "message"), MISTAKES, ids=[message[:30] for _, message in MISTAKES])
def test_mistakes_are_found_before_the_first_step(inputs: dict[str, Any], message: str) -> None:
    pipe = make_pipeline(controlnet=tiny_controlnet())
    calls = [count_unet_calls(pipe), noted_calls(pipe.controlnet)]
    with pytest.raises(ValueError, match=message) as caught:
        check_block(PeRFlowTiledControlNetLoopDenoiser(), components=pipe.components, inputs=inputs)
    assert calls == [[], []]
    assert "\n" not in str(caught.value)
