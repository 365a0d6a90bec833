"""LoRA files of a delta: diffusers loads them to the right sum, beside a style LoRA and over the residual."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import logging
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from perflow_blocks import delta_to_lora, extract_delta, merge_delta
from perflow_blocks.delta.extract import save_delta
from perflow_blocks.delta.lora import DeltaLora, save_lora, save_residual
from perflow_blocks.delta.recipe import DeltaRecipe
from perflow_blocks.testing.tiny import (
    TEXT_WIDTH,
    TIME_ID_WIDTH,
    tiny_inpainting_unet,
    tiny_sd_components,
    tiny_sd_unet,
    tiny_sdxl_components,
    tiny_sdxl_unet,
)
from tests.conftest import generator, make_pipeline, run

pytestmark = pytest.mark.behaviour

RECIPE = DeltaRecipe(prediction_type="ddim_eps", num_time_windows=4, num_inference_steps=4, guidance_scale=1.0)
UNETS: dict[str, Any] = {"sdxl": tiny_sdxl_unet, "modular": tiny_sdxl_unet, "sd": tiny_sd_unet}
layouts = pytest.mark.parametrize("layout", ["peft", "kohya"])
# Ranks: one for nearly all layers, and another for nearly every layer.
choices = pytest.mark.parametrize("choice", [{"rank": 6}, {"energy": 0.6}], ids=["rank", "energy"])


@pytest.fixture(autouse=True)
def no_progress_bar() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def convert(unet: Any = tiny_sdxl_unet, seed: int = 1, **settings: Any) -> DeltaLora:
    delta = extract_delta(unet(seed), unet(0))
    return delta_to_lora(delta, dtype=torch.float32, recipe=RECIPE, **settings)


def pipeline(kind: str) -> Any:
    if kind == "sd":
        return StableDiffusionPipeline(**tiny_sd_components())
    if kind == "sdxl":
        return StableDiffusionXLPipeline(**tiny_sdxl_components(), add_watermarker=False)
    return make_pipeline()


def predict(unet: Any) -> Tensor:
    source = generator(5)
    conditions = {
        "text_embeds": torch.randn(1, TEXT_WIDTH, generator=source),
        "time_ids": torch.randn(1, 6, generator=source),
    }
    noisy = torch.randn(1, unet.config.in_channels, 16, 16, generator=source)
    text = torch.randn(1, 5, unet.config.cross_attention_dim, generator=source)
    assert unet.config.addition_time_embed_dim in (None, TIME_ID_WIDTH)
    with torch.no_grad():
        return unet(noisy, 500, text, added_cond_kwargs=conditions).sample


def add_by_hand(unet: Any, lora: Any, factor: float = 1.0) -> Any:
    """Adds `factor * up @ down` to every weight that the LoRA names, and returns the UNet."""
    for key, down in lora.items():
        if key.endswith(".lora_A.weight"):
            up = lora[key.replace(".lora_A.", ".lora_B.")]
            weight = unet.get_submodule(key.removeprefix("unet.").removesuffix(".lora_A.weight")).weight
            weight.data += factor * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return unet


def assert_same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


@choices
@layouts
@pytest.mark.parametrize("kind", UNETS)
def test_a_loaded_file_adds_the_low_rank_change(tmp_path: Path, kind: str, layout: Any, choice: Any) -> None:
    unet = UNETS[kind]
    converted = convert(unet, **choice)
    assert len(set(converted.report.ranks.values())) > 1
    save_lora(converted, tmp_path / "perflow.safetensors", layout)
    pipe = pipeline(kind)
    plain, weights = predict(pipe.unet), {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    pipe.load_lora_weights(tmp_path / "perflow.safetensors")
    expected = predict(add_by_hand(unet(), converted.lora))
    assert (expected - plain).abs().max() > 0.1
    assert_same(predict(pipe.unet), expected)
    pipe.unload_lora_weights()
    assert pipe.unet.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pipe.unet.state_dict().items())
    assert torch.equal(predict(pipe.unet), plain)


@choices
@layouts
def test_it_goes_with_a_style_lora(tmp_path: Path, layout: Any, choice: Any) -> None:
    accelerator, style = convert(**choice), convert(seed=2, rank=3)
    pipe = pipeline("sdxl")
    for name, converted in (("perflow", accelerator), ("style", style)):
        save_lora(converted, tmp_path / f"{name}.safetensors", layout)
        pipe.load_lora_weights(tmp_path / f"{name}.safetensors", adapter_name=name)
    pipe.set_adapters(["perflow", "style"], [1.0, 0.4])
    both = add_by_hand(add_by_hand(tiny_sdxl_unet(), accelerator.lora), style.lora, 0.4)
    assert_same(predict(pipe.unet), predict(both))
    pipe.set_adapters(["perflow"], [0.7])
    assert_same(predict(pipe.unet), predict(add_by_hand(tiny_sdxl_unet(), accelerator.lora, 0.7)))
    pipe.fuse_lora(adapter_names=["perflow"])
    pipe.unload_lora_weights()
    assert (predict(pipe.unet) - predict(tiny_sdxl_unet())).abs().max() > 0.1


def test_lora_and_residual_together_are_the_delta(tmp_path: Path) -> None:
    converted = convert(rank=10_000)
    save_lora(converted, tmp_path / "lora.safetensors")
    save_residual(converted, tmp_path / "rest.safetensors")
    student = make_pipeline(unet=tiny_sdxl_unet(1))
    student.guider.guidance_scale = 1.0  # the recipe's
    expected = run(student, num_inference_steps=4)
    pipe = make_pipeline()
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    # The residual is merged under the LoRA, its recipe gives steps and guidance.
    torch.testing.assert_close(run(pipe, delta=tmp_path / "rest.safetensors"), expected, rtol=1e-3, atol=2e-3)
    assert (run(make_pipeline(), delta=tmp_path / "rest.safetensors") - expected).abs().max() > 0.5


def test_the_files_say_what_they_are(tmp_path: Path) -> None:
    converted = convert(rank=6)
    for name, save in (
        ("peft", partial(save_lora, layout="peft")),
        ("kohya", partial(save_lora, layout="kohya")),
        ("rest", save_residual),
    ):
        save(converted, tmp_path / f"{name}.safetensors")
        with safe_open(tmp_path / f"{name}.safetensors", framework="pt") as file:
            metadata = file.metadata()
        assert DeltaRecipe.from_metadata(metadata) == RECIPE
        assert (metadata.get("perflow.partial") == "true") == (name == "rest")
    stored = load_file(tmp_path / "peft.safetensors")
    assert stored.keys() == converted.lora.keys()
    rest = load_file(tmp_path / "rest.safetensors")
    assert all(torch.equal(rest[name], tensor) for name, tensor in converted.residual.items())


@layouts
def test_a_file_names_its_delta_and_is_the_same_each_time(tmp_path: Path, layout: Any) -> None:
    """By what the record of the delta says that is merged from another file."""
    save_delta(extract_delta(tiny_sdxl_unet(1), tiny_sdxl_unet(0)), tmp_path / "delta.safetensors", RECIPE)
    written = set()
    for number in range(3):
        file = tmp_path / f"{number}.safetensors"
        save_lora(delta_to_lora(tmp_path / "delta.safetensors", rank=2), file, layout)
        written.add(file.read_bytes())
    assert len(written) == 1
    with safe_open(file, framework="pt") as opened:
        digest = opened.metadata()["perflow_delta"]
    prefixed = {f"unet.{name}": tensor for name, tensor in load_file(tmp_path / "delta.safetensors").items()}
    assert merge_delta(tiny_inpainting_unet(), prefixed).digest == digest
    assert merge_delta(tiny_sdxl_unet(), tmp_path / "delta.safetensors").digest == digest
    assert merge_delta(tiny_sdxl_unet(), extract_delta(tiny_sdxl_unet(2), tiny_sdxl_unet(0))).digest != digest


SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}


@pytest.mark.parametrize(
    ("loader", "config"),
    [(StableDiffusionXLPipeline, SDXL), (StableDiffusionPipeline, {"cross_attention_dim": 768})],
    ids=["sdxl", "sd15"],
)
def test_diffusers_reads_every_kohya_name_of_a_whole_unet(tmp_path: Path, loader: Any, config: dict[str, Any]) -> None:
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**config)
    modules = [
        name
        for name, module in unet.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and "embedding" not in name
    ]
    assert len(modules) > 250
    pair = {"A": torch.zeros(2, 3), "B": torch.zeros(3, 2)}
    lora = {f"unet.{name}.lora_{side}.weight": pair[side] for name in modules for side in "AB"}
    save_lora(DeltaLora(lora=lora, recipe=RECIPE), tmp_path / "lora.safetensors", "kohya")
    read, alphas = loader.lora_state_dict(tmp_path / "lora.safetensors", unet_config=unet.config)
    own = {name.removeprefix("unet."): tensor for name, tensor in read.items()}
    assert {f"unet.{name}" for name in convert_unet_state_dict_to_peft(own)} == set(lora)
    assert not alphas


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    converted = convert(rank=2)
    wrong: Any = "lycoris"
    with pytest.raises(ValueError, match="layout='lycoris' must be one of peft, kohya"):
        save_lora(converted, tmp_path / "lora.safetensors", wrong)
    with pytest.raises(ValueError, match="no residual"):
        save_residual(replace(converted, residual={}), tmp_path / "rest.safetensors")
    assert not list(tmp_path.iterdir())
