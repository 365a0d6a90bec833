"""The VAE in diffusers' steps: results stay finite, the usual ones are diffusers' own, and threads may share it."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers.modular_pipelines.stable_diffusion_xl.decoders import StableDiffusionXLDecodeStep
from diffusers.modular_pipelines.stable_diffusion_xl.encoders import StableDiffusionXLVaeEncoderStep
from torch import Tensor, nn

from perflow_blocks.blocks.vae import PeRFlowDecodeStep, PeRFlowVaeEncoderStep
from perflow_blocks.testing.tiny import tiny_image, tiny_vae
from tests.conftest import generator

pytestmark = pytest.mark.behaviour

LATENTS = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))


def vae_of(dtype: torch.dtype, *, upcast: bool = False, **config: Any) -> Any:
    vae = tiny_vae().to(dtype)
    vae.register_to_config(force_upcast=upcast, _use_default_values=[], **config)  # as from a file that says so
    return vae


def overflowing(part: str, factor: float = 3e4, dtype: torch.dtype = torch.float16) -> Any:
    """A VAE whose encoder or decoder leaves float16's range."""
    vae = vae_of(torch.float32)
    getattr(vae, part).conv_in.weight.data *= factor
    return vae.to(dtype)


def one_step(kind: Any, vae: Any) -> Any:
    pipe = kind().init_pipeline()
    pipe.update_components(vae=vae)
    return pipe


def decoded(vae: Any, latents: Tensor = LATENTS, kind: Any = PeRFlowDecodeStep, **inputs: Any) -> Any:
    return one_step(kind, vae)(**{"latents": latents, "output_type": "pt", **inputs}, output="images")


def encoded(vae: Any, kind: Any = PeRFlowVaeEncoderStep) -> Tensor:
    return one_step(kind, vae)(image=tiny_image(1), generator=generator(), output="image_latents")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if entry.name.startswith("perflow_blocks")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize("config", [{}, {"latents_mean": [0.1] * 4, "latents_std": [1.1] * 4}])
def test_the_usual_result_is_that_of_diffusers(dtype: torch.dtype, upcast: bool, config: dict[str, Any]) -> None:
    vae, latents = vae_of(dtype, upcast=upcast, **config), LATENTS.to(dtype)
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    images, image_latents = decoded(vae, latents), encoded(vae)
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())
    assert torch.equal(images, decoded(vae, latents, StableDiffusionXLDecodeStep))
    assert torch.equal(image_latents, encoded(vae, StableDiffusionXLVaeEncoderStep))


def test_an_overflow_is_decoded_again_in_float32(caplog: pytest.LogCaptureFixture) -> None:
    vae, latents = overflowing("decoder"), LATENTS.half()
    latents[1] = 0.0
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        images = decoded(vae, latents)
    (warning,) = warnings_of(caplog)
    assert "the decoded images are not finite in torch.float16 for images[0] of 2; they were decoded again" in warning
    assert "float32" in warning and "madebyollin/sdxl-vae-fp16-fix" in warning
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())
    torch.testing.assert_close(images.float(), decoded(vae.float(), latents.float()), rtol=0.0, atol=0.01)
    assert images[0].std() > 0.05


def test_an_overflow_is_encoded_again_in_float32(caplog: pytest.LogCaptureFixture) -> None:
    vae = overflowing("encoder", 3e5)
    with caplog.at_level(logging.WARNING):
        latents = encoded(vae)
    assert [entry.split(";")[0] for entry in warnings_of(caplog)] == [
        "the encoded images are not finite in torch.float16 for images[0] of 1"
    ]
    torch.testing.assert_close(latents.float(), encoded(vae.float()), rtol=0.0, atol=0.01)


def test_latents_that_are_broken_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"decoded images are not finite in torch\.float32.*and the given latents"):
        decoded(vae_of(torch.bfloat16), LATENTS / 0.0)


@pytest.mark.parametrize(("dtype", "upcast"), [(torch.float16, False), (torch.float16, True), (torch.float32, False)])
def test_where_float32_does_not_help_it_is_an_error(dtype: torch.dtype, upcast: bool) -> None:
    vae = vae_of(dtype, upcast=upcast)
    vae.decoder.conv_out.bias.data[0] = float("inf")
    with pytest.raises(ValueError, match=r"decoded images are not finite in torch.float32 for images\[0\].*weights"):
        decoded(vae)
    assert vae.dtype == dtype


def test_a_vae_that_cannot_be_float32_is_an_error() -> None:
    vae = overflowing("decoder")
    vae.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(
        ValueError, match="offloaded or quantized weights cannot be made float32; use a VAE in float32"
    ):
        decoded(vae, LATENTS.half())


def test_a_group_offloaded_vae_runs_in_its_own_type_whatever_force_upcast_says() -> None:
    vae = vae_of(torch.float16, upcast=True)
    expected = decoded(vae, LATENTS.half())
    vae.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    torch.testing.assert_close(decoded(vae, LATENTS.half()).float(), expected, rtol=0.0, atol=0.02)


def test_threads_take_turns_while_the_type_is_changed() -> None:
    vae = vae_of(torch.float16, upcast=True)
    inside, most, types = [0], [0], set[torch.dtype]()
    lock = threading.Lock()

    def enter(module: nn.Module, args: Any) -> None:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        types.update(weight.dtype for weight in module.parameters())
        time.sleep(0.02)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        with lock:
            inside[0] -= 1

    expected = decoded(vae), encoded(vae)
    for part in (vae.encoder, vae.decoder):
        part.register_forward_pre_hook(enter)
        part.register_forward_hook(leave)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(job, vae) for job in (decoded, encoded) * 3]
        results = [job.result() for job in jobs]
    assert most[0] == 1
    assert types == {torch.float32}
    for index, result in enumerate(results):
        assert torch.equal(result, expected[index % 2])
    assert vae.dtype == torch.float16
