"""The loop costs the networks' calls and a handful of kernels: counted operator by operator, not timed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.blocks.conftest import Spy, blocks_with, loop_inputs, loop_pipeline
from tests.conftest import make_pipeline, run

GUIDANCE = ["aten.sub.Tensor", "aten.mul.Tensor", "aten.add.Tensor"]
"""Classifier-free guidance as diffusers writes it."""
UPDATE = ["aten.mul.Tensor", "aten.addcmul_.default"]
"""The solver's `A latents + B noise_pred`, in place from its second kernel on."""
BEFORE = ["aten.repeat.default"]
"""The latents for the guider's two batches."""


class Ledger(TorchDispatchMode):
    """Kernels outside the networks, step by step: the operators that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[str]] = []
        self.inside = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.steps and not self.inside:
            given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            if func._schema.is_mutable or any(_storage(leaf) not in given for leaf in made):
                self.steps[-1].append(str(func))
        return result

    def begin(self, *_: Any) -> None:
        self.steps.append([])

    @contextmanager
    def watching(self, *networks: nn.Module) -> Iterator[None]:
        hooks = []
        for network in networks:
            hooks.append(network.register_forward_pre_hook(self._enter))
            hooks.append(network.register_forward_hook(self._leave))
        with self:
            yield
        for hook in hooks:
            hook.remove()

    def _enter(self, *_: Any) -> None:
        self.inside += 1

    def _leave(self, *_: Any) -> None:
        self.inside -= 1


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def ledger_of(pipe: Any, networks: list[str], **inputs: Any) -> Ledger:
    ledger = Ledger()
    with ledger.watching(*(getattr(pipe, name) for name in networks)):
        run(pipe, spy=ledger.begin, **inputs)
    ledger.steps[-1] = ledger.steps[-1][: len(ledger.steps[-2])]  # what follows is the loop's end and the decoder's
    return ledger


@pytest.mark.behaviour
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("workflow", ["text2image", "controlnet_text2image"])
def test_a_step_is_its_networks_and_a_handful_of_kernels(workflow: str, guidance_scale: float) -> None:
    guider = ClassifierFreeGuidance(guidance_scale=guidance_scale)
    pipe = loop_pipeline(workflow, blocks_with("spy", Spy, before="finite_guard"), guider=guider)
    networks = ["unet", "controlnet"] if "controlnet" in workflow else ["unet"]
    ledger = ledger_of(pipe, networks, **loop_inputs(workflow))
    guided = guidance_scale != 1.0
    expected = [*BEFORE, *GUIDANCE, *UPDATE] if guided else UPDATE
    assert ledger.steps[1:] == [expected] * 4


@pytest.mark.behaviour
def test_conditions_are_joined_once() -> None:
    pipe = loop_pipeline("controlnet_inpainting", blocks_with("spy", Spy, before="finite_guard"))
    first, *later = ledger_of(pipe, ["unet", "controlnet"], **loop_inputs("controlnet_inpainting")).steps
    assert "aten.cat.default" in first
    assert not [name for step in later for name in step if "cat" in name]


@pytest.mark.behaviour
@pytest.mark.parametrize("in_place", [False, True])
def test_a_prompt_that_a_block_changes_counts_from_that_step_on(in_place: bool) -> None:
    seen: list[Tensor] = []

    def change(components: Any, block_state: Any, i: int) -> None:
        if i == 2 and in_place:
            block_state.prompt_embeds.zero_()
        elif i == 2:
            block_state.prompt_embeds = torch.zeros_like(block_state.prompt_embeds)

    pipe = make_pipeline(blocks_with("spy", Spy, before="denoiser"))
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    run(pipe, spy=change, negative_prompt="a blue ring", num_inference_steps=4)
    assert [bool(embeds[:1].any()) for embeds in seen] == [True, True, False, False]
    assert all(embeds[1:].any() for embeds in seen)
    assert seen[0] is seen[1] and seen[2] is seen[3]


@pytest.mark.behaviour
def test_inference_mode_gives_the_same_image() -> None:
    pipe = make_pipeline()
    usual = run(pipe, num_inference_steps=4)
    with torch.inference_mode():
        assert torch.equal(run(pipe, num_inference_steps=4), usual)
