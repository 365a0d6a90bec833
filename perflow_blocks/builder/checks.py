"""What can be found wrong before anything is loaded, with the UNet's architecture but not its weights."""

from __future__ import annotations

import importlib.util
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ClassifierFreeGuidance, UNet2DConditionModel
from diffusers.guiders import BaseGuidance
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from safetensors import safe_open
from torch import nn

from ..components.attention.config import AttentionConfig
from ..components.attention.plan import parse_plan
from ..components.delta_files import read_delta_recipe
from ..components.delta_fit import PARTIAL_KEY
from ..components.delta_recipe import DeltaRecipe, require_guidance
from ..components.guiders import check_guider
from ..components.settled_guidance import settings_of
from ..core.delta import INPUT_WEIGHT, describe_mismatch, extra_input_channels
from .problems import Problems
from .settings import BuilderSettings, IPAdapterChoice, LoraChoice
from .weight_check import require_readable

LORA_MODELS = ("unet", "text_encoder", "text_encoder_2")

_OF_RECIPE = {
    "prediction_type": "prediction_type",
    "num_time_windows": "num_time_windows",
    "window_boundaries": "window_boundaries",
    "default_num_inference_steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
}
"""Configuration values that a delta's recipe has too, and so has the checks of."""

_LORA_DOWN = re.compile(r"unet\.(.+)\.(?:lora_A|lora\.down|lora_linear_layer\.down)\.weight")


def check_conflicts(settings: BuilderSettings, problems: Problems) -> None:
    """Steps that say two things of one matter: which of them holds would hang on their order."""
    pairs = {
        ("from_pretrained", "from_single_file"): (settings.repository, settings.single_file),
        ("with_guider", "with_guidance"): (settings.guider, settings.guidance),
        ("with_delta", "with_config(delta=...)"): (settings.delta, settings.config.get("delta")),
        ("with_attention", "with_config(attention_plan=...)"): (
            settings.attention,
            settings.config.get("attention_plan"),
        ),
        ("with_guidance or with_guider", "with_config(guidance_scale=...)"): (
            settings.guidance or settings.guider,
            settings.config.get("guidance_scale"),
        ),
    }
    for (one, other), (value, other_value) in pairs.items():
        if value is not None and other_value is not None:
            problems.add(f"{one} and {other} are both given; leave one of them out.")


def check_config(declared: Sequence[str], values: Mapping[str, Any], problems: Problems) -> None:
    """
    Args:
        declared: the names that the blocks know.
    """
    for name, value in values.items():
        if name not in declared:
            problems.add(f"with_config: {name}={value!r} is unknown; the blocks know {', '.join(declared)}.")
        elif name in _OF_RECIPE:
            with problems.noted(TypeError, about=f"with_config({name}=...): "):
                DeltaRecipe(**{_OF_RECIPE[name]: value})
        elif name == "channels_last" and value not in (None, True, False):
            problems.add(f"with_config: channels_last={value!r} is no choice; pass True, False or None.")
    if not problems:
        windows = {name: values.get(name) for name in ("num_time_windows", "window_boundaries")}
        with problems.noted(about="with_config: "):
            DeltaRecipe(**windows)


def check_unet(config: Mapping[str, Any], model_name: str | None, problems: Problems) -> None:
    if model_name == "stable-diffusion-xl" and config.get("addition_embed_type") != "text_time":
        problems.add(
            "the UNet is none of SDXL, since it takes no text_time conditioning "
            f"(addition_embed_type={config.get('addition_embed_type')!r}), and the blocks are for SDXL; pass an SDXL "
            "model."
        )


def check_controlnet(width: Any, unet_width: Any, problems: Problems) -> None:
    """
    Args:
        width, unet_width: the models' `cross_attention_dim`.
    """
    if width != unet_width:
        problems.add(
            f"the controlnet is of another family than the UNet: its cross_attention_dim is {width}, the UNet's "
            f"{unet_width}; pass one for this UNet."
        )


def empty_unet(config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """A UNet without values, on the device "meta"; takes no memory."""
    with torch.device("meta"):
        # The module's own `to`: that of diffusers is about values, and warns.
        return nn.Module.to(UNet2DConditionModel.from_config(dict(config)), dtype)


def check_delta(path: Path, scale: Any, unet: nn.Module | None, problems: Problems) -> None:
    """
    Args:
        unet: may be without values; None where its architecture is not known.
    """
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        problems.add(f"with_delta: scale={scale!r} is no finite number; pass 1.0 for the delta as it was extracted.")
    with problems.noted():
        read_delta_recipe(path)
        if unet is not None:
            _require_delta_shapes(path, unet)


def _require_delta_shapes(path: Path, unet: nn.Module) -> None:
    with safe_open(path, framework="pt") as file:
        given = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        partial = (file.metadata() or {}).get(PARTIAL_KEY) == "true"
    expected = {name: tuple(weight.shape) for name, weight in unet.state_dict().items()}
    if extra_input_channels(given, expected) > 0:
        expected[INPUT_WEIGHT] = given[INPUT_WEIGHT]
    mismatch = describe_mismatch(given, expected, given="the file", expected="the model", partial=partial)
    if mismatch:
        raise ValueError(
            f"delta {path} is of another family than the UNet: {mismatch}. Pass a delta that was extracted from the "
            "same architecture."
        )


def check_loras(loras: Sequence[LoraChoice], component_names: Sequence[str], unet: Any, problems: Problems) -> None:
    if not loras:
        return
    if importlib.util.find_spec("peft") is None:
        problems.add("with_lora needs the package peft; pip install peft.")
        return
    missing = [name for name in LORA_MODELS if name not in component_names]
    if missing:
        problems.add(f"with_lora: the blocks have no {', '.join(missing)} to load a LoRA into; pass blocks that do.")
    for name, count in Counter(lora.adapter_name for lora in loras).items():
        if count > 1:
            problems.add(f"with_lora: {count} LoRAs are called {name!r}; pass adapter_name= to tell them apart.")
    for lora in loras:
        if (
            isinstance(lora.weight, bool)
            or not isinstance(lora.weight, (int, float))
            or not math.isfinite(lora.weight)
        ):
            problems.add(f"with_lora({lora.location!r}): weight={lora.weight!r} is no finite number; pass 1.0, say.")
        with problems.noted(about=f"with_lora({lora.location!r}): "):
            _require_lora(lora, unet)


def _require_lora(lora: LoraChoice, unet: Any) -> None:
    """Reads the LoRA, which is small beside the models, as diffusers does, and compares it with the UNet."""
    path = Path(lora.location).expanduser()
    if not path.exists():
        if path.is_absolute() or lora.location.count("/") != 1 or path.suffix:
            raise ValueError("it does not exist; pass a file, a directory or a repository such as owner/name.")
        return  # a repository of the Hub
    if path.is_file():
        require_readable(path)
    if unet is None:
        return
    weights = StableDiffusionXLLoraLoaderMixin.lora_state_dict(
        str(path), unet_config=unet.config, weight_name=lora.weight_name
    )[0]
    downs = {found[1]: tensor for name, tensor in weights.items() if (found := _LORA_DOWN.fullmatch(name))}
    modules = {name: module for name, module in unet.named_modules() if name in downs}
    unknown = [name for name in downs if name not in modules]
    unfit = [name for name, module in modules.items() if downs[name].shape[1] != module.weight.shape[1]]
    if not any("lora" in name for name in weights) or unknown or unfit:
        example = next(iter([*unknown, *unfit]), "no key holds 'lora'")
        raise ValueError(f"it is no LoRA for this UNet ({example}); pass one of the same family.")


def check_ip_adapter(adapter: IPAdapterChoice | None, component_names: Sequence[str], problems: Problems) -> None:
    if adapter is None:
        return
    if "image_encoder" not in component_names:
        problems.add("with_ip_adapter: the blocks take no image_encoder; pass blocks, or a workflow, that do.")
    if not adapter.weight_names:
        problems.add("with_ip_adapter: weight_name is empty; name the file of an adapter.")
    root = Path(adapter.location).expanduser()
    if not root.is_dir():
        if root.is_absolute() or adapter.location.count("/") != 1:
            problems.add(f"with_ip_adapter: {root} is no directory; pass one, or a repository such as owner/name.")
        return
    for name in adapter.weight_names:
        file = root / adapter.subfolder / name
        if not file.is_file():
            problems.add(f"with_ip_adapter: {file} does not exist; name a file of the adapter.")
            continue
        with problems.noted(about="with_ip_adapter: "):
            require_readable(file)


def check_guidance(settings: BuilderSettings, unet: nn.Module | None, problems: Problems) -> None:
    with problems.noted(TypeError, about="with_guidance: " if settings.guidance else "with_guider: "):
        guider = make_guider(settings)
        if guider is None:
            return
        if unet is not None:
            check_guider(guider, unet)
        elif not isinstance(guider, BaseGuidance):
            raise ValueError(f"{guider!r} is no guider; pass one such as ClassifierFreeGuidance(guidance_scale=2.0).")
        if settings.compile is not None:
            settings_of(guider)


def make_guider(settings: BuilderSettings) -> Any:
    """The guider that the steps ask for; None where they leave the pipeline its own.

    Raises:
        ValueError: a scale, start or stop that is out of range.
    """
    if settings.guidance is None:
        return settings.guider
    require_guidance(settings.guidance["guidance_scale"])
    return ClassifierFreeGuidance(**settings.guidance)


def check_attention(attention: Any, unet: nn.Module | None, device: torch.device, problems: Problems) -> None:
    """Puts each part of the plan into effect on a UNet without values, to find out what the machine lacks."""
    if attention is None:
        return
    plan: Any = attention.config.plan if isinstance(attention, AttentionConfig) else attention
    entries: list[Any] = [plan]
    if isinstance(plan, Mapping):
        entries = [{key: name} for key, name in plan.items()]
    elif isinstance(plan, (list, tuple)):
        entries = [[entry] for entry in plan]
    for entry in entries:
        with problems.noted(about="with_attention: "):
            parsed = parse_plan(entry)
            if unet is not None:
                AttentionConfig().establish(parsed, {"unet": unet}, device=device)
