"""Every mistake is told before anything is loaded, and all of them at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, PerturbedAttentionGuidance, SmoothedEnergyGuidance
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec
from safetensors.torch import save_file

from perflow_blocks import PeRFlowLoopSolverStep, PeRFlowPipelineBuilder, PeRFlowSDXLAutoBlocks, WindowLogStep
from perflow_blocks.delta.extract import save_delta
from perflow_blocks.testing.tiny import (
    tiny_controlnet,
    tiny_sd_unet,
    tiny_sdxl_components,
    tiny_sdxl_unet,
    tiny_vae,
)
from tests.conftest import builder, problems

Step = Callable[[PeRFlowPipelineBuilder], PeRFlowPipelineBuilder]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the wrong family, and broken ones."""
    folder = tmp_path_factory.mktemp("files")
    save_delta(tiny_sd_unet().state_dict(), folder / "sd_delta.safetensors")
    (folder / "broken.safetensors").write_bytes((folder / "sd_delta.safetensors").read_bytes()[:-5])
    other = {"unet.mid_block.resnets.7.conv1.lora_A.weight": torch.ones(2, 8)}
    wide = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({**other, "unet.mid_block.resnets.7.conv1.lora_B.weight": torch.ones(8, 2)}, folder / "lora.safetensors")
    save_file(
        {f"{wide}.lora_A.weight": torch.ones(2, 640), f"{wide}.lora_B.weight": torch.ones(640, 2)},
        folder / "wide.safetensors",
    )
    tiny_sd_unet().save_pretrained(folder / "sd_unet")
    save_file({"unet.conv_in.lora_A.weight": torch.ones(2)}, folder / "flat.safetensors")
    save_file({"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3)}, folder / "half.safetensors")
    save_file(
        {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(16, 3, 1, 1)},
        folder / "ranks.safetensors",
    )
    save_file(
        {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(2, 8)}, folder / "kohya.safetensors"
    )
    return folder


def no_merge() -> Any:
    blocks = PeRFlowSDXLAutoBlocks()
    blocks.sub_blocks.pop("merge_delta")
    return blocks


MISTAKES: dict[str, tuple[Callable[[PeRFlowPipelineBuilder, Path], PeRFlowPipelineBuilder], str]] = {
    "component": (
        lambda it, at: it.with_component("unett", tiny_sdxl_unet()),
        "unknown component 'unett'.*takes .*unet",
    ),
    "workflow's component": (
        lambda it, at: it.with_workflow("text2image").with_controlnet(tiny_controlnet()),
        "unknown component 'controlnet'.*in the workflow text2image",
    ),
    "role": (lambda it, at: it.with_unet(tiny_vae()), "unet: AutoencoderKL is no UNet2DConditionModel"),
    "other role": (lambda it, at: it.with_vae(tiny_sdxl_unet()), "vae: UNet2DConditionModel is no AutoencoderKL"),
    "no model": (lambda it, at: it.with_text_encoder(3), "text_encoder: int is no CLIPTextModel"),
    "class": (lambda it, at: it.with_vae(AutoencoderKL), "AutoencoderKL is a class; pass an instance"),
    "directory": (lambda it, at: it.with_vae(at / "nothing"), "vae: .*nothing.* does not exist"),
    "folder": (lambda it, at: it.with_vae(at, subfolder="vae"), "vae: there is no directory .*vae"),
    "loading field": (lambda it, at: it.with_vae(at / "sd_unet", folder="x"), "folder='x' is no field"),
    "object's folder": (lambda it, at: it.with_vae(tiny_vae(), subfolder="x"), "subfolder are for what is loaded"),
    "spec": (lambda it, at: it.with_vae(ComponentSpec("vae", AutoencoderKL)), "names no pretrained_model"),
    "scheduler": (
        lambda it, at: it.with_scheduler(tiny_vae()),
        "scheduler: AutoencoderKL is no Euler",
    ),
    "frozen": (
        lambda it, at: it.with_component("tokenizer", tiny_sdxl_components()["tokenizer"], freeze=True),
        "tokenizer: freeze=True is for models",
    ),
    "family of UNet": (lambda it, at: it.with_unet(at / "sd_unet"), "UNet is none of SDXL"),
    "family of ControlNet": (
        lambda it, at: it.with_controlnet(controlnet_of_another_width()),
        "controlnet is of another family.*cross_attention_dim is 24, the UNet's 32",
    ),
    "dtype": (
        lambda it, at: it.from_pretrained(it.settings.repository.location, dtype=torch.float16).with_vae(tiny_vae()),
        r"vae that is given is torch.float32, the other models are torch.float16; pass vae.to\(torch.float16\)",
    ),
    "dtypes": (
        lambda it, at: it.with_unet(tiny_sdxl_unet().half()).with_vae(tiny_vae()),
        "vae that is given is torch.float32, the other models are torch.float16",
    ),
    "no dtype": (
        lambda it, at: it.from_pretrained(it.settings.repository.location, dtype=torch.int8),
        "dtype=torch.int8 is wrong for models",
    ),
    "delta": (lambda it, at: it.with_delta(at / "none.safetensors"), "none.safetensors does not exist"),
    "broken delta": (lambda it, at: it.with_delta(at / "broken.safetensors"), "complete safetensors file"),
    "family of delta": (
        lambda it, at: it.with_delta(at / "sd_delta.safetensors"),
        "sd_delta.safetensors does not fit this UNet2DConditionModel: .*add_embedding",
    ),
    "scale": (
        lambda it, at: it.with_delta(at / "sd_delta.safetensors", float("nan")),
        "scale=nan",
    ),
    "delta without block": (
        lambda it, at: it.with_blocks(no_merge()).with_delta(at / "sd_delta.safetensors"),
        "with_delta has no effect",
    ),
    "lora": (lambda it, at: it.with_lora(at / "none.safetensors"), "with_lora.*it does not exist"),
    "broken lora": (lambda it, at: it.with_lora(at / "broken.safetensors"), "with_lora.*complete safetensors file"),
    "no lora": (lambda it, at: it.with_lora(at / "sd_delta.safetensors"), "is no LoRA for this UNet"),
    "module of lora": (lambda it, at: it.with_lora(at / "lora.safetensors"), r"no LoRA .*\(mid_block.resnets.7.conv1"),
    "family of lora": (lambda it, at: it.with_lora(at / "wide.safetensors"), r"no LoRA .*attn1.to_q"),
    "flat lora": (
        lambda it, at: it.with_lora(at / "flat.safetensors"),
        r"no LoRA for this UNet \(conv_in has only one",
    ),
    "half lora": (
        lambda it, at: it.with_lora(at / "half.safetensors"),
        r"no LoRA for this UNet \(conv_in has only one",
    ),
    "ranks of lora": (lambda it, at: it.with_lora(at / "ranks.safetensors"), r"no LoRA .*conv_in: the ranks of"),
    "half kohya lora": (
        lambda it, at: it.with_lora(at / "kohya.safetensors"),
        "it cannot be read as a LoRA .KeyError",
    ),
    "adapter's name": (
        lambda it, at: it.with_lora(at / "wide.safetensors", adapter_name="my.style"),
        "adapter_name='my.style' is wrong; pass a name without a dot",
    ),
    "adapter's scale": (
        lambda it, at: it.with_ip_adapter(at, subfolder="", weight_name="wide.safetensors", scale="x"),
        "with_ip_adapter: scale='x' is no finite number",
    ),
    "weight": (lambda it, at: it.with_lora(at / "wide.safetensors", "much"), "weight='much' is no finite number"),
    "lora names": (
        lambda it, at: it.with_lora(at / "a" / "style.safetensors").with_lora(at / "b" / "style.safetensors"),
        "2 LoRAs are called 'style'; pass adapter_name",
    ),
    "ip-adapter": (
        lambda it, at: it.with_ip_adapter(at, subfolder="models", weight_name="ip.safetensors"),
        "with_ip_adapter: .*ip.safetensors does not exist",
    ),
    "ip-adapter's encoder": (
        lambda it, at: it.with_ip_adapter(at, subfolder="", weight_name="wide.safetensors", image_encoder_folder=None),
        "with_ip_adapter needs an image encoder",
    ),
    "attention's blocks": (
        lambda it, at: it.with_blocks(PeRFlowSDXLAutoBlocks().sub_blocks["decode"]).with_attention("sliced"),
        "with_attention: the blocks take no attention",
    ),
    "ip-adapter's blocks": (
        lambda it, at: it.with_workflow("text2image").with_ip_adapter(at, subfolder="", weight_name="x.safetensors"),
        "with_ip_adapter: the blocks take no image_encoder",
    ),
    "guider": (
        lambda it, at: it.with_guider(SmoothedEnergyGuidance(seg_guidance_layers=[0])),
        "does not work on a UNet",
    ),
    "no guider": (lambda it, at: it.with_guider(2.0), "with_guider: .*of type float"),
    "guidance": (lambda it, at: it.with_guidance(-1.0), "guidance_scale=-1.0"),
    "start": (lambda it, at: it.with_guidance(2.0, start=0.5, stop=0.2), "with_guidance: .*stop"),
    "both guiders": (lambda it, at: it.with_guidance(2.0).with_guider(skipping("mid_block")), "are both given"),
    "two scales": (lambda it, at: it.with_guidance(2.0).with_config(guidance_scale=3.0), "are both given"),
    "attention": (lambda it, at: it.with_attention("fast"), "attention strategy 'fast' is unknown"),
    "attention here": (lambda it, at: it.with_attention({"self": "native_cudnn"}), "'native_cudnn' runs on cuda"),
    "attention's place": (
        lambda it, at: it.with_attention({"top.*": "sliced"}),
        "'top.*' matches no attention module",
    ),
    "config": (lambda it, at: it.with_config(windows=4), "windows=4 is unknown; the blocks know .*num_time_windows"),
    "windows": (
        lambda it, at: it.with_config(num_time_windows=0),
        r"with_config\(num_time_windows=...\): .*num_time_windows=0",
    ),
    "disagreeing": (
        lambda it, at: it.with_config(num_time_windows=4, window_boundaries=[1.0, 0.5, 0.0]),
        "num_time_windows=4 disagrees",
    ),
    "boundaries": (lambda it, at: it.with_config(window_boundaries=[0.0, 1.0]), r"window_boundaries=...\): "),
    "prediction": (lambda it, at: it.with_config(prediction_type="eps"), "prediction_type='eps'"),
    "config's delta": (
        lambda it, at: it.with_config(delta=False),
        "the configuration's delta=False",
    ),
    "config's scale": (
        lambda it, at: it.with_config(delta=at / "x", delta_scale="1"),
        "delta_scale='1'",
    ),
    "config's plan": (
        lambda it, at: it.with_config(attention_plan="nonsense"),
        "configuration's attention_plan='nonsense': attention strategy 'nonsense' is unknown",
    ),
    "guider's folder": (
        lambda it, at: it.with_component("guider", skipping("mid_block"), subfolder="x"),
        "guider: subfolder are for what is loaded",
    ),
    "frozen guider": (
        lambda it, at: it.with_component("guider", skipping("mid_block"), freeze=True),
        "guider: freeze=True is for models",
    ),
    "nothing frozen": (
        lambda it, at: it.with_component("image_encoder", None, freeze=True),
        "image_encoder: freeze do nothing to a component that is left out",
    ),
    "guider and spec": (
        lambda it, at: it.with_component("guider", ComponentSpec("guider", PerturbedAttentionGuidance)).with_guidance(
            2.0
        ),
        "and with_guidance are both given",
    ),
    "file of a component": (
        lambda it, at: it.with_vae(at / "wide.safetensors"),
        r"vae: .*wide.safetensors is a file, which does not say how .*AutoencoderKL.from_single_file",
    ),
    "blocks": (lambda it, at: it.with_blocks("auto"), "with_blocks.'auto'. is wrong"),
    "workflow": (lambda it, at: it.with_workflow("text2img"), "no workflow 'text2img'; pass one of text2image"),
    "workflow's need": (lambda it, at: it.with_workflow("controlnet_text2image"), "controlnet missing"),
    "place": (
        lambda it, at: it.insert_block("log", WindowLogStep, before="denoise_step"),
        r"insert_block\('log'\): there is no block 'denoise_step'.*decode, and in the denoising loops finite_guard",
    ),
    "no place": (lambda it, at: it.insert_block("log", WindowLogStep), "before=None and after=None; pass one"),
    "two places": (
        lambda it, at: it.insert_block("log", WindowLogStep, before="solver", after="denoiser"),
        "before='solver' and after='denoiser'; pass one",
    ),
    "one place for two": (
        lambda it, at: it.insert_block("a", WindowLogStep, before="solver").insert_block(
            "b", WindowLogStep, before="solver"
        ),
        "a and b ask for the same place",
    ),
    "name": (lambda it, at: it.insert_block("decode", WindowLogStep, before="denoise"), "'decode' is taken by"),
    "no block": (lambda it, at: it.insert_block("x", 3, before="denoise"), "3 is no block"),
    "compile": (lambda it, at: it.with_compile(speed="high"), "with_compile: speed='high' is no option"),
    "mode": (lambda it, at: it.with_compile(mode="fast"), "mode='fast' is unknown; pass one of default"),
    "cache": (lambda it, at: it.with_prompt_cache(0), "max_entries=0"),
    "cache's place": (
        lambda it, at: it.with_blocks(PeRFlowSDXLAutoBlocks().sub_blocks["denoise"]).with_prompt_cache(),
        "with_prompt_cache: the block 'text_encoder' of PeRFlowSDXLCoreDenoiseStep is none",
    ),
    "offload": (lambda it, at: it.offload("disk"), r"offload\('disk'\) is unknown; pass one of auto, group"),
    "offload here": (lambda it, at: it.on("cpu").offload("group"), "and they run on the CPU"),
    "offload and compile": (lambda it, at: it.offload("auto").with_compile(), "exclude each other"),
    "device": (lambda it, at: it.on("gpu"), r"on\('gpu'\) is no device"),
    "two sources": (lambda it, at: it.from_single_file(at / "x.safetensors"), "from_pretrained and from_single_file"),
    "repository": (lambda it, at: it.from_pretrained(at / "nowhere"), "nowhere cannot be read"),
    "no repository": (lambda it, at: it.from_pretrained(at), "cannot be read.*model_index.json"),
    "variant": (
        lambda it, at: it.from_pretrained(it.settings.repository.location, variant="fp16"),
        "vae: .* holds no weights of the variant 'fp16', only diffusion_pytorch_model.safetensors",
    ),
}


def controlnet_of_another_width() -> Any:
    model = tiny_controlnet()
    model.register_to_config(cross_attention_dim=24)
    return model


def skipping(fqn: str) -> Any:
    layers = {"indices": [0], "fqn": f"{fqn}.attentions.0.transformer_blocks", "skip_ff": False}
    layers |= {"skip_attention": False, "skip_attention_scores": True}
    return PerturbedAttentionGuidance(
        guidance_scale=2.0,
        perturbed_guidance_scale=1.0,
        perturbed_guidance_config=layers,
        perturbed_guidance_start=0.0,
        perturbed_guidance_stop=1.0,
    )


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_before_anything_is_loaded(
    repository: Path, files: Path, loads: list[str], mistake: str
) -> None:
    step, text = MISTAKES[mistake]
    built = step(builder(repository), files)
    with pytest.raises(ValueError, match=text):
        built.build()
    assert problems(built)
    assert loads == []
    assert built.components_manager.components == {}
    assert "problems" in built.describe()


def test_all_mistakes_are_told_at_once(repository: Path, files: Path, loads: list[str]) -> None:
    chosen = ["component", "family of delta", "dtype", "config", "place", "attention", "device", "module of lora"]
    built = builder(repository)
    for name in chosen:
        built = MISTAKES[name][0](built, files)
    told = built.problems()
    assert len(told) == len(chosen)
    assert f"for {len(chosen)} reasons" in problems(built)
    assert loads == []


def test_a_builder_without_a_source_says_what_it_lacks() -> None:
    text = problems(PeRFlowPipelineBuilder())
    assert "unet, vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2 missing" in text
    assert "call from_pretrained" in text


@pytest.mark.parametrize("damage", ["missing folder", "missing weights", "truncated", "missing config", "index"])
def test_a_part_that_cannot_be_loaded_is_told_first(
    repository: Path, tmp_path: Path, loads: list[str], damage: str
) -> None:
    folder = shutil.copytree(repository, tmp_path / "tiny")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    expected = "unet: "
    match damage:
        case "missing folder":
            shutil.rmtree(folder / "unet")
        case "missing weights":
            weights.unlink()
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-1])
            expected = "complete safetensors file"
        case "missing config":
            (folder / "unet" / "config.json").unlink()
        case "index":
            (folder / "model_index.json").write_text("{")
            expected = "cannot be read"
    assert expected in problems(builder(folder))
    assert loads == []


def test_parts_that_fail_after_all_are_told_together_and_nothing_stays(repository: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(repository, tmp_path / "tiny")
    for name in ("vae", "text_encoder"):
        config = json.loads((folder / name / "config.json").read_text())
        config |= {"block_out_channels": [16, 8]} if name == "vae" else {"hidden_size": 24}
        (folder / name / "config.json").write_text(json.dumps(config))
    built = builder(folder)
    text = problems(built)
    assert "vae: " in text and "text_encoder: " in text and "2 reasons" in text
    assert built.components_manager.components == {}


def test_a_lora_that_fails_while_it_is_loaded_is_taken_out(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.blocks.test_features_lora import write_lora

    unet = tiny_sdxl_unet()
    built = builder(repository).with_unet(unet).with_lora(write_lora(tmp_path / "lora", 1))
    monkeypatch.setattr(type(unet), "set_adapters", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(ValueError, match="with_lora: no"):
        built.build()
    assert built.components_manager.components == {}
    assert not getattr(unet, "peft_config", {})
    assert not any("lora" in name for name in unet.state_dict())


@pytest.mark.parametrize("step", ["from_pretrained", "from_single_file", "with_delta", "with_lora", "with_ip_adapter"])
def test_a_location_that_is_none_is_told_by_its_step(step: str) -> None:
    more = {"subfolder": None, "weight_name": "x"} if step == "with_ip_adapter" else {}
    with pytest.raises(ValueError, match=f"{step}: None is no path; pass a file"):
        getattr(PeRFlowPipelineBuilder(), step)(None, **more)


def test_a_block_that_only_some_loops_have_is_no_neighbour() -> None:
    blocks = PeRFlowSDXLAutoBlocks()
    text = problems(
        PeRFlowPipelineBuilder().with_blocks(blocks).insert_block("x", PeRFlowLoopSolverStep, after="keep_known")
    )
    assert "none of them 'keep_known'" in text
