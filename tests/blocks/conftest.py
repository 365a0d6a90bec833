"""The basic workflows, for tests that every one of them must pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LayerSkipConfig
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AdaptiveProjectedMixGuidance,
    AutoGuidance,
    BaseGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    FrequencyDecoupledGuidance,
    LTX2Guidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    TangentialClassifierFreeGuidance,
)
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLLoopDenoiser
from diffusers.utils import is_kornia_available
from PIL import ExifTags, Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from perflow_blocks import PeRFlowLoopDenoiser, PeRFlowSDXLAutoBlocks
from perflow_blocks.blocks.encode import PeRFlowAutoTextEncoderStep
from perflow_blocks.blocks.loop_block import LoopBlock
from perflow_blocks.blocks.recombine import find_loops, insert_loop_block
from perflow_blocks.core.parameterization import window_table, x0_coefficients
from perflow_blocks.core.step_plan import StepPlan, apply_step
from perflow_blocks.delta.extract import save_delta
from perflow_blocks.delta.recipe import DeltaRecipe
from perflow_blocks.schedulers import PeRFlowScheduler
from perflow_blocks.testing.tiny import (
    BETAS,
    tiny_controlnet,
    tiny_image,
    tiny_mask,
    tiny_sdxl_components,
    tiny_sdxl_unet,
)
from tests.conftest import generator, make_pipeline, no_host_reads

TASKS = ("text2image", "image2image", "inpainting")


def workflow_inputs(name: str) -> dict[str, Any]:
    """What a call of the workflow needs besides the prompt; new objects at each call."""
    inputs: dict[str, Any] = {"num_inference_steps": 4}
    if name != "text2image":
        inputs |= {"image": tiny_image(), "strength": 0.8}
    if name == "inpainting":
        inputs |= {"mask_image": tiny_mask()}
    return inputs


def write_delta(path: Path, recipe: DeltaRecipe | None = None, part: str = "") -> Path:
    """dW from `tiny_sdxl_unet(0)`, the pipeline's, to `tiny_sdxl_unet(1)`; with `part` of the keys that hold it."""
    base, student = tiny_sdxl_unet(0).state_dict(), tiny_sdxl_unet(1).state_dict()
    difference = {name: student[name] - base[name] for name in base if part in name}
    save_delta(difference, path, recipe, dtype=torch.float32, partial=bool(part))
    return path


def as_a_camera_stores(image: Image.Image) -> Image.Image:
    """The image on its side, with an EXIF orientation that turns it upright."""
    stored = image.transpose(Image.Transpose.ROTATE_90)
    exif = stored.getexif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees clockwise
    file = BytesIO()
    stored.save(file, "PNG", exif=exif)
    return Image.open(file)


MIDDLE = "mid_block.attentions.0.transformer_blocks"
BATCHED, UNGUIDED, IN_TURN, IN_THREE = [2], [1], [1, 1], [1, 1, 1]


def layers(**settings: Any) -> LayerSkipConfig:
    return LayerSkipConfig(**{"indices": [0], "fqn": MIDDLE, **settings})


def attention_scores(**settings: Any) -> LayerSkipConfig:
    return layers(skip_attention=False, skip_ff=False, skip_attention_scores=True, **settings)


def skip_layer(scale: float = 3.0, config: Any = None, **settings: Any) -> SkipLayerGuidance:
    """Over all steps but the first, which diffusers always leaves out."""
    settings = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0, **settings}
    return SkipLayerGuidance(scale, skip_layer_config=config or layers(), **settings)


def perturbed(scale: float = 3.0, config: Any = None, **settings: Any) -> PerturbedAttentionGuidance:
    settings = {"perturbed_guidance_start": 0.0, "perturbed_guidance_stop": 1.0, **settings}
    return PerturbedAttentionGuidance(scale, perturbed_guidance_config=config or attention_scores(), **settings)


EVERYWHERE, AFTER_THE_FIRST = [BATCHED] * 4, [IN_TURN, IN_THREE, IN_THREE, IN_THREE]
GUIDERS: dict[str, tuple[Callable[[float], BaseGuidance], list[list[int]]]] = {
    "cfg": (lambda scale: ClassifierFreeGuidance(scale), EVERYWHERE),
    "cfg_rescaled": (lambda scale: ClassifierFreeGuidance(scale, guidance_rescale=0.7), EVERYWHERE),
    "cfg_original": (lambda scale: ClassifierFreeGuidance(scale, use_original_formulation=True), EVERYWHERE),
    "apg": (
        lambda scale: AdaptiveProjectedGuidance(scale, adaptive_projected_guidance_momentum=-0.5, eta=0.3),
        EVERYWHERE,
    ),
    "apg_mix": (
        lambda scale: AdaptiveProjectedMixGuidance(
            scale, adaptive_projected_guidance_scale=scale, adaptive_projected_guidance_start_step=1
        ),
        EVERYWHERE,
    ),
    "zero_star": (lambda scale: ClassifierFreeZeroStarGuidance(scale, zero_init_steps=0), EVERYWHERE),
    "zero_star_zeroed": (lambda scale: ClassifierFreeZeroStarGuidance(scale), EVERYWHERE),
    "tangential": (lambda scale: TangentialClassifierFreeGuidance(scale), EVERYWHERE),
    "ltx2": (lambda scale: LTX2Guidance(scale), EVERYWHERE),
    "auto": (lambda scale: AutoGuidance(scale, auto_guidance_config=layers()), [IN_TURN] * 4),
    "skip_layer": (skip_layer, AFTER_THE_FIRST),
    "skip_attention": (lambda scale: skip_layer(scale, layers(skip_ff=False)), AFTER_THE_FIRST),
    "perturbed": (perturbed, AFTER_THE_FIRST),
    "perturbed_up": (lambda scale: perturbed(scale, attention_scores(fqn="up_blocks")), AFTER_THE_FIRST),
}
if is_kornia_available():
    GUIDERS["frequency"] = (lambda scale: FrequencyDecoupledGuidance([scale, 2.0]), EVERYWHERE)


class RecordingDenoiser(PeRFlowLoopDenoiser):
    """This project's denoiser or the stock one; keeps each step's prediction and the batch sizes of its UNet calls."""

    def __init__(self, pipe: Any, *, stock: bool = False, guard: bool = False) -> None:
        super().__init__()
        self.denoiser = StableDiffusionXLLoopDenoiser() if stock else PeRFlowLoopDenoiser()
        self.guard = guard
        self.calls: list[list[int]] = []
        self.predictions: list[torch.Tensor] = []
        pipe.unet.register_forward_pre_hook(lambda module, args: self.calls[-1].append(args[0].shape[0]))

    def __call__(self, components: Any, block_state: Any, i: int, t: torch.Tensor) -> Any:
        self.calls.append([])
        block_state.scaled_latents = block_state.latents  # what the stock denoiser reads
        with no_host_reads() if self.guard else nullcontext():
            self.denoiser(components, block_state, i=i, t=t)
        self.predictions.append(block_state.noise_pred)
        return components, block_state


def put_in_place_of_denoisers(blocks: Any, denoiser: Any) -> None:
    for name, block in blocks.sub_blocks.items():
        if isinstance(block, PeRFlowLoopDenoiser):
            blocks.sub_blocks[name] = denoiser
        else:
            put_in_place_of_denoisers(block, denoiser)


def draw(guider: BaseGuidance, *, prompts: int = 2, **denoiser: bool) -> Any:
    """Four steps: the recording, which also holds the final `latents` (prompts, 4, 16, 16)."""
    pipe = make_pipeline(guider=guider)
    recording = RecordingDenoiser(pipe, **denoiser)
    put_in_place_of_denoisers(pipe._blocks, recording)
    recording.latents = pipe(
        prompt=["a star", "a ring"][:prompts],
        negative_prompt="a square",
        generator=generator(3),
        num_inference_steps=4,
        output_type="latent",
        output="latents",
    )
    return recording


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


def hooks_of(unet: Any) -> list[str]:
    registries = [module._diffusers_hook for module in unet.modules() if hasattr(module, "_diffusers_hook")]
    return [name for registry in registries for name in registry.hooks]


EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


class Spy(LoopBlock):
    """Hands components, block state and step to the function `spy` of the call."""

    @property
    def description(self) -> str:
        return "Hands components, block state and step to a function."

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("spy", type_hint=Callable, description="Called with components, block state and step.")]

    def __call__(self, components: Any, block_state: Any, i: int, t: Tensor) -> tuple[Any, Any]:
        if block_state.spy is not None:
            block_state.spy(components, block_state, i)
        return components, block_state


def blocks_with(name: str, block: Any, **place: str) -> PeRFlowSDXLAutoBlocks:
    """The preset with a block in each of its loops."""
    blocks = PeRFlowSDXLAutoBlocks()
    insert_loop_block(blocks, name, block, **place)
    return blocks


def loop_pipeline(workflow: str, blocks: Any = None, dtype: torch.dtype = torch.float32, **components: Any) -> Any:
    if "controlnet" in workflow:
        components = {"controlnet": tiny_controlnet(), **components}
    pipe = make_pipeline(blocks, **components)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.to(dtype)
    return pipe


def loop_inputs(workflow: str, steps: int = 5) -> dict[str, Any]:
    """What a call needs besides the prompt."""
    inputs: dict[str, Any] = {"num_inference_steps": steps}
    if "inpainting" in workflow:
        inputs |= {"image": tiny_image(1), "mask_image": tiny_mask(), "strength": 1.0}
    if "controlnet" in workflow:
        inputs |= {"control_image": tiny_image(2)}
    return inputs


def tiny_plan(steps: int) -> StepPlan:
    """The plan that a tiny pipeline makes for itself."""
    scheduler = PeRFlowScheduler(**BETAS)
    scheduler.set_timesteps(steps)
    assert scheduler.plan is not None
    return scheduler.plan


def predicted_clean(steps: int, i: int, latents: Tensor, noise_pred: Tensor) -> Tensor:
    """The clean latents by the core's formula, for step i of as many steps."""
    scheduler, plan = PeRFlowScheduler(**BETAS), tiny_plan(steps)
    window = window_table(scheduler.windows, scheduler.alphas_cumprod.double())[plan.window_index[i]]
    return apply_step(latents, noise_pred, *x0_coefficients(window, plan.times[i], plan.prediction_type))


def guard_against_reads(pipe: Any) -> None:
    """From now on a read of the device within the loops' steps fails."""
    for loop in find_loops(pipe._blocks):
        vars(loop)["_run"] = _guarded(loop._run)


def _guarded(steps: Callable[..., int]) -> Callable[..., int]:
    def run(*args: Any) -> int:
        with no_host_reads():
            return steps(*args)

    return run


def poison(unet: nn.Module, timestep: int, image: int) -> Any:
    """Makes the UNet's prediction for an image infinite at a timestep."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor]:
        broken = output[0].clone()
        broken[image] += torch.where(args[1] == timestep, math.inf, 0.0)  # without reading the timestep
        return (broken,)

    return unet.register_forward_hook(hook)


def make_float16_overflow(model: Any) -> None:
    """Scales values and output of an attention, in float32 without effect: the values leave float16's range."""
    for block in model.mid_block.attentions[0].transformer_blocks:
        block.attn1.to_v.weight.data *= 2.0**17
        block.attn1.to_out[0].weight.data *= 2.0**-17


TEXT = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
BOTH = ["text_encoder", "text_encoder_2"]
Result = dict[str, Tensor | None]


def text_pipeline(block: Any, **components: Any) -> Any:
    pipe = block.init_pipeline()
    tiny = tiny_sdxl_components()
    pipe.update_components(**{**{name: tiny[name] for name in TEXT}, **components})
    return pipe


def encode(pipe: Any, prompt: Any = "a red star", **inputs: Any) -> Result:
    state = pipe(prompt=prompt, **inputs)
    return {name: state.get(name) for name in EMBEDS}


def same(one: Result, other: Result) -> bool:
    def equal(a: Tensor | None, b: Tensor | None) -> bool:
        return a is b if a is None or b is None else a.dtype == b.dtype and torch.equal(a, b)

    return all(equal(one[name], other[name]) for name in EMBEDS)


def uncached(pipe: Any, **inputs: Any) -> Result:
    """What the block without a cache gives with the very same components."""
    parts = {name: getattr(pipe, name) for name in (*TEXT, "guider")}
    return encode(text_pipeline(PeRFlowAutoTextEncoderStep(), **parts), **inputs)


def count_encodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes of the encoders that ran, appended to as they run; unlike hooks this leaves no trace on them."""
    ran: list[str] = []
    for kind in (CLIPTextModel, CLIPTextModelWithProjection):

        def forward(self: Any, *args: Any, _own: Any = kind.forward, _kind: Any = kind, **kwargs: Any) -> Any:
            ran.append(_kind.__name__)
            return _own(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", forward)
    return ran


def embedding(pipe: Any) -> nn.Embedding:
    return pipe.text_encoder_2.get_input_embeddings()


def write(pipe: Any) -> None:
    with torch.no_grad():
        embedding(pipe).weight.mul_(1.5)
