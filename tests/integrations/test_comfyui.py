"""The ComfyUI nodes, driven through a stand-in of its sampler call: they give our scheduler's latents."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perflow_blocks import PeRFlowScheduler
from perflow_blocks.core.noise_schedule import make_alphas_cumprod
from perflow_blocks.demo import perflow_pipeline
from perflow_blocks.testing.tiny import BETAS

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"
SCHEDULE: dict[str, Any] = BETAS
ALPHAS = make_alphas_cumprod(**SCHEDULE)
SIGMAS = ((1 - ALPHAS) / ALPHAS).sqrt().float()


@pytest.fixture(scope="module")
def nodes() -> Any:
    """The package as ComfyUI loads it: a module of a folder, under a name of its own."""
    spec = importlib.util.spec_from_file_location("comfyui_perflow", FOLDER / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["comfyui_perflow"] = module
    spec.loader.exec_module(module)
    return module


class Sampling(nn.Module):
    """The part of ComfyUI's discrete sampling settings that tells the network's timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sigmas", SIGMAS)

    def timestep(self, sigma: Tensor) -> Tensor:
        return (sigma.log()[None] - SIGMAS.log()[:, None]).abs().argmin(0)


class Comfy:
    """What ComfyUI calls a sampler with: it scales x, finds the timestep of sigma, and guides what is denoised.

    `network(z, timestep)` gives the outputs with and without the prompt.
    """

    def __init__(self, network: Any, scale: float, kind: str, sampling: Any = None) -> None:
        self.network, self.scale, self.kind, self.asked = network, scale, kind, list[int]()
        self.sampling = sampling or Sampling()
        self.inner_model = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=self.sampling))

    def get_model_object(self, name: str) -> Any:
        return getattr(self.inner_model.inner_model, name)

    def clone(self) -> Comfy:
        return Comfy(self.network, self.scale, self.kind, self.sampling)

    def add_object_patch(self, name: str, value: Any) -> None:
        setattr(self.inner_model.inner_model, name, value)

    def __call__(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        assert sigma.shape == (len(x),) and extra == {"seed": 1}
        timestep = int(self.get_model_object("model_sampling").timestep(sigma)[0])
        self.asked.append(timestep)
        level = sigma[:, None, None, None]
        z = x / (level**2 + 1) ** 0.5

        def denoised(output: Tensor) -> Tensor:
            if self.kind == "velocity":
                return x / (level**2 + 1) - output * level / (level**2 + 1) ** 0.5
            return x - output * level

        wanted, without = map(denoised, self.network(z, timestep))
        return without + (wanted - without) * self.scale


def network(z: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
    """A curved field that depends on latents and timestep."""
    phase = timestep / 300
    return torch.sin(z + phase), torch.cos(0.5 * z - phase)


@pytest.mark.parametrize("denoise", [1.0, 0.6])
@pytest.mark.parametrize("kind", ["ddim_eps", "diff_eps", "velocity"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("steps", [4, 6, 8])
def test_the_latents_are_those_of_our_scheduler(
    nodes: Any, monkeypatch: pytest.MonkeyPatch, steps: int, scale: float, kind: str, denoise: float
) -> None:
    samplers: Any = ModuleType("comfy.samplers")
    samplers.KSAMPLER = lambda function, extra_options: lambda *given: function(*given, **extra_options)
    monkeypatch.setitem(sys.modules, "comfy", ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.samplers", samplers)
    model, seen = Comfy(network, scale, kind), list[int]()
    sigmas, patched = nodes.NODE_CLASS_MAPPINGS["PeRFlowSigmas"]().get_sigmas(model, steps, 4, denoise)
    (sampler,) = nodes.NODE_CLASS_MAPPINGS["PeRFlowSampler"]().get_sampler(kind, 4)
    start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x = start * (1 + sigmas[0] ** 2) ** 0.5
    drawn = sampler(patched, x, sigmas, {"seed": 1}, lambda step: seen.append(step["i"]), True)

    scheduler = PeRFlowScheduler(**BETAS, prediction_type=kind)
    plan = scheduler.make_plan(steps)
    plan = plan if denoise == 1.0 else scheduler.plan_from(denoise, plan)
    assert seen == list(range(len(plan)))
    assert patched.asked == list(plan.timesteps)
    sampler(model, x, sigmas, {"seed": 1})  # another model, or the same without the node's patch
    assert model.asked == [timestep - 1 for timestep in plan.timesteps]
    scheduler.set_timesteps(timesteps=list(plan.timesteps))
    z = start
    for timestep in plan.timesteps:
        wanted, without = network(z, timestep)
        z = scheduler.step(without + (wanted - without) * scale, timestep, z).prev_sample
    assert (drawn - z).abs().max() <= 1e-4 * z.abs().max()


def test_the_embedded_model_draws_what_our_blocks_draw(nodes: Any) -> None:
    pipe: Any = perflow_pipeline()
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    given: dict[str, Any] = {
        "latents": start,
        "guidance_scale": 2.0,
        "num_inference_steps": 6,
        "output_type": "latent",
    }
    state = pipe("a red star", negative_prompt="a ring", **given)
    sizes = {"time_ids": state.add_time_ids}

    @torch.no_grad()
    def unet(z: Tensor, timestep: int) -> tuple[Tensor, ...]:
        texts = (state.prompt_embeds, state.pooled_prompt_embeds)
        empty = (state.negative_prompt_embeds, state.negative_pooled_prompt_embeds)
        return tuple(
            pipe.unet(z, timestep, embeds, added_cond_kwargs={"text_embeds": pooled, **sizes}).sample
            for embeds, pooled in (texts, empty)
        )

    sampling: Any = sys.modules["comfyui_perflow.sampling"]
    sigmas, model = nodes.PeRFlowSigmas().get_sigmas(Comfy(unet, 2.0, "ddim_eps"), 6, 4, 1.0)
    x = start * (1 + sigmas[0] ** 2) ** 0.5
    drawn = sampling.sample_perflow(model, x, sigmas, {"seed": 1}, prediction_type="ddim_eps")
    assert (drawn - state.images).abs().max() <= 1e-4 * state.images.abs().max()


def test_mistakes_are_named(nodes: Any) -> None:
    model, x = Comfy(network, 1.0, "ddim_eps"), torch.zeros(1, 4, 8, 8)
    sampling: Any = sys.modules["comfyui_perflow.sampling"]
    with pytest.raises(ValueError, match="prediction_type='epsilon' must be one of ddim_eps"):
        sampling.sample_perflow(model, x, SIGMAS.flip(0)[:2], prediction_type="epsilon")
    with pytest.raises(ValueError, match="window"):  # of another scheduler's node
        sampling.sample_perflow(model, x, torch.cat([SIGMAS[[999, 400]], torch.zeros(1)]))
    with pytest.raises(ValueError, match="denoise=0 must be above 0"):
        sampling.perflow_sigmas(SIGMAS, 4, denoise=0)


def test_the_nodes_need_torch_and_the_core_alone() -> None:
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("nodes", {str(FOLDER / "__init__.py")!r})
module = sys.modules["nodes"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert not {{"diffusers", "transformers", "perflow_blocks.schedulers"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_example_uses_inputs_that_the_nodes_have(nodes: Any) -> None:
    graph = json.loads((FOLDER / "workflows" / "perflow_sdxl.json").read_text())
    used = {node["class_type"]: node["inputs"] for node in graph.values()}
    for name, kind in nodes.NODE_CLASS_MAPPINGS.items():
        assert used[name].keys() == kind.INPUT_TYPES()["required"].keys()
    links = [value for inputs in used.values() for value in inputs.values() if isinstance(value, list)]
    assert all(source in graph for source, _ in links)
