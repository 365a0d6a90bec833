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

from perflow_blocks.blocks import PeRFlowDenoiseStep
from perflow_blocks.blocks.denoiser import NetworkInputs
from perflow_blocks.testing import check_block, tiny_inputs
from perflow_blocks.testing.tiny import tiny_inpainting_unet
from tests.blocks.conftest import LOOP_WORKFLOWS, Spy, blocks_with, loop_inputs, loop_pipeline
from tests.conftest import make_pipeline, run

GUIDANCE = ["aten.sub.Tensor", "aten.mul.Tensor", "aten.add.Tensor"]
"""Classifier-free guidance as diffusers writes it."""
UPDATE = ["aten.mul.Tensor", "aten.addcmul_.default"]
"""The solver's `A latents + B noise_pred`, in place from its second kernel on."""
BEFORE = ["aten.copy_.default"]
"""The latents' way into the network's buffer."""


class Ledger(TorchDispatchMode):
    """Kernels outside the networks, step by step: the operators that are no views, and those that made new storage."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[str]] = []
        self.allocating: list[list[str]] = []
        self.inside = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.steps and not self.inside:
            given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            fresh = [leaf for leaf in made if _storage(leaf) not in given]
            written = func._schema.is_mutable
            if fresh or written:
                self.steps[-1].append(str(func))
            if fresh:
                self.allocating[-1].append(str(func))
        return result

    def begin(self, *_: Any) -> None:
        self.steps.append([])
        self.allocating.append([])

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
    ledger.allocating[-1] = ledger.allocating[-1][: len(ledger.allocating[-2])]
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
    new = [*GUIDANCE, UPDATE[0]] if guided else [UPDATE[0]]
    assert ledger.allocating[1:] == [new] * 4


@pytest.mark.behaviour
@pytest.mark.parametrize("workflow", LOOP_WORKFLOWS)
def test_nothing_is_joined_or_repeated_twice(workflow: str) -> None:
    unet = {"unet": tiny_inpainting_unet()} if workflow == "inpainting" else {}
    pipe = loop_pipeline(workflow, blocks_with("spy", Spy, before="finite_guard"), **unet)
    networks = ["unet", "controlnet"] if "controlnet" in workflow else ["unet"]
    first, *later = ledger_of(pipe, networks, **loop_inputs(workflow)).allocating
    assert "aten.cat.default" in first
    assert not [name for step in later for name in step if "cat" in name or "empty" in name or "repeat" in name]


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
def test_runs_do_not_share_what_they_keep() -> None:
    pipe, seen = make_pipeline(), list[Tensor]()
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    first, second = (pipe(prompt="a star", num_inference_steps=4, output_type="latent") for _ in range(2))
    assert seen[0].data_ptr() == seen[3].data_ptr()
    assert seen[0].data_ptr() != seen[4].data_ptr()
    assert not [name for state in (first, second) for name in state.values if name.startswith("_")]


@pytest.mark.behaviour
def test_inference_mode_gives_the_same_image() -> None:
    pipe = make_pipeline()
    usual = run(pipe, num_inference_steps=4)
    with torch.inference_mode():
        assert torch.equal(run(pipe, num_inference_steps=4), usual)


def test_joined_tensors_are_kept_until_a_source_changes() -> None:
    inputs, parts = NetworkInputs(), [torch.randn(2, 3), torch.randn(2, 3)]
    joined = inputs.join("embeds", parts)
    assert torch.equal(joined, torch.cat(parts))
    assert inputs.join("embeds", list(parts)) is joined
    parts[1].add_(1.0)
    written = inputs.join("embeds", parts)
    assert written is not joined and torch.equal(written, torch.cat(parts))
    assert inputs.join("embeds", parts[:1]) is parts[0]
    assert torch.equal(inputs.join("embeds", parts[::-1]), torch.cat(parts[::-1]))


def test_lists_are_joined_and_repeated_entry_by_entry() -> None:
    inputs = NetworkInputs()
    guided, plain = [torch.randn(1, 2), torch.randn(1, 5)], [torch.randn(1, 2), torch.randn(1, 5)]
    joined = inputs.join("images", [guided, plain])
    assert [tuple(entry.shape) for entry in joined] == [(2, 2), (2, 5)]
    assert torch.equal(joined[1], torch.cat([guided[1], plain[1]]))
    assert inputs.join("images", [guided, plain]) is joined
    repeated = inputs.repeat("images", guided, 3)
    assert [tuple(entry.shape) for entry in repeated] == [(3, 2), (3, 5)]
    assert inputs.repeat("images", guided, 3) is repeated
    assert inputs.repeat("images", guided, 1) is guided
    assert inputs.repeat("images", None, 3) is None


def test_samples_are_written_into_one_buffer() -> None:
    inputs, latents, also = NetworkInputs(), torch.randn(2, 4, 3, 5), torch.randn(2, 5, 3, 5)
    assert inputs.samples(latents, 1) is latents
    sample = inputs.samples(latents, 2, also)
    assert torch.equal(sample, torch.cat([torch.cat([latents, also], dim=1)] * 2))
    following = inputs.samples(latents + 1.0, 2, also)
    assert following.data_ptr() == sample.data_ptr()
    assert torch.equal(following, torch.cat([torch.cat([latents + 1.0, also], dim=1)] * 2))
    also.zero_()
    assert not inputs.samples(latents, 2, also)[:, 4:].any()
    wider = inputs.samples(latents, 3)
    assert torch.equal(wider, torch.cat([latents] * 3))
    assert inputs.samples(latents.double(), 3).dtype == torch.float64


def test_a_buffer_of_another_size_has_its_further_channels_too() -> None:
    inputs, latents, also = NetworkInputs(), torch.randn(2, 4, 8, 8), torch.ones(2, 5, 8, 8)
    for copies in (2, 1, 2):  # guidance that starts or stops within the run
        assert torch.equal(inputs.samples(latents, copies, also)[:, 4:], torch.ones(2 * copies, 5, 8, 8))


@pytest.mark.behaviour
def test_the_loop_alone_refuses_latents_of_another_type() -> None:
    with pytest.raises(ValueError, match=r"the latents are torch.float16, the UNet is torch.float32; load all"):
        check_block(PeRFlowDenoiseStep(), inputs={"latents": tiny_inputs()["latents"].half()})


def test_inference_tensors_are_joined_anew_since_writes_to_them_leave_no_trace() -> None:
    with torch.inference_mode():
        inputs, parts = NetworkInputs(), [torch.randn(1, 3), torch.randn(1, 3)]
        before = inputs.join("embeds", parts)
        parts[0].zero_()
        assert torch.equal(inputs.join("embeds", parts), torch.cat(parts))
        assert not torch.equal(before, torch.cat(parts))
