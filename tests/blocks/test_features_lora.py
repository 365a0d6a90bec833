"""LoRA beside a delta, and switches on the models: VAE slicing and fused projections."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file

from perflow_blocks.delta.merge import merge_record
from perflow_blocks.delta.recipe import DeltaRecipe
from perflow_blocks.testing.tiny import tiny_sdxl_components, tiny_sdxl_unet
from tests.blocks.conftest import workflow_inputs, write_delta
from tests.conftest import count_unet_calls, generator, make_pipeline, run

pytestmark = pytest.mark.behaviour

TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "text_encoder_2": ["q_proj", "k_proj", "v_proj", "out_proj"],
}
RANK = 2


def write_lora(folder: Path, seed: int) -> Path:
    """A LoRA for the UNet and both text encoders, no matrix zero, as diffusers' training scripts save it."""
    components, source = tiny_sdxl_components(), generator(seed)
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, targets in TARGETS.items():
        model = components[name]
        model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
        shapes = {key: tensor.shape for key, tensor in get_peft_model_state_dict(model).items()}
        weights = {key: 0.3 * torch.randn(shape, generator=source) for key, shape in shapes.items()}
        layers[name] = convert_state_dict_to_diffusers(weights)
    StableDiffusionXLPipeline.save_lora_weights(folder, **{f"{name}_lora_layers": layers[name] for name in TARGETS})
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(tmp_path_factory.mktemp("lora"), seed=1)


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = DeltaRecipe(num_inference_steps=5, guidance_scale=1.5)
    return write_delta(tmp_path_factory.mktemp("delta") / "perflow_delta.safetensors", recipe)


def add_by_hand(pipe: Any, lora: Path, scale: float = 1.0) -> None:
    """`W + scale * B A` in place of every weight that the file names."""
    tensors = load_file(lora / "pytorch_lora_weights.safetensors")
    for key, down in tensors.items():
        found = re.fullmatch(r"(\w+?)\.(.+)\.(lora_A|lora\.down|lora_linear_layer\.down)\.weight", key)
        if found:
            component, module, _ = found.groups()
            up = tensors[key.replace("lora_A", "lora_B").replace(".down.", ".up.")]
            getattr(pipe, component).get_submodule(module).weight.data += scale * up @ down


def assert_same_latents(one: torch.Tensor, other: torch.Tensor) -> None:
    """To the rounding of sums that were made in another order; latents reach 60."""
    torch.testing.assert_close(one, other, rtol=1e-4, atol=5e-4)


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    modules = {name: getattr(pipe, name) for name in TARGETS}
    return {f"{name}.{key}": tensor.clone() for name in modules for key, tensor in modules[name].state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def with_lora(*folders: Path, **components: Any) -> Any:
    """A pipeline with each LoRA under the name of its place: "0", "1"."""
    pipe = make_pipeline(**components)
    for number, folder in enumerate(folders):
        pipe.load_lora_weights(folder, adapter_name=str(number))
    return pipe


def test_a_loaded_lora_is_the_sum_of_its_matrices(lora: Path) -> None:
    inputs = workflow_inputs("inpainting")
    by_hand = make_pipeline()
    plain = run(by_hand, **inputs)
    add_by_hand(by_hand, lora)
    expected = run(by_hand, **inputs)
    assert (expected - plain).abs().max() > 0.5
    pipe = with_lora(lora)
    assert pipe.get_list_adapters() == {name: ["0"] for name in TARGETS}
    assert_same_latents(run(pipe, **inputs), expected)


def test_the_scale_of_a_call_goes_from_none_to_all(lora: Path) -> None:
    inputs = workflow_inputs("text2image")
    pipe, by_hand = with_lora(lora), make_pipeline()
    plain = run(by_hand, **inputs)
    add_by_hand(by_hand, lora, 0.3)
    full = run(pipe, **inputs)
    none, part, all_of_it = (run(pipe, **inputs, cross_attention_kwargs={"scale": s}) for s in (0.0, 0.3, 1.0))
    assert torch.equal(none, plain)
    assert torch.equal(all_of_it, full)
    assert_same_latents(part, run(by_hand, **inputs))
    assert torch.equal(run(pipe, **inputs), full)  # the scale was that call's


def test_a_lora_over_a_merged_delta_is_the_sum_of_the_three(lora: Path, delta: Path) -> None:
    inputs = workflow_inputs("inpainting")
    pipe = make_pipeline()
    merged_only = run(pipe, **inputs, delta=delta)
    pipe.load_lora_weights(lora)
    both = run(pipe, **inputs)
    by_hand = make_pipeline(unet=tiny_sdxl_unet(1))  # W + dW
    by_hand.guider.guidance_scale = 1.5
    add_by_hand(by_hand, lora, 0.6)
    scaled = run(pipe, **inputs, delta=delta, cross_attention_kwargs={"scale": 0.6})
    assert_same_latents(scaled, run(by_hand, **inputs))
    add_by_hand(by_hand, lora, 0.4)
    assert_same_latents(both, run(by_hand, **inputs))
    assert (both - merged_only).abs().max() > 0.5
    assert (both - run(with_lora(lora), **inputs)).abs().max() > 0.5


def test_a_delta_is_merged_once_with_a_lora_over_it(lora: Path, delta: Path) -> None:
    pipe = make_pipeline()
    merged, before = run(pipe, delta=delta), weights(pipe)
    pipe.load_lora_weights(lora)
    over = weights(pipe)
    batches = count_unet_calls(pipe)
    first = run(pipe, delta=delta)
    assert torch.equal(run(pipe, delta=delta), first)
    assert torch.equal(run(pipe), first)
    assert same(weights(pipe), over)
    assert batches == [2] * 15  # the recipe's steps, each time
    pipe.unload_lora_weights()
    assert same(weights(pipe), before)
    assert torch.equal(run(pipe, delta=delta), merged)
    assert merge_record(pipe.unet) is not None


def test_a_merged_delta_can_be_taken_out_under_a_lora(lora: Path, delta: Path) -> None:
    pipe = make_pipeline()
    run(pipe, delta=delta)
    pipe.load_lora_weights(lora)
    expected = run(pipe)
    assert_same_latents(run(pipe, delta=False), run(with_lora(lora)))  # without a base to one rounding
    assert_same_latents(run(pipe, delta=delta), expected)
    assert_same_latents(run(pipe, delta=delta, delta_scale=0.0), run(with_lora(lora)))
    pipe.unload_lora_weights()
    assert_same_latents(run(pipe, delta=False), run(make_pipeline()))


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
