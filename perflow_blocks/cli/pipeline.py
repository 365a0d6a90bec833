"""Loading a pipeline for the command line."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .unets import is_unet, read_config, require_unet

if TYPE_CHECKING:
    import torch

INDEX_NAMES = ("modular_model_index.json", "model_index.json")


def quiet_libraries() -> None:
    """Keeps notices and loading bars of the model libraries off the terminal; warnings about the model stay."""
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        logging.getLogger(name).setLevel(logging.ERROR)  # where torchao is installed, that its CUDA kernels are not
    import transformers.utils.logging as transformers_logging

    transformers_logging.set_verbosity_error()  # before diffusers, whose imports have notices
    transformers_logging.disable_progress_bar()
    import diffusers.utils.logging as diffusers_logging

    diffusers_logging.disable_progress_bar()
    # That guiders are experimental, and that a LoRA has no part for the text encoders.
    for name in ("diffusers.guiders.guider_utils", "diffusers.loaders.lora_base"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Every block logs the traceback of an error that passes through it; the command itself says what is wrong.
    logging.getLogger("diffusers.modular_pipelines.modular_pipeline").setLevel(logging.CRITICAL)


def see_own_modules() -> None:
    """Lets a pipeline's code import modules that lie where the command runs, as under `python -m`."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def is_pipeline(folder: Path) -> bool:
    return any((folder / name).is_file() for name in INDEX_NAMES)


def holds_pipeline(folder: Path) -> bool:
    """Whether the weights that a pipeline's index names are in its folder; told by the VAE."""
    return is_pipeline(folder) and (folder / "vae").is_dir()


def model_location(model: str | None) -> str:
    """The embedded model's directory for None; else the directory or repository, checked without network.

    Raises:
        ValueError: no embedded model is installed, or the directory holds no pipeline.
    """
    if model is None:
        from ..demo import weights_directory

        model = str(weights_directory())
    path = Path(model).expanduser()
    if path.is_dir():
        if not is_pipeline(path):
            raise ValueError(f"{path} holds none of {', '.join(INDEX_NAMES)}; pass the directory of a saved pipeline.")
        return str(path)
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
        state = "is a file" if path.exists() else "does not exist"
        raise ValueError(f"--model {model} {state}; pass a saved pipeline's directory, or a repository: owner/name.")
    return model


def vae_factor(location: str) -> int:
    """Pixels to a latent, of which sizes are multiples: told by the VAE of a directory, and 8 for all repositories."""
    channels = read_config(Path(location, "vae")).get("block_out_channels")
    return 2 ** (len(channels) - 1) if isinstance(channels, list) else 8


def find_model(model: str | None, unet: Path | None) -> tuple[str, Path | None]:
    """Where the pipeline is, and the folder of a merged UNet to put into it.

    For a folder of a UNet alone, the pipeline is the one around it, if it has a VAE there; else that which the UNet
    was loaded from for the merge; else one around it whose index names other places.
    """
    if unet is not None:
        return model_location(model), require_unet(unet)
    folder = Path(model or "").expanduser()
    if model is None or is_pipeline(folder) or not is_unet(folder):
        return model_location(model), None
    around, origin = folder.absolute().parent, read_config(folder).get("_name_or_path")
    named = [Path(origin).parent] if origin and Path(origin).is_dir() else []
    places = [*([around] if holds_pipeline(around) else []), *named, around]
    place = next(filter(is_pipeline, places), None)
    if place is None:
        raise ValueError(f"--model {model} is a UNet alone; pass --unet {model}, and its pipeline as --model.")
    return str(place), folder


def load_pipeline(
    location: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    images: bool = False,
    unet: Path | None = None,
    controlnet: str | None = None,
    loras: Sequence[tuple[Path, float]] = (),
    offload: str | None = None,
    compile: bool = False,
    watched: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """The pipeline of a directory or repository, with the blocks that it names.

    Args:
        location: from `find_model` or `model_location`.
        images: whether calls may start from images; otherwise they are of the text-to-image workflow.
        unet: folder of a merged UNet, which is few-step without the delta that the pipeline may name.
        loras: files or folders, and factors. The recipe in a file of `perflow to-lora` is set too.
        offload: None, or "model" or "group": what lies on the CPU while it does not run.
        watched: whether calls take a `preview_callback` and a `step_callback`.
        trust_remote_code: whether blocks may be of the location's own code.

    Raises:
        OSError: the location cannot be read.
        ValueError: it lacks a component that generation needs, or its code is not trusted.
    """
    quiet_libraries()
    from diffusers import AutoModel, UNet2DConditionModel

    from ..blocks.block_source import load_blocks
    from ..blocks.observers import PreviewStep, StepCallbackStep
    from ..blocks.recombine import compile_loops, insert_loop_block
    from ..delta.files import open_weights, read_recipe

    if trust_remote_code:
        see_own_modules()
    blocks: Any = load_blocks(location, trust_remote_code)
    if watched:
        insert_loop_block(blocks, "preview", PreviewStep, before="solver")
        insert_loop_block(blocks, "callback", StepCallbackStep, after="solver")
    drawing = blocks
    with suppress(NotImplementedError):  # blocks for one task alone
        drawing = blocks.get_workflow("text2image")
    pipeline = (blocks if images or controlnet else drawing).init_pipeline(location)
    needed = {spec.name for spec in drawing.expected_components} - ({"unet"} if unet else set())
    types = {name: pipeline.get_component_spec(name).type_hint for name in pipeline.pretrained_component_names}
    pipeline.load_components([name for name in types if name in needed and types[name]], dtype=dtype)
    if unet is not None:
        pipeline.update_components(unet=UNet2DConditionModel.from_pretrained(unet, dtype=dtype), delta=None)
    if controlnet is not None:
        pipeline.update_components(controlnet=AutoModel.from_pretrained(controlnet, dtype=dtype))
    missing = [name for name in pipeline.null_component_names if name in needed - {"scheduler"}]
    if missing:
        raise ValueError(f"{location} gave no {', '.join(missing)}; pass a complete SDXL or SD model.")
    for number, (path, _) in enumerate(loras):
        pipeline.load_lora_weights(path, adapter_name=f"lora_{number}")
        recipe = vars(read_recipe(open_weights(path))) if path.is_file() else {}
        known = {name: value for name, value in recipe.items() if value is not None and name in pipeline._config_specs}
        pipeline.update_components(**known)
    if loras:
        pipeline.set_adapters([f"lora_{number}" for number in range(len(loras))], [scale for _, scale in loras])
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif offload == "group":
        pipeline.enable_group_offload(device, offload_type="leaf_level")
    else:
        pipeline.to(device)
    if compile:
        compile_loops(pipeline)
    return pipeline
