"""The embedded demo: a small model of SDXL architecture that this project trained and distilled itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

    from ..blocks.pipeline import PeRFlowModularPipeline


def weights_directory() -> Path:
    """The embedded model: a directory that `PeRFlowModularPipeline.from_pretrained` loads offline."""
    directory = Path(__file__).parent / "weights"
    if not (directory / "unet").is_dir():
        raise ValueError(f"no embedded model in {directory}; run `make demo-weights`, or pass --model.")
    return directory


def perflow_pipeline(directory: Path | None = None) -> PeRFlowModularPipeline:
    """The embedded PeRFlow pipeline in float32 with all components loaded; the first call merges its delta."""
    import torch

    from ..blocks.pipeline import PeRFlowModularPipeline

    pipe = PeRFlowModularPipeline.from_pretrained(directory or weights_directory())
    pipe.load_components(dtype=torch.float32)
    return pipe


def teacher_pipeline(directory: Path | None = None) -> StableDiffusionXLPipeline:
    """The embedded base model, without the delta, as a plain `StableDiffusionXLPipeline` in float32."""
    from ..evaluation.samplers import classic_pipeline

    return classic_pipeline(perflow_pipeline(directory))
