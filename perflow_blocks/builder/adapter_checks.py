"""What can be found wrong with LoRAs and IP-Adapters before a model is loaded."""

from __future__ import annotations

import importlib.util
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from safetensors import safe_open
from torch import nn

from ..delta.files import describe_mismatch
from .parts import Part
from .problems import Problems
from .settings import BuilderSettings, IPAdapterChoice, LoraChoice
from .sharing import LORA_MODELS, adapters_of, adapters_of_builder
from .weight_check import require_readable

_LORA_DOWN = re.compile(r"unet\.(.+)\.(lora_A|lora\.down|lora_linear_layer\.down)\.weight")


def check_loras(loras: Sequence[LoraChoice], component_names: Sequence[str], unet: Any, problems: Problems) -> None:
    """
    Args:
        unet: without values; None where its architecture is not known.
    """
    if not loras:
        return
    if importlib.util.find_spec("peft") is None:
        problems.add("with_lora needs the package peft; pip install peft.")
        return
    missing = [name for name in LORA_MODELS if name not in component_names]
    if missing:
        problems.add(f"with_lora: the blocks have no {', '.join(missing)} to load a LoRA into; pass blocks that do.")
    for name, count in Counter(str(lora.adapter_name) for lora in loras).items():
        if count > 1:
            problems.add(f"with_lora: {count} LoRAs are called {name!r}; pass adapter_name= to tell them apart.")
    for lora in loras:
        about = f"with_lora({lora.location!r}): "
        if not isinstance(lora.adapter_name, str) or "." in lora.adapter_name:
            problems.add(f"{about}adapter_name={lora.adapter_name!r} is wrong; pass a name without a dot.")
        if not _is_finite(lora.weight):
            problems.add(f"{about}weight={lora.weight!r} is no finite number; pass 1.0, say.")
        with problems.noted(about=about):
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
    try:
        weights = StableDiffusionXLLoraLoaderMixin.lora_state_dict(
            str(path), unet_config=unet.config, weight_name=lora.weight_name
        )[0]
    except OSError:
        raise  # says which file is missing
    except Exception as error:  # whatever the converters of other tools' names stumble over
        raise ValueError(
            f"it cannot be read as a LoRA ({type(error).__name__}: {error}); download it again, or pass another one."
        ) from error
    example = next(_misfits(weights, unet), None if any("lora" in name for name in weights) else "no key holds 'lora'")
    if example is not None:
        raise ValueError(f"it is no LoRA for this UNet ({example}); pass one of the same family.")


def _misfits(weights: Mapping[str, Any], unet: nn.Module) -> Iterator[str]:
    """What does not fit: modules that the UNet has not, matrices that are missing, and those of another shape."""
    modules = dict(unet.named_modules())
    for name, down in weights.items():
        found = _LORA_DOWN.fullmatch(name)
        if found is None:
            continue
        weight = getattr(modules.get(found[1]), "weight", None)
        up = weights.get(name.replace(found[2], found[2].replace("lora_A", "lora_B").replace("down", "up")))
        if weight is None:
            yield found[1]
        elif up is None:
            yield f"{found[1]} has only one of two matrices"
        elif down.ndim < 2 or up.ndim < 2 or (up.shape[0], down.shape[1]) != tuple(weight.shape[:2]):
            yield f"{found[1]} is {list(weight.shape)}, its matrices {list(up.shape)} and {list(down.shape)}"
        elif up.shape[1] != down.shape[0]:
            yield f"{found[1]}: the ranks of {list(up.shape)} and {list(down.shape)} differ"


def check_ip_adapter(
    adapter: IPAdapterChoice | None, component_names: Sequence[str], unet: Any, problems: Problems
) -> None:
    """
    Args:
        unet: without values; None where its architecture is not known.
    """
    if adapter is None:
        return
    if "image_encoder" not in component_names:
        problems.add("with_ip_adapter: the blocks take no image_encoder; pass blocks, or a workflow, that do.")
    if not adapter.weight_names:
        problems.add("with_ip_adapter: weight_name is empty; name the file of an adapter.")
    if not _is_finite(adapter.scale):
        problems.add(f"with_ip_adapter: scale={adapter.scale!r} is no finite number; pass 1.0, say.")
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
            if unet is not None and file.suffix == ".safetensors":
                _require_ip_adapter(file, unet)


def _require_ip_adapter(file: Path, unet: Any) -> None:
    """Compares the projections of pictures with those of text beside which they will stand."""
    with safe_open(file, framework="pt") as opened:
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    given = {
        name: shape for name, shape in shapes.items() if re.fullmatch(r"ip_adapter\.\d+\.to_[kv]_ip\.weight", name)
    }
    crossing = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    expected = {}
    for index, name in enumerate(crossing):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        for kind in ("k", "v"):  # the adapter counts attentions to itself as well
            projection = getattr(attention, f"to_{kind}")
            expected[f"ip_adapter.{2 * index + 1}.to_{kind}_ip.weight"] = tuple(projection.weight.shape)
    mismatch = describe_mismatch(given, expected, given="the file", expected="the UNet")
    if not any(name.startswith("image_proj.") for name in shapes):
        mismatch = "it holds no image_proj"
    if mismatch:
        raise ValueError(f"{file} is no IP-Adapter for this UNet: {mismatch}; pass one of the same family.")


def check_given_adapters(
    parts: Mapping[str, Part], shared: Mapping[str, Any], settings: BuilderSettings, problems: Problems
) -> None:
    """Adapters of given models that those of the steps would replace, or that another builder's pipeline brought."""
    for name in LORA_MODELS:
        if name not in parts or parts[name].origin != "given" or name in shared:
            continue
        held, of_builder = adapters_of(parts[name].value), adapters_of_builder(parts[name].value)
        loras = held.loras if settings.loras else of_builder.loras
        if loras:
            problems.add(
                f"the {name} that is given holds LoRAs already ({', '.join(sorted(loras))}), which these steps do not "
                f"name or would switch off; call unload_lora_weights on its pipeline, or pass another {name}."
            )
        if of_builder.ip or (held.ip and settings.ip_adapter is not None):
            problems.add(
                f"the {name} that is given holds an IP-Adapter already, which these steps do not name or would "
                f"replace; call unload_ip_adapter on its pipeline, or pass another {name}."
            )


def _is_finite(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
