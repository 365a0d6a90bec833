"""Loading a pipeline for the command line."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    logging.getLogger("diffusers.guiders.guider_utils").setLevel(logging.ERROR)  # that guiders are experimental
    # Every block logs the traceback of an error that passes through it; the command itself says what is wrong.
    logging.getLogger("diffusers.modular_pipelines.modular_pipeline").setLevel(logging.CRITICAL)


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
        if not any((path / name).is_file() for name in INDEX_NAMES):
            raise ValueError(f"{path} holds none of {', '.join(INDEX_NAMES)}; pass the directory of a saved pipeline.")
        return str(path)
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
        state = "is a file" if path.exists() else "does not exist"
        raise ValueError(f"--model {model} {state}; pass a saved pipeline's directory, or a repository: owner/name.")
    return model


def load_pipeline(location: str, *, device: torch.device, dtype: torch.dtype) -> Any:
    """The preset's text-to-image workflow with the weights of a directory or repository, whose own code is not run.

    Raises:
        OSError: the location cannot be read.
        ValueError: it lacks a component that generation needs.
    """
    quiet_libraries()
    from ..blocks.block_source import preset_for

    blocks: Any = preset_for(location)
    pipeline = blocks.get_workflow("text2image").init_pipeline(location)
    pipeline.load_components(dtype=dtype)
    missing = [name for name in pipeline.null_component_names if name != "scheduler"]
    if missing:
        raise ValueError(f"{location} gave no {', '.join(missing)}; pass a complete SDXL or SD model.")
    return pipeline.to(device)
