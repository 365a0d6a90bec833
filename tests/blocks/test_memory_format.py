"""Convolution weights laid out as channels_last: where the configuration says so, and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from perflow_blocks.testing.tiny import tiny_controlnet, tiny_picture
from tests.conftest import make_pipeline, run

CONTROL = {"control_image": tiny_picture(1)}


def layouts(model: nn.Module) -> set[bool]:
    """Whether kernels wider than a pixel, which alone can tell, are channels_last."""
    kernels = [weight for weight in model.parameters() if weight.ndim == 4 and weight.shape[-1] > 1]
    return {weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels}


@pytest.mark.parametrize("inputs", [{}, CONTROL], ids=["plain", "controlnet"])
def test_weights_and_activations_follow_the_configuration(inputs: dict[str, Any]) -> None:
    pipe = make_pipeline(controlnet=tiny_controlnet())
    usual, seen = run(pipe, **inputs), list[bool]()
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    assert layouts(pipe.unet) == layouts(pipe.controlnet) == {False}

    pipe.unet.conv_out.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    pipe.update_components(channels_last=True)
    torch.testing.assert_close(run(pipe, **inputs), usual, rtol=1e-4, atol=1e-4)
    assert layouts(pipe.unet) == {True}
    assert layouts(pipe.controlnet) == ({True} if inputs else {False})
    assert layouts(pipe.vae) == {False}
    assert seen and all(seen)

    pipe.update_components(channels_last=False)
    assert torch.equal(run(pipe, **inputs), usual)
    assert layouts(pipe.unet) == layouts(pipe.controlnet) == {False}
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())


def test_without_a_choice_weights_stay_as_they_are() -> None:
    pipe = make_pipeline()
    pipe.unet.to(memory_format=torch.channels_last)
    run(pipe)
    assert layouts(pipe.unet) == {True}


def test_weights_in_place_are_not_moved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = make_pipeline()
    pipe.update_components(channels_last=True)
    run(pipe)
    addresses = [weight.data_ptr() for weight in pipe.unet.parameters()]
    run(pipe)
    assert [weight.data_ptr() for weight in pipe.unet.parameters()] == addresses


def test_the_choice_survives_a_save(tmp_path: Any) -> None:
    pipe = make_pipeline()
    pipe.update_components(channels_last=True)
    pipe.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    again = type(pipe.blocks)().init_pipeline(str(tmp_path))
    assert again.config.channels_last is True


def test_another_value_is_refused() -> None:
    pipe = make_pipeline()
    pipe.update_components(channels_last="yes")
    with pytest.raises(ValueError, match="channels_last='yes' is no choice; pass True, False, or None"):
        run(pipe)
