"""Writes the repositories of this directory, and those of the checkout's root, from the table below.

    python -m workflows.generate

Beside each recipe lies all that a repository of the Hub needs, so that `perflow push workflows/sdxl-text2image
your-name/sdxl-text2image` publishes it as it stands. A test compares the files with what this writes.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from perflow_blocks import PeRFlowSDXLAutoBlocks, export_workflow
from perflow_blocks.blocks.block_source import INDEX
from perflow_blocks.blocks.workflows import (
    PeRFlowSDXLControlNetBlocks,
    PeRFlowSDXLImage2ImageBlocks,
    PeRFlowSDXLInpaintBlocks,
    PeRFlowSDXLIPAdapterBlocks,
    PeRFlowSDXLText2ImageBlocks,
    PeRFlowSDXLTileUpscalerBlocks,
)
from perflow_blocks.demo.blocks import PeRFlowDemoBlocks
from perflow_blocks.hub.card import OWNER

ROOT = Path(__file__).parent.parent
WORKFLOWS = ROOT / "workflows"
ROOT_FILES = ("block.py", "modular_config.json", INDEX, "mellon_pipeline_config.json")
"""What the root has of a repository; its README.md is the project's."""


def place(location: str, subfolder: str = "", variant: str | None = None) -> dict[str, str | None]:
    """Where a component is published."""
    return {"pretrained_model_name_or_path": location, "subfolder": subfolder, "variant": variant}


def example(name: str, code: str, imports: str = "from diffusers import ModularPipeline", device: str = "cuda") -> str:
    """The Python on a card: loading, and then `code`."""
    dtype = "float32" if device == "cpu" else "float16"
    return (
        f"import torch\n{imports}\n\n"
        f'pipe = ModularPipeline.from_pretrained("{OWNER}/{name}", trust_remote_code=True)\n'
        f'pipe.load_components(dtype=torch.{dtype})\npipe.to("{device}")\n{code}\nimage.save("image.png")'
    )


@dataclass(frozen=True, kw_only=True)
class Workflow:
    """A repository to be written.

    Attributes:
        blocks: the class of its blocks.
        title: heading of its card.
        notes: what its card says besides.
        example: the Python on its card; None for a call with a prompt and images.
        sources: its components.
        config: its configuration values.
    """

    blocks: type[Any]
    title: str
    notes: str = ""
    example: str | None = None
    sources: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


BASE = "stabilityai/stable-diffusion-xl-base-1.0"
SDXL = {
    "unet": place("hansyan/perflow-sdxl-base", "unet", "v0-fix"),
    "vae": place("madebyollin/sdxl-vae-fp16-fix"),
    "text_encoder": place(BASE, "text_encoder", "fp16"),
    "text_encoder_2": place(BASE, "text_encoder_2", "fp16"),
    "tokenizer": place(BASE, "tokenizer"),
    "tokenizer_2": place(BASE, "tokenizer_2"),
    "scheduler": place(BASE, "scheduler"),
}
RECIPE = {
    "prediction_type": "ddim_eps",
    "num_time_windows": 4,
    "default_num_inference_steps": 6,
    "guidance_scale": 2.0,
}
ROOT_WORKFLOW = Workflow(
    blocks=PeRFlowSDXLAutoBlocks, title="PeRFlow for Stable Diffusion XL", sources=SDXL, config=RECIPE
)
PUBLISHED = {
    "sdxl-text2image": Workflow(
        blocks=PeRFlowSDXLText2ImageBlocks,
        title="PeRFlow SDXL, text-to-image",
        notes="Any other SDXL checkpoint takes a delta file in place of the distilled UNet: `pipe(..., delta=path)`.",
        sources=SDXL,
        config=RECIPE,
    ),
    "sdxl-image2image": Workflow(
        blocks=PeRFlowSDXLImage2ImageBlocks, title="PeRFlow SDXL, image-to-image", sources=SDXL, config=RECIPE
    ),
    "sdxl-inpaint": Workflow(
        blocks=PeRFlowSDXLInpaintBlocks, title="PeRFlow SDXL, inpainting", sources=SDXL, config=RECIPE
    ),
    "sdxl-controlnet": Workflow(
        blocks=PeRFlowSDXLControlNetBlocks,
        title="PeRFlow SDXL with a ControlNet for edges",
        notes=(
            "The control image shows white edges on black; `recipe.py` has a function that makes one of a photo.\n"
            "Another kind of control takes another ControlNet: `pipe.update_components(controlnet=...)`."
        ),
        sources={
            **SDXL,
            "controlnet": place("diffusers/controlnet-canny-sdxl-1.0", variant="fp16"),
        },
        config=RECIPE,
    ),
    "sdxl-tile-upscaler": Workflow(
        blocks=PeRFlowSDXLTileUpscalerBlocks,
        title="PeRFlow SDXL, tiled upscaler",
        notes=(
            "Enlarge the image first, two or four times, and pass it both as `image` and as `control_image`, with\n"
            "`strength=0.6`. Above 2048 pixels a side call `pipe.vae.enable_tiling()`. `recipe.py` does all this."
        ),
        example=example(
            "sdxl-tile-upscaler",
            'photo = load_image("photo.png")\n'
            "large = photo.resize((photo.width * 2 // 8 * 8, photo.height * 2 // 8 * 8))\n"
            'prompt = "a lighthouse at dusk"\n'
            'image = pipe(prompt=prompt, image=large, control_image=large, strength=0.6, output="images")[0]',
            imports="from diffusers import ModularPipeline\nfrom diffusers.utils import load_image",
        ),
        sources={**SDXL, "controlnet": place("xinsir/controlnet-tile-sdxl-1.0")},
        config=RECIPE,
    ),
    "sdxl-ip-adapter": Workflow(
        blocks=PeRFlowSDXLIPAdapterBlocks,
        title="PeRFlow SDXL with an IP-Adapter",
        notes=(
            "The adapter itself is loaded into the UNet, after the components, and `pipe.set_ip_adapter_scale` sets\n"
            "its weight: 0 for none, 1 for most."
        ),
        example=example(
            "sdxl-ip-adapter",
            'weights = {"subfolder": "sdxl_models", "weight_name": "ip-adapter_sdxl.safetensors"}\n'
            'pipe.load_ip_adapter("h94/IP-Adapter", **weights)\n'
            "pipe.set_ip_adapter_scale(0.6)\n"
            'style = load_image("style.png")\n'
            'image = pipe(prompt="a bear in a forest", ip_adapter_image=style, output="images")[0]',
            imports="from diffusers import ModularPipeline\nfrom diffusers.utils import load_image",
        ),
        sources={**SDXL, "image_encoder": place("h94/IP-Adapter", "sdxl_models/image_encoder")},
        config=RECIPE,
    ),
    "sdxl-base-refiner": Workflow(
        blocks=PeRFlowSDXLAutoBlocks,
        title="PeRFlow SDXL, base and refiner",
        notes=(
            "Two pipelines of this repository share all but the UNet. The first draws until a window boundary, the\n"
            "second goes on from its latents with a UNet of its own, which has to be distilled as well."
        ),
        example=example(
            "sdxl-base-refiner",
            'own = {"subfolder": "unet", "variant": "v0-fix", "dtype": torch.float16}\n'
            'unet = UNet2DConditionModel.from_pretrained("hansyan/perflow-sdxl-dreamshaper", **own)\n'
            f'refiner = ModularPipeline.from_pretrained("{OWNER}/sdxl-base-refiner", trust_remote_code=True)\n'
            'names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")\n'
            'refiner.update_components(unet=unet.to("cuda"), **{name: getattr(pipe, name) for name in names})\n\n'
            'prompt = "a lighthouse at dusk"\n'
            'latents = pipe(prompt=prompt, denoising_end=0.5, output_type="latent", output="images")\n'
            'image = refiner(prompt=prompt, image_latents=latents, denoising_start=0.5, output="images")[0]',
            imports="from diffusers import ModularPipeline, UNet2DConditionModel",
        ),
        sources=SDXL,
        config=RECIPE,
    ),
    "demo-text2image": Workflow(
        blocks=PeRFlowDemoBlocks,
        title="PeRFlow demo, text-to-image",
        notes="The weights are those of the installed package; nothing is downloaded, and a CPU will do.",
        example=example(
            "demo-text2image",
            'image = pipe(prompt="a red star on a black background", output="images")[0]',
            device="cpu",
        ),
    ),
}


def generate(name: str, folder: Path) -> Path:
    """Writes one published workflow, with its recipe, to `folder/name`."""
    workflow = PUBLISHED[name]
    made = export_workflow(
        make_pipeline(workflow),
        folder / name,
        title=workflow.title,
        notes=workflow.notes,
        example=workflow.example,
        licence="apache-2.0",
    )
    shutil.copyfile(WORKFLOWS / name / "recipe.py", made / "recipe.py")
    return made


def generate_root(folder: Path) -> Path:
    """Writes the root's repository to `folder/root`; of it the checkout has `ROOT_FILES`."""
    return export_workflow(make_pipeline(ROOT_WORKFLOW), folder / "root", title=ROOT_WORKFLOW.title)


def referring_pipeline(blocks: Any, places: Mapping[str, Mapping[str, Any]], **values: Any) -> Any:
    """A pipeline with nothing loaded: the fields of each component's specification, and configuration values."""
    pipe: Any = blocks.init_pipeline()
    for name, place in places.items():
        pipe._component_specs[name] = replace(pipe._component_specs[name], **place)
    pipe.update_components(**values)
    return pipe


def make_pipeline(workflow: Workflow) -> Any:
    """The pipeline of a workflow, with nothing loaded."""
    return referring_pipeline(workflow.blocks(), workflow.sources, **workflow.config)


def main(root: Path = ROOT) -> list[Path]:
    """Brings a checkout up to date and returns the files that changed."""
    changed: list[Path] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in PUBLISHED:
            made = generate(name, Path(temporary))
            names = {path.name for path in made.iterdir()} - {"recipe.py"}
            changed += _copied(made, root / "workflows" / name, sorted(names))
        changed += _copied(generate_root(Path(temporary)), root, ROOT_FILES)
    return changed


def _copied(made: Path, place: Path, names: Any) -> list[Path]:
    changed = [n for n in names if not (place / n).is_file() or (place / n).read_bytes() != (made / n).read_bytes()]
    place.mkdir(parents=True, exist_ok=True)
    for name in changed:
        shutil.copyfile(made / name, place / name)
    return [place / name for name in changed]


if __name__ == "__main__":
    sys.stdout.writelines(f"{path.relative_to(ROOT)}\n" for path in main())
