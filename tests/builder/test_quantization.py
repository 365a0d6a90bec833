"""Quantized UNets: the delta merged before, or loaded as a LoRA after; both draw what float32 draws, closely."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import BitsAndBytesConfig, TorchAoConfig
from PIL import Image
from torch import Tensor, nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
from torchmetrics.functional.image import peak_signal_noise_ratio

from perflow_blocks import PeRFlowModularPipeline, PeRFlowPipelineBuilder, delta_to_lora, merge_delta
from perflow_blocks.delta.lora import save_lora, save_residual
from perflow_blocks.demo import perflow_pipeline, weights_directory
from tests.conftest import generator

DELTA = weights_directory() / "perflow_delta.safetensors"
PROMPT = "a red star on a white background"
INT8 = TorchAoConfig(Int8WeightOnlyConfig())
LINEAR = "mid_block.attentions.0.proj_in"


def draw(pipe: Any, **inputs: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    settings = {"prompt": PROMPT, "generator": generator(), "output_type": "pt", "output": "images"}
    return pipe(**{**settings, **inputs}).cpu()


def psnr(images: Tensor, expected: Tensor) -> float:
    return float(peak_signal_noise_ratio(images, expected, data_range=1.0))


def is_quantized(pipe: Any) -> bool:
    return type(pipe.unet.get_submodule(LINEAR).weight) is not nn.Parameter


def in_bitsandbytes(unet: nn.Module) -> None:
    """Four-bit layers on a CPU, where diffusers makes none."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for name, layer in list(unet.named_modules()):
        if type(layer) is nn.Linear:
            made = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, torch.float32, quant_type="nf4"
            )
            made.load_state_dict(layer.state_dict())
            unet.set_submodule(name, made.requires_grad_(False).to("cpu"))


@pytest.fixture(scope="module")
def source() -> PeRFlowPipelineBuilder:
    """Of the embedded model, with its delta."""
    return PeRFlowPipelineBuilder().from_pretrained(weights_directory()).with_delta(DELTA)


@pytest.fixture(scope="module")
def pipe(source: PeRFlowPipelineBuilder) -> Any:
    return source.with_quantization(INT8).build()


@pytest.fixture(scope="module")
def exact(source: PeRFlowPipelineBuilder) -> Any:
    return source.build()


@pytest.mark.parametrize("inputs", [{}, {"image": True}, {"image": True, "mask_image": True}])
def test_the_delta_is_merged_before_the_unet_is_quantized(pipe: Any, exact: Any, inputs: dict[str, bool]) -> None:
    assert is_quantized(pipe) and not is_quantized(exact)
    image, mask = (Image.effect_noise((64, 64), sigma).convert(mode) for sigma, mode in ((60, "RGB"), (200, "L")))
    given = {name: {"image": image, "mask_image": mask}[name] for name in inputs}
    expected = draw(exact, guidance_scale=2.0, **given)
    assert psnr(draw(pipe, guidance_scale=2.0, **given), expected) > 45
    assert psnr(draw(exact, guidance_scale=2.0, delta=False, **given), expected) < 40


def test_builders_share_a_unet_that_is_quantized_in_the_same_way(pipe: Any, source: PeRFlowPipelineBuilder) -> None:
    again = source.with_guidance(1.5).with_quantization(TorchAoConfig(Int8WeightOnlyConfig()))
    assert again.build().unet is pipe.unet and "Int8WeightOnlyConfig" in again.describe()
    other = source.with_quantization(TorchAoConfig(Float8WeightOnlyConfig())).build()
    assert other.unet is not pipe.unet and is_quantized(other)
    assert not is_quantized(again.with_quantization(None).build())


def test_a_saved_pipeline_comes_back_with_its_image(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    again = PeRFlowModularPipeline.from_pretrained(tmp_path)
    again.load_components()
    for each in (again, PeRFlowPipelineBuilder().from_pretrained(tmp_path).build()):
        assert is_quantized(each) and torch.equal(draw(each), draw(pipe))
    assert str(tmp_path.parent) not in (tmp_path / "unet" / "config.json").read_text()


def test_a_unet_that_you_give_stays_as_it_is_with_its_delta(source: PeRFlowPipelineBuilder, pipe: Any) -> None:
    given = perflow_pipeline()
    built = source.with_unet(given.unet).with_quantization(INT8).build()
    assert is_quantized(built) and not is_quantized(given) and torch.equal(draw(built), draw(pipe))
    again = PeRFlowPipelineBuilder().from_pretrained(weights_directory()).with_unet(pipe.unet).with_delta(DELTA)
    assert torch.equal(draw(again.build()), draw(pipe))


@pytest.mark.parametrize("asked", [{"delta": False}, {"delta_scale": 0.5}])
def test_a_call_that_asks_for_other_weights_is_an_error_and_changes_nothing(pipe: Any, asked: dict[str, Any]) -> None:
    before = draw(pipe)
    with pytest.raises(ValueError, match=r"quantized .*with_quantization.*load_lora_weights"):
        draw(pipe, **asked)
    assert torch.equal(draw(pipe), before) and torch.equal(draw(pipe, delta=DELTA, delta_scale=1.0), before)


@pytest.mark.parametrize(
    ("quantize", "least"), [(lambda unet: quantize_(unet, Int8WeightOnlyConfig()), 45), (in_bitsandbytes, 25)]
)
def test_a_quantized_unet_takes_the_delta_as_a_lora(
    exact: Any, quantize: Callable[[Any], None], least: float, tmp_path: Path
) -> None:
    pipe, lora, rest = perflow_pipeline(), tmp_path / "lora.safetensors", tmp_path / "rest.safetensors"
    quantize(pipe.unet)
    for attempt in (lambda: merge_delta(pipe, DELTA), lambda: draw(pipe, delta=DELTA)):
        with pytest.raises(ValueError, match=r"into quantized .*delta_to_lora.*load_lora_weights"):
            attempt()
    with pytest.raises(ValueError, match="unet was quantized without diffusers"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    converted = delta_to_lora(DELTA, rank=128, keep_embeddings=False)
    save_lora(converted, lora)
    save_residual(converted, rest)
    pipe.load_lora_weights(lora)
    assert psnr(draw(pipe, delta=rest), draw(exact)) > least


def test_mistakes_are_found_before_anything_is_loaded(source: PeRFlowPipelineBuilder, loads: list[str]) -> None:
    config: Any = Int8WeightOnlyConfig()
    with pytest.raises(ValueError, match="takes a config of diffusers, such as TorchAoConfig"):
        source.with_quantization(config)
    pytest.importorskip("bitsandbytes")
    if not torch.cuda.is_available():
        (problem,) = source.with_quantization(BitsAndBytesConfig(load_in_4bit=True)).problems()
        assert problem.startswith("with_quantization: No GPU found")
    assert loads == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="diffusers takes bitsandbytes on a GPU alone")
@pytest.mark.parametrize(("bits", "least"), [({"load_in_8bit": True}, 40), ({"load_in_4bit": True}, 25)])
def test_bitsandbytes(source: PeRFlowPipelineBuilder, exact: Any, bits: dict[str, bool], least: float) -> None:
    pytest.importorskip("bitsandbytes")
    built = source.with_quantization(BitsAndBytesConfig(**bits)).on("cuda").build()
    latents = torch.randn(1, 4, 16, 16, generator=generator())
    assert psnr(draw(built, latents=latents), draw(exact, latents=latents)) > least
