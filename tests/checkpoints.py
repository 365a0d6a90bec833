"""Files of tiny models as others publish them: original checkpoints (what diffusers reads, inverted), IP-Adapters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from safetensors.torch import save_file
from torch import Tensor, cat
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from perflow_blocks.testing.tiny import (
    IMAGE_WIDTH,
    TEXT_WIDTH,
    ip_adapter_weights,
    tiny_sdxl_components,
    tiny_sdxl_unet,
    tiny_text_config,
)

FIRST_WIDTH = 24
MODELS = ("unet", "vae", "text_encoder", "text_encoder_2")
UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "conditioner.embedders.0.transformer.text_model."
SD_CLIP = "cond_stage_model.transformer.text_model."
OPEN_CLIP = "conditioner.embedders.1.model."

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def checkpoint_components() -> dict[str, Any]:
    """The tiny components with text encoders of two widths, by which diffusers tells them apart in a file."""
    components = tiny_sdxl_components()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        config = CLIPTextConfig.from_dict({**tiny_text_config().to_dict(), "hidden_size": FIRST_WIDTH})
        components["text_encoder"] = CLIPTextModel(config).eval()
        width = FIRST_WIDTH + TEXT_WIDTH
        unet_config = {**components["unet"].config, "cross_attention_dim": width}
        components["unet"] = UNet2DConditionModel.from_config(unet_config).eval()
    return components


def save_checkpoint(path: Path, components: dict[str, Any], leave_out: tuple[str, ...] = ()) -> Path:
    """Writes the models among the components, but for those of `leave_out`."""
    writers = {"unet": unet_keys, "vae": vae_keys, "text_encoder": clip_keys, "text_encoder_2": open_clip_keys}
    tensors: dict[str, Tensor] = {}
    for name, keys in writers.items():
        if name in components and name not in leave_out:
            tensors |= keys(components[name])
    if "text_encoder_2" not in components:  # Stable Diffusion 1.5
        tensors = {name.replace(CLIP, SD_CLIP): tensor for name, tensor in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def unet_keys(unet: Any) -> dict[str, Tensor]:
    known = DIFFUSERS_TO_LDM_MAPPING["unet"]
    outer = {**known["layers"], **known["addition_embed_type"]}
    layers = unet.config.layers_per_block
    return {
        UNET + (outer.get(name) or _unet_name(name, layers, unet)): tensor
        for name, tensor in unet.state_dict().items()
    }


def _unet_name(name: str, layers: int, unet: Any) -> str:
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
        kind, number, rest = found.groups()
        return f"middle_block.{2 * int(number)}.{_resnet(rest)}" if kind == "resnets" else f"middle_block.1.{rest}"
    found = re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.+)", name)
    assert found, name
    side, block, kind, number, rest = found.groups()
    first = int(block) * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        place = 2 if "CrossAttn" in unet.config.up_block_types[int(block)] else 1
        return f"output_blocks.{first + layers}.{place}.{rest}"
    index = first + int(number) + (side == "down")
    prefix = f"{'input' if side == 'down' else 'output'}_blocks.{index}"
    return f"{prefix}.0.{_resnet(rest)}" if kind == "resnets" else f"{prefix}.1.{rest}"


def _resnet(rest: str) -> str:
    module, kind = rest.rsplit(".", 1)
    return f"{RESNET[module]}.{kind}"


def vae_keys(vae: Any) -> dict[str, Tensor]:
    blocks = len(vae.config.block_out_channels)
    outer = DIFFUSERS_TO_LDM_MAPPING["vae"]
    tensors = {}
    for name, tensor in vae.state_dict().items():
        if name in outer:
            tensors[VAE + outer[name]] = tensor
            continue
        renamed = name.replace("conv_shortcut", "nin_shortcut").replace("samplers.0.conv", "sample.conv")
        renamed = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", renamed)
        if "mid_block.attentions" in renamed:
            module, kind = renamed.split("attentions.0.")[1].rsplit(".", 1)
            side = renamed.split(".")[0]
            renamed = f"{side}.mid.attn_1.{VAE_ATTENTION[module]}.{kind}"
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]  # a convolution there
        renamed = re.sub(r"down_blocks\.(\d)", r"down.\1", renamed)
        renamed = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{blocks - 1 - int(m[1])}", renamed)
        tensors[VAE + renamed.replace(".resnets.", ".block.")] = tensor
    return tensors


def clip_keys(encoder: Any) -> dict[str, Tensor]:
    return {CLIP + name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}


def open_clip_keys(encoder: Any) -> dict[str, Tensor]:
    known = DIFFUSERS_TO_LDM_MAPPING["openclip"]
    state = encoder.state_dict()
    tensors = {}
    for name, tensor in state.items():
        if name in known["layers"]:
            tensor = tensor.T if name == "text_projection.weight" else tensor
            tensors[OPEN_CLIP + known["layers"][name]] = tensor
        elif found := re.match(r"(.+self_attn)\.q_proj\.(weight|bias)", name):
            parts = [state[f"{found[1]}.{part}_proj.{found[2]}"] for part in "qkv"]
            tensors[_open_clip_layer(f"{found[1]}.in_proj_{found[2]}")] = cat(parts)
        elif not re.search(r"\.[kv]_proj\.", name) and "position_ids" not in name:
            tensors[_open_clip_layer(name)] = tensor
    return tensors


def _open_clip_layer(name: str) -> str:
    for diffusers_name, original in DIFFUSERS_TO_LDM_MAPPING["openclip"]["transformer"].items():
        name = name.replace(diffusers_name, original)
    return f"{OPEN_CLIP}transformer.{name}"


def save_ip_adapter(path: Path, unet: Any = None) -> None:
    """Lays out IP-Adapter and image encoder for a UNet, `tiny_sdxl_unet` unless given, as "h94/IP-Adapter" does."""
    # Of the size that diffusers brings images to where nothing says otherwise.
    size = {"image_size": 224, "patch_size": 56, "hidden_size": 16, "intermediate_size": 32}
    config = CLIPVisionConfig(**size, projection_dim=IMAGE_WIDTH, num_hidden_layers=1, num_attention_heads=2)
    folder = path / "sdxl_models"
    CLIPVisionModelWithProjection(config).eval().save_pretrained(folder / "image_encoder")
    parts = ip_adapter_weights(unet or tiny_sdxl_unet(), 0)
    weights = {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    save_file(weights, folder / "ip-adapter_sdxl.safetensors")
