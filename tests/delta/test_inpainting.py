"""The delta of a 4-channel UNet in a 9-channel one: the first 4 input channels get it, the others keep every bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from perflow_blocks.delta.extract import extract_delta, save_delta
from perflow_blocks.delta.merge import merge_delta, merge_record
from perflow_blocks.delta.recipe import DeltaRecipe
from perflow_blocks.testing.tiny import tiny_inpainting_unet, tiny_sdxl_unet
from tests.delta.test_delta import values

pytestmark = pytest.mark.behaviour

KEY = "conv_in.weight"
RECIPE = DeltaRecipe(prediction_type="ddim_eps", num_time_windows=4, guidance_scale=1.5)


def on_grid(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The UNet with its weights at multiples of 2^-12, so that float32 sums and differences are exact."""
    for tensor in unet.state_dict().values():
        tensor.copy_((tensor * 4096).round() / 4096)
    return unet


def plain(seed: int) -> UNet2DConditionModel:
    return on_grid(tiny_sdxl_unet(seed))


def inpainting(seed: int = 0) -> UNet2DConditionModel:
    """9 input channels, the weights those of `plain`. Among the extra ones is -0.0, which adding 0.0 would change."""
    unet = on_grid(tiny_inpainting_unet(5))
    state = plain(seed).state_dict()
    extra = unet.conv_in.weight.detach()[:, 4:].clone()
    extra[:, 0] = -0.0
    unet.load_state_dict({**state, KEY: torch.cat([state[KEY], extra], dim=1)})
    return unet


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


@pytest.fixture
def delta() -> dict[str, Tensor]:
    return extract_delta(plain(1), plain(0))


@pytest.fixture
def delta_file(tmp_path: Path, delta: dict[str, Tensor]) -> Path:
    path = tmp_path / "delta.safetensors"
    save_delta(delta, path, RECIPE, dtype=torch.float32)
    return path


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_first_channels_become_the_students_and_the_others_stay(
    delta_file: Path, memory_format: torch.memory_format
) -> None:
    model = inpainting().to(memory_format=memory_format)
    before, student = values(model), plain(1).state_dict()
    assert merge_record(model) is None
    assert merge_delta(model, delta_file) is merge_record(model)
    after = model.state_dict()
    assert torch.equal(after[KEY][:, :4], student[KEY])
    assert torch.equal(bits(after[KEY][:, 4:]), bits(before[KEY][:, 4:]))
    for name in after.keys() - {KEY}:
        assert torch.equal(after[name], student[name]), name
    assert model.conv_in.weight.is_leaf and model.conv_in.weight.requires_grad


def test_the_delta_of_an_inpainting_unet_is_for_its_own_kind(tmp_path: Path) -> None:
    path, model = tmp_path / "inpainting.safetensors", inpainting(0)
    save_delta(extract_delta(inpainting(1), model), path)
    with pytest.raises(ValueError, match=r"conv_in\.weight is \[16, 9, 3, 3\] instead of \[16, 4, 3, 3\]"):
        merge_delta(plain(0), path)
    merge_delta(model, path)
    torch.testing.assert_close(model.state_dict()[KEY], inpainting(1).state_dict()[KEY], rtol=0, atol=1e-3)
