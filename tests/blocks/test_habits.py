"""What users of `StableDiffusionXLPipeline` are used to, on the pipeline of the presets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import HookRegistry
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from torch import nn
from transformers import PreTrainedModel

from perflow_blocks import PeRFlowModularPipeline, PeRFlowSDXLAutoBlocks, delta_to_lora, merge_delta, unmerge_delta
from perflow_blocks.blocks.pipeline import IN_PLACE_OF
from perflow_blocks.delta.lora import save_lora, save_residual
from perflow_blocks.delta.merge import merge_records
from perflow_blocks.demo import perflow_pipeline
from perflow_blocks.testing import (
    load_tiny_ip_adapter,
    tiny_controlnet,
    tiny_controlnet_union,
    tiny_image,
    tiny_sdxl_components,
)
from tests.blocks.conftest import workflow_inputs, write_delta
from tests.blocks.test_features_lora import write_lora
from tests.conftest import count_unet_calls, generator, make_pipeline, run, watch_models

CPU, DEVICE = torch.device("cpu"), torch.device("cpu:0")
"""Two devices to all code that compares them; tensors are on the same one."""

CLASSIC_CALLS = {
    name: inspect.signature(getattr(diffusers, name).__call__).parameters.keys() - {"self", "args", "kwargs"}
    for name in dir(diffusers)
    if name.startswith("StableDiffusionXL") and name.endswith("Pipeline") and "Modular" not in name
}
"""By pipeline, the arguments of its call."""

TASKS: dict[str, dict[str, Any]] = {
    "text": {},
    "inpainting": workflow_inputs("inpainting"),
    "ControlNet": {"control_image": tiny_image(3)},
    "IP-Adapter": {"ip_adapter_image": tiny_image(4)},
}
tasks = pytest.mark.parametrize("task", ["inpainting", "ControlNet", "IP-Adapter"])


def make(task: str = "text") -> Any:
    pipe = make_pipeline(**({"controlnet": tiny_controlnet()} if task == "ControlNet" else {}))
    if task == "IP-Adapter":
        load_tiny_ip_adapter(pipe)
    return pipe


# The call


@pytest.mark.parametrize("prompt", ["a red star", ["a red star", "a blue ring"]])
def test_the_first_argument_is_the_prompt(prompt: Any) -> None:
    pipe = make()
    images = pipe(prompt, generator=generator(), output_type="latent").images
    assert torch.equal(images, run(pipe, prompt=prompt))
    with pytest.raises(ValueError, match="prompt is given twice"):
        pipe(prompt, prompt=prompt)
    with pytest.raises(ValueError, match="`prompt` has to be of type `str` or `list`"):
        pipe(7)


def test_the_first_argument_may_be_a_state() -> None:
    pipe, state = make(), PipelineState()
    state.set("prompt", "a red star")
    state.set("note", 7)
    images = pipe(state, generator=generator(), output_type="latent").images
    assert torch.equal(images, run(pipe))
    assert pipe(state=state, output=["note", "prompt"]) == {"note": 7, "prompt": "a red star"}


def test_without_a_dictionary_the_images_are_a_tuple() -> None:
    pipe = make()
    (images,) = pipe("a red star", generator=generator(), output_type="latent", return_dict=False)
    assert torch.equal(images, run(pipe))
    assert pipe("a red star", return_dict=True).images[0].size == (32, 32)
    with pytest.raises(ValueError, match="return_dict=False and output='images' are both given"):
        pipe("a red star", return_dict=False, output="images")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"num_inference_step": 2}, r"^num_inference_step is not an input .*; did you mean num_inference_steps\?$"),
        ({"zzz": 1}, r"^zzz is not an input of this pipeline; print\(pipe.doc\) lists what there is\.$"),
        ({"promt_2": "a", "eta": 0.0}, r"^eta is not .*; leave it out; .* promt_2 is not .* mean prompt_2\?$"),
        ({"output": "image"}, r"^output='image' is not an output of this pipeline; did you mean images\?$"),
        ({"output": ["images", "latent"]}, r"^output='latent' is not an output .* latents\?$"),
    ],
)
def test_an_unknown_name_is_an_error_before_anything_runs(inputs: dict[str, Any], message: str) -> None:
    pipe = make()
    ran, stop = watch_models(pipe)
    with pytest.raises(ValueError, match=message):
        pipe("a red star", **inputs)
    stop()
    assert not ran and isinstance(pipe.scheduler, diffusers.EulerDiscreteScheduler)


def test_dictionaries_of_a_kind_and_what_a_state_holds_stay_allowed() -> None:
    pipe = make()
    state = pipe("a red star", generator=generator(), output_type="latent")
    embeddings = state.get_by_kwargs("denoiser_input_fields")
    kept = {name: embeddings[name] for name in embeddings if "embeds" in name}
    (latents,) = pipe(denoiser_input_fields=kept, generator=generator(), output_type="latent", return_dict=False)
    assert torch.equal(latents, state.images)


def test_every_argument_of_the_classic_calls_is_taken_or_has_a_sentence() -> None:
    names = set.union(*map(set, CLASSIC_CALLS.values()))
    pipe = make()
    own = set(inspect.signature(type(pipe).__call__).parameters) | pipe._input_names
    assert len(CLASSIC_CALLS) > 10 and names - own <= IN_PLACE_OF.keys() <= names
    for name in names - own:
        with pytest.raises(ValueError, match=rf"^{name} is not an input of this pipeline; .+\.$"):
            pipe("a red star", **{name: 1})


# Where models are


@tasks
def test_offloaded_models_give_the_same_images(task: str) -> None:
    pipe, inputs = make(task), TASKS[task]
    expected = run(pipe, **inputs)
    models = [model for model in pipe.components.values() if isinstance(model, nn.Module)]
    pipe.enable_model_cpu_offload(device="cpu")
    assert [hasattr(model, "_hf_hook") for model in models] == [True] * len(models)
    assert torch.equal(run(pipe, **inputs), expected)
    pipe.remove_all_hooks()
    assert not any(hasattr(model, "_hf_hook") for model in models)
    pipe.enable_group_offload(CPU, offload_type="leaf_level")
    assert HookRegistry.check_if_exists_or_initialize(pipe.unet.conv_in).hooks
    assert torch.equal(run(pipe, **inputs), expected)
    with pytest.raises(ValueError, match="group offloading enabled"):
        pipe.enable_model_cpu_offload(device="cpu")


@pytest.fixture
def residents(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], list[str]]]:
    """A function for the names of a pipeline's models on `DEVICE`, which is the CPU by another name."""
    move, places = nn.Module.to, dict[nn.Module, torch.device]()

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if args and isinstance(args[0], (str, torch.device)):
            places[module] = torch.device(args[0])
        return move(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "to", to)
    for kind in (diffusers.ModelMixin, PreTrainedModel):
        monkeypatch.setattr(kind, "device", property(lambda model: places.get(model, CPU)))
    yield lambda pipe: [name for name, part in pipe.components.items() if places.get(part) == DEVICE]


@tasks
def test_a_model_is_on_the_device_only_while_it_runs(task: str, residents: Callable[[Any], list[str]]) -> None:
    pipe = make(task)
    pipe.enable_model_cpu_offload(device=DEVICE)
    seen: list[tuple[str, list[str]]] = []
    for name, model in pipe.components.items():
        for module in (model, *model.children()) if isinstance(model, nn.Module) else ():
            module.register_forward_hook(lambda *_, name=name: seen.append((name, residents(pipe))))
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda seed: run(pipe, **TASKS[task], generator=generator(seed)), range(3)))
    pairs = {"unet", "controlnet"}
    assert {name for name, _ in seen} >= {"unet", "text_encoder", "text_encoder_2"}
    assert task != "inpainting" or "vae" in {name for name, _ in seen}
    for name, there in seen:
        assert name in there and set(there) <= (pairs if name in pairs else {name})
    assert ("unet", ["unet", "controlnet"]) in seen or task != "ControlNet"
    assert not residents(pipe)


def test_a_model_can_stay_out_of_group_offloading() -> None:
    pipe = make()
    pipe.enable_group_offload(CPU, offload_type="block_level", num_blocks_per_group=1, exclude_modules=["vae"])
    hooked = {
        name: any(hasattr(module, "_diffusers_hook") for module in model.modules())
        for name, model in pipe.components.items()
        if isinstance(model, nn.Module)
    }
    assert hooked.pop("vae") is False and all(hooked.values()) and "unet" in hooked


# From a classic pipeline


@pytest.mark.parametrize(
    ("kind", "added", "inputs"),
    [
        ("", {}, {}),
        ("Inpaint", {}, TASKS["inpainting"]),
        ("ControlNetUnion", {"controlnet": tiny_controlnet_union()}, TASKS["ControlNet"] | {"control_mode": 1}),
    ],
)
def test_from_a_classic_pipeline(kind: str, added: dict[str, Any], inputs: dict[str, Any]) -> None:
    components = tiny_sdxl_components() | added
    classic = getattr(diffusers, f"StableDiffusionXL{kind}Pipeline")(
        **components, add_watermarker=False, force_zeros_for_empty_prompt=False
    )
    scheduler, before = classic.scheduler, dict(classic.scheduler.config)
    pipe = PeRFlowModularPipeline.from_pipe(classic)
    assert isinstance(pipe, PeRFlowModularPipeline) and isinstance(pipe.blocks, PeRFlowSDXLAutoBlocks)
    assert all(getattr(pipe, name) is components[name] for name in components if name != "scheduler")
    assert pipe.config.force_zeros_for_empty_prompt is False
    expected = make_pipeline(**added)
    expected.update_components(force_zeros_for_empty_prompt=False)
    assert torch.equal(run(pipe, **inputs), run(expected, **inputs))
    assert classic.scheduler is scheduler and dict(scheduler.config) == before
    assert type(scheduler) is diffusers.EulerDiscreteScheduler


def test_a_classic_pipeline_brings_its_adapters_and_its_delta(tmp_path: Path) -> None:
    classic = diffusers.StableDiffusionXLPipeline(
        **tiny_sdxl_components(),
        image_encoder=None,
        feature_extractor=None,
        add_watermarker=False,
    )
    delta = write_delta(tmp_path / "delta.safetensors")
    merge_delta(classic.unet, delta)
    classic.load_lora_weights(write_lora(tmp_path, seed=1), adapter_name="style")
    pipe, other = PeRFlowModularPipeline.from_pipe(classic), make()
    other.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors", adapter_name="style")
    assert torch.equal(run(pipe), run(other, delta=delta))
    assert pipe.get_active_adapters() == ["style"] and len(merge_records(pipe.unet)) == 1


# A LoRA of the delta


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    return write_delta(tmp_path / "delta.safetensors")


@pytest.fixture
def lora(tmp_path: Path, delta: Path) -> Path:
    """A folder with a LoRA made from `delta`, whose header says so, beside the residual's folder."""
    converted = delta_to_lora(delta, rank=2)
    (tmp_path / "lora").mkdir()
    path = tmp_path / "lora" / "fast.safetensors"
    save_lora(converted, path)
    save_residual(converted, tmp_path / "residual.safetensors")
    return path.parent


@pytest.mark.parametrize("place", ["file", "named"])
def test_a_lora_of_the_merged_delta_is_refused(delta: Path, lora: Path, place: str) -> None:
    pipe = make()
    expected = run(pipe, delta=delta)
    given: dict[str, Any] = {"named": {"weight_name": "fast.safetensors"}}.get(place, {})
    with pytest.raises(
        ValueError, match=r"the LoRA .* was made from .*delta\.safetensors, which is merged .* unmerge_"
    ):
        pipe.load_lora_weights(lora / "fast.safetensors" if place == "file" else lora, **given)
    assert not pipe.get_list_adapters() and torch.equal(run(pipe, delta=delta), expected)
    pipe(prompt="a red star", delta=False, num_inference_steps=1)
    pipe.load_lora_weights(lora, **given)
    assert pipe.get_list_adapters()


def test_the_delta_of_a_loaded_lora_is_refused(tmp_path: Path, delta: Path, lora: Path) -> None:
    pipe = make()
    pipe.load_lora_weights(lora)
    batches = count_unet_calls(pipe)
    for asked in ({"delta": delta}, {}):
        if not asked:
            pipe.update_components(delta=str(delta))
        with pytest.raises(ValueError, match=r"the LoRA '\w+' was made from .*delta\.safetensors, .* delta=False"):
            run(pipe, **asked)
    assert not batches and not merge_records(pipe.unet)
    merge_delta(pipe.unet, delta)
    with pytest.raises(ValueError, match="would be in the weights too"):
        run(pipe, delta=None)
    unmerge_delta(pipe.unet)
    pipe.update_components(delta=None)
    residual = run(pipe, delta=tmp_path / "residual.safetensors")
    assert not torch.equal(residual, run(pipe, delta=False))
    pipe.delete_adapters(pipe.get_active_adapters()[0])
    run(pipe, delta=delta)
    assert len(merge_records(pipe.unet)) == 1


def test_a_pipeline_of_this_package_brings_the_delta_of_its_index() -> None:
    pipe = perflow_pipeline()
    other = PeRFlowModularPipeline.from_pipe(perflow_pipeline())
    assert torch.equal(run(other), run(pipe))


def test_blocks_without_a_decoder_have_no_images() -> None:
    blocks = PeRFlowSDXLAutoBlocks()
    del blocks.sub_blocks["decode"]
    pipe = make_pipeline(blocks)
    for inputs in ({"output": "images"}, {"return_dict": False}):
        with pytest.raises(ValueError, match=r"images.* is not an output"):
            pipe("a star", **inputs)
    assert pipe("a star", num_inference_steps=1, output="latents").shape == (1, 4, 16, 16)


def test_a_call_walks_the_modules_of_a_model_at_most_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDXL's UNet has 1,929 modules: each walk to look up a device or a type costs 5 ms of host time."""
    pipe, walked = make_pipeline(), list[nn.Module]()
    walk = nn.Module.named_modules
    inputs = {"prompt": None, "prompt_embeds": torch.zeros(1, 77, 32), "pooled_prompt_embeds": torch.zeros(1, 16)}

    def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for entry in walk(module, *args, **kwargs):
            if module is pipe.unet:
                walked.append(entry[1])
            yield entry

    run(pipe, **inputs)
    monkeypatch.setattr(nn.Module, "named_modules", counted)
    assert len(list(pipe.unet.modules())) == len(walked) > 100
    walked.clear()
    run(pipe, **inputs)
    assert len(walked) < 1.2 * sum(1 for _ in walk(pipe.unet))
